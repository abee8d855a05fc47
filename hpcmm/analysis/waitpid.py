"""Every wait for a child process, in its context: which process waited, in which step and phase, and is it harmless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.osrt import WAITPID_FUNCTIONS
from hpcmm.analysis.trace import (
    DATA_LOADER,
    LAUNCHER,
    LOADING,
    OP_BUILD,
    OTHER_PROCESS,
    OTHER_WAIT,
    OUTSIDE,
    SUPERVISION,
    WITHIN_STEP,
    WORKER,
    RankTrace,
    nullable_steps,
)
from hpcmm.reports.report import LOADER_NAME, Report

WINDOW_GAP_NS = 1_000_000_000
"""Waits of one kind that lie closer than this belong to one window."""

EXIT_NS = 500_000_000
"""A process is gone within this time after its last traced call."""
_NOBODY = np.iinfo(np.int64).min

WAIT_COLUMNS = ["process_role", "pid", "function", "child", "step", "phase", "start_ns", "end_ns", "verdict"]

_LAUNCHERS = frozenset(
    {"bash", "dash", "deepspeed", "mpiexec", "mpirun", "orterun", "sh", "slurmstepd", "srun", "torchrun", "accelerate"}
)

_COMPILERS = frozenset(
    {"as", "c++", "cc1", "cc1plus", "cicc", "clang", "collect2", "g++", "gcc", "ld", "ninja", "nvcc", "ptxas"}
)


def process_roles(osrt: pd.DataFrame, processes: dict[int, str], workers: frozenset[int]) -> dict[int, str]:
    """The role of each process that has OS calls; ``workers`` are the processes that train.

    nsys traces one program and what descends from it, so the process that began first launched all others. It names
    only processes that ran when the capture began: what else a child is has to be told from when it lives and waits.
    """
    known = lives(osrt)
    own = known.loc[known.index.isin(workers)]
    begin, over = (own["first"].min(), own["last"].max()) if len(own) else (0, 0)
    programs = {name for pid in workers if (name := processes.get(pid, ""))}
    waiting = _waits_among(osrt)
    meanwhile = (waiting["end_ns"] > begin) & (waiting["start_ns"] < over)
    supervisors = {*waiting.loc[meanwhile, "pid"], known["first"].idxmin() if len(known) else -1}
    roles = dict.fromkeys(workers, WORKER)
    for pid, first in zip(map(int, known.index), known["first"], strict=True):
        name = processes.get(pid, "")
        if pid in workers:
            continue
        if first < begin and (pid in supervisors or _is_launcher(name) or name in programs):
            roles[pid] = LAUNCHER
        else:
            roles[pid] = DATA_LOADER if name in programs or LOADER_NAME in name else OTHER_PROCESS
    return roles


_STARTED_TOGETHER_NS = 2_000_000_000
"""Within this time a launcher has started the workers of a node."""
_ALIKE = 0.7
"""Processes do the same if so much of their calls goes to the same functions."""


def busiest_alike(osrt: pd.DataFrame, processes: Mapping[int, str]) -> list[int]:
    """The busiest process that is neither a launcher nor a loader, and those that do the same as it, by pid.

    They are of its program, were started with it, live as long, and make at least half as many calls, of the same
    functions.
    """
    known = lives(osrt).sort_values("calls", ascending=False, kind="stable")
    name = {int(pid): processes.get(int(pid), "") for pid in known.index}
    known = known[[not (_is_launcher(name[int(pid)]) or LOADER_NAME in name[int(pid)]) for pid in known.index]]
    if known.empty:
        return []
    first, pid = known.iloc[0], int(known.index[0])
    known = known[
        np.array([name[int(other)] == name[pid] for other in known.index])
        & ((known["first"] - first["first"]).abs() <= _STARTED_TOGETHER_NS)
        & (2 * (known["last"].clip(upper=first["last"]) - known["first"]) >= first["last"] - first["first"])
        & (2 * known["calls"] >= first["calls"])
    ]
    # Without its name a process is alike to none: it may be any program.
    others = [int(other) for other in known.index if name[pid] and int(other) != pid]
    mine = _mix(osrt, pid)
    return sorted([pid, *(each for each in others if np.minimum(mine, _mix(osrt, each)).sum() >= _ALIKE)])


def _mix(osrt: pd.DataFrame, pid: int) -> npt.NDArray[np.float64]:
    """The share of each function among the calls of a process."""
    functions = osrt["function"].cat
    codes = functions.codes.to_numpy()[(osrt["pid"] == pid).to_numpy()]
    return np.bincount(codes, minlength=len(functions.categories)) / len(codes)


def lives(osrt: pd.DataFrame) -> pd.DataFrame:
    """By pid: first and last time of a call, and how many there are."""
    code, pids = pd.factorize(osrt["pid"].to_numpy())
    first = np.full(len(pids), np.iinfo(np.int64).max)
    last = np.zeros(len(pids), dtype=np.int64)
    np.minimum.at(first, code, osrt["start_ns"].to_numpy(np.int64))
    np.maximum.at(last, code, osrt["end_ns"].to_numpy(np.int64))
    return pd.DataFrame({"first": first, "last": last, "calls": np.bincount(code, minlength=len(pids))}, index=pids)


def _waits_among(osrt: pd.DataFrame) -> pd.DataFrame:
    return osrt[osrt["function"].isin(WAITPID_FUNCTIONS)]


def _is_launcher(program: str) -> bool:
    return program.rsplit("/", 1)[-1] in _LAUNCHERS


@dataclass(frozen=True, eq=False)
class Family:
    """The processes of a report: all their calls, not one rank's alone, and their roles and names by pid."""

    osrt: pd.DataFrame
    roles: dict[int, str]
    labels: dict[int, str]

    @classmethod
    def of(cls, report: Report, roles: dict[int, str]) -> Family:
        """Ranks that told theirs are called by it."""
        ranks = {pid: f"rank {rank}" for pid, rank in report.ranks.items()}
        return cls(report.osrt, roles, report.processes | ranks)

    @cached_property
    def lives(self) -> pd.DataFrame:
        """When each lived, as :func:`lives` gives it, sorted by its end.

        And ``waiter``: of those that waited as it ended and are older than it, when the youngest began, for that is
        nearest to being its parent.
        """
        known = lives(self.osrt).sort_values("last")
        return known.assign(waiter=_youngest_waiting(known, _waits_among(self.osrt)))

    def label(self, pid: int) -> str:
        return self.labels.get(pid, "") or f"process {pid}"


def find_waits(
    osrt: pd.DataFrame, family: Family, step_thread: tuple[int, int], segments: pd.DataFrame
) -> pd.DataFrame:
    """Every call of the waitpid family: WAIT_COLUMNS, sorted by start. ``step`` is OUTSIDE if no step runs."""
    roles = family.roles
    waits = _waits_among(osrt).sort_values("start_ns", kind="stable")
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
            "child": _children(family, waits),
            "step": np.where(inside, steps[index], OUTSIDE),
            "phase": np.where(inside, phases[index], ""),
            "start_ns": start,
            "end_ns": waits["end_ns"].to_numpy(np.int64),
        }
    )
    in_steps = segments.loc[segments["step"] != OUTSIDE, "start_ns"]
    before_steps = frame["start_ns"] < (in_steps.min() if len(in_steps) else -1)
    on_step_thread = (frame["pid"] == step_thread[0]) & (waits["tid"].to_numpy() == step_thread[1])
    builders = _builders(family)
    child_roles = {family.label(pid): role for pid, role in roles.items()}
    facts = frame[["pid", "process_role", "child", "step"]].assign(before=before_steps, on_step_thread=on_step_thread)
    frame["verdict"] = [
        OP_BUILD
        if before and pid in builders
        else _verdict(
            role, child_roles.get(child, ""), in_step=step != OUTSIDE, before_steps=before, on_step_thread=on_thread
        )
        for pid, role, child, step, before, on_thread in facts.itertuples(index=False)
    ]
    return frame[WAIT_COLUMNS]


def _builders(family: Family) -> frozenset[int]:
    """Processes of no other role that live while a compiler does: it, and the build tools that wait for it."""
    names = {int(pid): family.labels.get(int(pid), "").rsplit("/", 1)[-1] for pid in family.lives.index}
    built = family.lives.loc[[pid for pid, name in names.items() if name in _COMPILERS]]
    return frozenset(
        int(pid)
        for pid, first, last in family.lives[["first", "last"]].itertuples()
        if family.roles.get(int(pid), OTHER_PROCESS) == OTHER_PROCESS
        and ((built["first"] >= first) & (built["last"] <= last)).any()
    )


def _verdict(role: str, child_role: str, *, in_step: bool, before_steps: bool, on_step_thread: bool) -> str:
    if role == LAUNCHER:
        return SUPERVISION
    if role == DATA_LOADER or (child_role == DATA_LOADER and not on_step_thread):
        return LOADING
    if role == WORKER and on_step_thread and in_step:
        return WITHIN_STEP
    return OP_BUILD if role == WORKER and before_steps else OTHER_WAIT


def _children(family: Family, waits: pd.DataFrame) -> list[str]:
    """The program waited for, where a traced process ended just before the wait did; its number if it has no name.

    Reports themselves tell neither the child nor the call's result. Of several such processes it is the last to end
    for which no younger process than the waiting one waited as well.
    """
    if waits.empty:
        return []
    known = family.lives
    first, last, waiter, pids = (
        column.to_numpy() for column in (known["first"], known["last"], known["waiter"], known.index)
    )
    begun = dict(zip(pids.tolist(), first.tolist(), strict=True))
    found: list[str] = []
    for pid, start, end in zip(waits["pid"], waits["start_ns"], waits["end_ns"], strict=True):
        index = np.searchsorted(last, end, side="right") - 1
        if index >= 0 and pids[index] == pid:  # whose last call this wait was
            index -= 1
        since, mine = max(start, end - EXIT_NS), begun[int(pid)]
        if not (index >= 0 and last[index] >= since and first[index] > mine):
            found.append("")
            continue
        ended = range(int(index), int(np.searchsorted(last, since)) - 1, -1)
        own = (each for each in ended if pids[each] != pid and first[each] > mine and waiter[each] <= mine)
        found.append(family.label(int(pids[next(own, index)])))
    return found


def _youngest_waiting(known: pd.DataFrame, waits: pd.DataFrame) -> list[int]:
    """The column ``waiter`` of :attr:`Family.lives`, whose others are ``known``; _NOBODY if nobody waited."""
    ordered = waits.sort_values("end_ns")
    start, end = ordered["start_ns"].to_numpy(), ordered["end_ns"].to_numpy()
    waiter = known["first"].loc[ordered["pid"]].to_numpy()
    found = []
    for over, born in zip(known["last"], known["first"], strict=True):
        near = slice(*np.searchsorted(end, [over, over + EXIT_NS]))
        could = waiter[near][(start[near] <= over) & (waiter[near] < born)]
        found.append(int(could.max()) if len(could) else _NOBODY)
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


WAITPID_COLUMNS = ["rank", "role", "function", "child", "step", "phase", "start_s", "duration_s", "verdict"]
WINDOW_COLUMNS = ["rank", "role", "verdict", "start_s", "end_s", "calls", "union_s"]


def waitpid_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Every wait for a child process (WAITPID_COLUMNS)."""
    frames = [
        trace.waits.assign(
            rank=trace.rank,
            step=nullable_steps(trace.waits["step"]),
            start_s=trace.waits["start_ns"] / NS_PER_S,
            duration_s=(trace.waits["end_ns"] - trace.waits["start_ns"]) / NS_PER_S,
        )
        for trace in traces
        if len(trace.waits)
    ]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["process_role", *WAITPID_COLUMNS])
    table = table.drop(columns="role", errors="ignore").rename(columns={"process_role": "role"})
    return table.sort_values(["rank", "start_s", "duration_s"], ignore_index=True)[WAITPID_COLUMNS]


def waitpid_windows(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Waits for child processes coalesced into windows (WINDOW_COLUMNS)."""
    frames = []
    for trace in traces:
        found = windows(trace.waits)
        frames.append(
            pd.DataFrame(
                {
                    "rank": trace.rank,
                    "role": found["process_role"],
                    "verdict": found["verdict"],
                    "start_s": found["start_ns"] / NS_PER_S,
                    "end_s": found["end_ns"] / NS_PER_S,
                    "calls": found["calls"],
                    "union_s": found["union_ns"] / NS_PER_S,
                }
            )
        )
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return pd.DataFrame(columns=WINDOW_COLUMNS)
    return pd.concat(frames, ignore_index=True).sort_values(["rank", "start_s", "end_s"], ignore_index=True)


_PYTHON = re.compile(
    r"python|pypy|\.py$|^pt_|mainthread|^ray\b|vllm|jupyter|ipykernel|torchrun|deepspeed|accelerate|lightning|composer"
    r"|^(?:uv|conda|poetry|pipenv|hatch|tune|maxtext|litgpt|fairseq\S*|trtllm\S*|lm_eval|jax\S*|train|worker)$",
    re.IGNORECASE,
)
_OF_PYTORCH = re.compile(r"\bat::|_ZN2at|triton_|c10::|\w*fusion(?:_\d+)?$|^(?:jit|loop|input)_")
_STARTS_OTHERS = _LAUNCHERS | {"", "env", "numactl", "prterun", "taskset"}
_COMM_LENGTH = 15
"""The kernel keeps so much of a program's name."""


def has_no_python(workers: Sequence[str], program: str, kernels: Iterable[str]) -> bool:
    """Whether processes of these names are no Python programs, as far as it can be known.

    They are what nsys was told to run, ``program``, or may have been started by it; none of the names is one of
    Python's, and no kernel is one of PyTorch's.
    """
    if not workers or any(name in _STARTS_OTHERS for name in workers) or any(map(_PYTHON.search, [*workers, program])):
        return False
    if any(map(_OF_PYTORCH.search, kernels)):
        return False
    called = {PurePosixPath(name).name for name in workers}
    return program in _STARTS_OTHERS or called <= {program, program[:_COMM_LENGTH]}
