"""Every wait for a child process, in its context: which process waited, in which step and phase, and is it harmless."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import WAITPID_FUNCTIONS
from hpcmm.analysis.phases import OUTSIDE

LAUNCHER, WORKER, DATA_LOADER, OTHER_PROCESS = "launcher", "worker", "data_loader", "other"

SUPERVISION, OP_BUILD, LOADING, WITHIN_STEP, OTHER_WAIT = (
    "benign supervision",
    "op build",
    "data loader",
    "within step",
    "other",
)

WINDOW_GAP_NS = 1_000_000_000
"""Waits of one kind that lie closer than this belong to one window."""

WAIT_COLUMNS = ["process_role", "pid", "function", "child", "step", "phase", "start_ns", "end_ns", "verdict"]

_LAUNCHERS = frozenset(
    {"bash", "dash", "deepspeed", "mpiexec", "mpirun", "orterun", "sh", "slurmstepd", "srun", "torchrun", "accelerate"}
)


def process_roles(osrt: pd.DataFrame, processes: dict[int, str], workers: frozenset[int]) -> dict[int, str]:
    """The role of each process that has events. ``workers`` run steps; without any, the busiest that is no launcher."""
    grouped = osrt.groupby("pid")["start_ns"]
    first = {int(str(pid)): int(start) for pid, start in grouped.min().items()}
    calls = {int(str(pid)): int(count) for pid, count in grouped.size().items()}
    name = {pid: processes.get(pid, "") for pid in first}
    if not workers:
        candidates = [pid for pid in first if not _is_launcher(name[pid])]
        workers = frozenset(sorted(candidates, key=lambda pid: -calls[pid])[:1])
    begin = min((first.get(pid, 0) for pid in workers), default=0)
    programs = {processes.get(pid, "") for pid in workers}
    roles = dict.fromkeys(workers, WORKER)
    for pid in first.keys() - workers:
        started_before = first[pid] < begin and (_is_launcher(name[pid]) or name[pid] in programs)
        forked = name[pid] in programs or "pt_data_worker" in name[pid]
        roles[pid] = LAUNCHER if started_before else DATA_LOADER if forked else OTHER_PROCESS
    return roles


def _is_launcher(program: str) -> bool:
    return program.rsplit("/", 1)[-1] in _LAUNCHERS


def find_waits(
    osrt: pd.DataFrame,
    processes: dict[int, str],
    roles: dict[int, str],
    step_thread: tuple[int, int],
    segments: pd.DataFrame,
) -> pd.DataFrame:
    """Every call of the waitpid family: WAIT_COLUMNS, sorted by start. ``step`` is OUTSIDE where no step runs."""
    family = [name for name in osrt["function"].cat.categories if name in WAITPID_FUNCTIONS]
    waits = osrt[osrt["function"].isin(family)].sort_values("start_ns", kind="stable")
    start = waits["start_ns"].to_numpy(np.int64)
    index = np.searchsorted(segments["start_ns"].to_numpy(np.int64), start, side="right") - 1
    inside = (index >= 0) & (start < np.append(segments["end_ns"].to_numpy(np.int64), 0)[index])
    steps = np.append(segments["step"].to_numpy(np.int64), OUTSIDE)
    phases = np.append(segments["phase"].to_numpy(object), "")
    frame = pd.DataFrame(
        {
            "process_role": [roles.get(int(pid), OTHER_PROCESS) for pid in waits["pid"]],
            "pid": waits["pid"].to_numpy(np.int64),
            "function": waits["function"].astype(object).to_numpy(),
            "child": _children(osrt, processes, waits),
            "step": np.where(inside, steps[index], OUTSIDE),
            "phase": np.where(inside, phases[index], ""),
            "start_ns": start,
            "end_ns": waits["end_ns"].to_numpy(np.int64),
        }
    )
    in_steps = segments.loc[segments["step"] != OUTSIDE, "start_ns"]
    before_steps = frame["start_ns"] < (in_steps.min() if len(in_steps) else -1)
    on_step_thread = (frame["pid"] == step_thread[0]) & (waits["tid"].to_numpy() == step_thread[1])
    child_roles = {processes.get(pid, ""): role for pid, role in roles.items()}
    frame["verdict"] = [
        _verdict(
            role, child_roles.get(child, ""), in_step=step != OUTSIDE, before_steps=before, on_step_thread=on_thread
        )
        for role, child, step, before, on_thread in zip(
            frame["process_role"], frame["child"], frame["step"], before_steps, on_step_thread, strict=True
        )
    ]
    return frame[WAIT_COLUMNS]


def _verdict(role: str, child_role: str, *, in_step: bool, before_steps: bool, on_step_thread: bool) -> str:
    if role == LAUNCHER:
        return SUPERVISION
    if role == DATA_LOADER or (child_role == DATA_LOADER and not on_step_thread):
        return LOADING
    if role == WORKER and on_step_thread and in_step:
        return WITHIN_STEP
    return OP_BUILD if role == WORKER and before_steps else OTHER_WAIT


def _children(osrt: pd.DataFrame, processes: dict[int, str], waits: pd.DataFrame) -> list[str]:
    """The program waited for, where a traced process ended just within the wait; reports name no child themselves."""
    if waits.empty:
        return []
    lives = osrt.groupby("pid", observed=True).agg(first=("start_ns", "min"), last=("end_ns", "max"))
    lives = lives.sort_values("last")
    last, first = lives["last"].to_numpy(), lives["first"].to_numpy()
    found: list[str] = []
    for pid, start, end in zip(waits["pid"], waits["start_ns"], waits["end_ns"], strict=True):
        index = np.searchsorted(last, end, side="right") - 1
        fits = index >= 0 and last[index] >= start and first[index] >= lives["first"].get(pid, 0)
        child = int(lives.index[index]) if fits and lives.index[index] != pid else -1
        found.append(processes.get(child, ""))
    return found


def windows(waits: pd.DataFrame) -> pd.DataFrame:
    """Waits of one process role and verdict, coalesced: start_ns, end_ns, calls, union_ns."""
    rows = []
    for (role, verdict), group in waits.groupby(["process_role", "verdict"]):
        merged = IntervalSet.union_of(group["start_ns"], group["end_ns"] + WINDOW_GAP_NS)
        exact = IntervalSet.union_of(group["start_ns"], group["end_ns"])
        index = np.searchsorted(merged.start_ns, group["start_ns"].to_numpy(np.int64), side="right") - 1
        calls = np.bincount(index, minlength=len(merged))
        union = exact.covered_within(merged.start_ns, merged.end_ns)
        for begin, end, count, length in zip(merged.start_ns, merged.end_ns - WINDOW_GAP_NS, calls, union, strict=True):
            rows.append((role, verdict, int(begin), int(end), int(count), int(length)))
    columns = ["process_role", "verdict", "start_ns", "end_ns", "calls", "union_ns"]
    return pd.DataFrame(rows, columns=columns).sort_values("start_ns", ignore_index=True)
