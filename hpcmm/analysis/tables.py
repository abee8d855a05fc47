"""The tables as they are written: seconds since the run's first event, units in the names. See ``docs/tables.md``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import nccl, osrt, waitpid
from hpcmm.analysis.delay_costs import UNEXPLAINED
from hpcmm.analysis.findings import AnalysisContext
from hpcmm.analysis.gpu_trace import CAUSES
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.report_inventory import ReportFacts
from hpcmm.analysis.trace import RankTrace

UNITS = ("_s", "_s_per_step", "_bytes_per_s", "_share", "_ppm", "_efficiency", "_scaling")
"""Ends of the names of columns that hold real numbers."""
INTEGERS = frozenset(
    {
        "attempt",
        "bytes",
        "calls",
        "collectives",
        "events",
        "late_rank",
        "nodes",
        "rank",
        "rank_order",
        "ranks",
        "reports",
    }
    | {"sequence", "slowest_rank", "step", "steps", "waited_for_rank", "pid", "device", "kernels", "copies"}
)
FLAGS = frozenset({"complete", "corrected", "estimators_disagree", "warmup"})
RATIOS = frozenset({"variation", "load_balance", "load_balance_in_node", "load_balance_between_nodes"})


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with a type for each column that has none: an empty table has the types of a full one.

    Columns that their maker has given a type keep it.
    """
    kinds = {name: _kind(str(name)) for name, dtype in frame.dtypes.items() if pd.api.types.is_object_dtype(dtype)}
    return frame.astype(kinds) if kinds else frame


def _kind(name: str) -> str:
    if name in INTEGERS:
        return "Int64"
    if name in FLAGS:
        return "bool"
    if name in RATIOS or name.endswith(UNITS):
        return "float64"
    return "str"


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by name, each made when it is first asked for, and once."""

    def __init__(self, makers: Mapping[str, Callable[[], pd.DataFrame]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._made:
            self._made[name] = typed(self._makers[name]())
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


STEP_COLUMNS = ["rank", "node", "step", "start_s", "duration_s", "warmup"]
COLLECTIVE_COLUMNS = [
    "op",
    "group",
    "sequence",
    "rank",
    "node",
    "step",
    "phase",
    "start_s",
    "end_s",
    "duration_s",
    "wait_s",
    "transfer_s",
    "wait_a_s",
    "wait_b_s",
    "estimators_disagree",
    "clock_error_s",
    "exposed_wait_s",
    "exposed_transfer_s",
    "bytes",
    "bus_bytes_per_s",
    "late_rank",
    "lateness_s",
    "lateness_to_median_s",
    "ranks",
    "complete",
    "basis",
    "device",
]
DELAY_COLUMNS = ["rank", "node", "step", "phase", "lost_s"]
WAITPID_COLUMNS = ["rank", "role", "function", "child", "step", "phase", "start_s", "duration_s", "verdict"]
WINDOW_COLUMNS = ["rank", "role", "verdict", "start_s", "end_s", "calls", "union_s"]


def _step(numbers: pd.Series) -> pd.Series:
    """Step numbers with nothing where there is no step."""
    return numbers.astype("Int64").where(numbers != OUTSIDE)


def osrt_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """OS runtime calls of every rank: rank, role, thread_role, function and OSRT_COLUMNS' times; longest first."""
    frames = [trace.osrt.assign(rank=trace.rank) for trace in traces]
    columns = ["rank", *osrt.OSRT_COLUMNS]
    table = pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    table = table.rename(columns={"process_role": "role"})
    order = ["rank", "role", "thread_role", "total_s", "function"]
    return table.sort_values(order, ascending=[True, True, True, False, True], ignore_index=True)


def waitpid_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Every wait for a child process (WAITPID_COLUMNS)."""
    frames = [
        trace.waits.assign(
            rank=trace.rank,
            step=_step(trace.waits["step"]),
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
        found = waitpid.windows(trace.waits)
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


def steps_table(traces: Sequence[RankTrace], warmup_step: int | None) -> pd.DataFrame:
    """Start and duration of each closed step of each rank (STEP_COLUMNS)."""
    frames = [
        pd.DataFrame(
            {
                "rank": trace.rank,
                "node": trace.node,
                "step": closed["step"],
                "start_s": closed["start_ns"] / NS_PER_S,
                "duration_s": (closed["end_ns"] - closed["start_ns"]) / NS_PER_S,
                "warmup": closed["step"] == (warmup_step if warmup_step is not None else -2),
            }
        )
        for trace in traces
        if len(closed := trace.steps[trace.steps["closed"]])
    ]
    if not frames:
        return pd.DataFrame(columns=STEP_COLUMNS)
    return pd.concat(frames, ignore_index=True).sort_values(["rank", "step"], ignore_index=True)


def collectives_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each rank's part in each collective (COLLECTIVE_COLUMNS), sorted by instance and rank."""
    seconds = {
        "start_s": "start_ns",
        "end_s": "end_ns",
        "duration_s": "duration_ns",
        "wait_s": "wait_ns",
        "transfer_s": "transfer_ns",
        "wait_a_s": "wait_a_ns",
        "wait_b_s": "wait_b_ns",
        "exposed_wait_s": "exposed_wait_ns",
        "exposed_transfer_s": "exposed_transfer_ns",
        "lateness_s": "lateness_ns",
        "lateness_to_median_s": "lateness_to_median_ns",
        "clock_error_s": "clock_error_ns",
    }
    table = rows.assign(**{name: rows[source] / NS_PER_S for name, source in seconds.items()}, step=_step(rows["step"]))
    table = nccl.with_basis(table)
    # A kernel without a range of hpcmm does not tell its size, unless NCCL's own range does.
    table["bytes"] = (
        table["bytes"].astype("Int64").where(table["basis"].isin([nccl.BY_NAME, nccl.BY_KERNEL]) | (table["bytes"] > 0))
    )
    return table.sort_values(["instance", "rank"], ignore_index=True)[COLLECTIVE_COLUMNS]


def delays_table(context: AnalysisContext) -> pd.DataFrame:
    """What each rank's delays cost, by step and part of its work (DELAY_COLUMNS), seconds as a mean over all ranks."""
    step, trace, part = np.nonzero(context.losses)
    names = np.array([*context.parts.names, UNEXPLAINED], dtype=object)
    table = pd.DataFrame(
        {
            "rank": np.array([trace.rank for trace in context.traces], dtype=np.int64)[trace],
            "node": np.array([trace.node for trace in context.traces], dtype=object)[trace],
            "step": context.steps.numbers[step],
            "phase": names[part],
            "lost_s": context.losses[step, trace, part],
        }
    )
    return table.sort_values(["rank", "step", "phase"], ignore_index=True)[DELAY_COLUMNS].astype(
        {"node": "str", "phase": "str"}
    )


STARTUP_COLUMNS = ("attempt", "part", "median_s", "longest_s", "slowest_rank", "ranks")
FIRST_STEP = "first step"


def startup_table(records: Mapping[int, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """One row for each attempt and part of the start, in the order in which the parts happen.

    ``records``: by rank, the records of its metrics file. ``median_s`` and ``longest_s`` are over the ranks, of which
    ``ranks`` recorded the part. The last part, ``first step``, is the first step of the attempt. The parts of one rank
    follow one another, but ranks wait for each other in ``rendezvous`` and ``engine``, so the medians of the parts add
    up only roughly to the time of the whole start. Records that lack what they should hold are left out.
    """
    parts = pd.DataFrame(
        [part for rank, of_rank in records.items() for part in _parts(rank, of_rank)],
        columns=["attempt", "part", "rank", "order", "duration_s"],
    )
    rows = []
    for (attempt, part), group in parts.groupby(["attempt", "part"], sort=False):
        slowest = group.sort_values(["duration_s", "rank"]).iloc[-1]
        rows.append(
            {
                "attempt": attempt,
                "part": part,
                "median_s": group["duration_s"].median(),
                "longest_s": slowest["duration_s"],
                "slowest_rank": slowest["rank"],
                "ranks": group["rank"].nunique(),
                "order": group["order"].median(),
            }
        )
    table = pd.DataFrame(rows, columns=[*STARTUP_COLUMNS, "order"])
    return table.sort_values(["attempt", "order"], kind="stable", ignore_index=True)[list(STARTUP_COLUMNS)]


def _parts(rank: int, records: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, str, int, int, float]]:
    """(attempt, part, rank, order, duration_s) of each part of each attempt of one rank."""
    stepped: set[int] = set()
    for order, record in enumerate(records):
        event, attempt = record.get("event"), record.get("attempt", 1)
        if not isinstance(attempt, int):
            continue
        if event == "startup":
            part, duration_s = record.get("part"), record.get("duration_s")
        elif event in ("step", "lost") and attempt not in stepped:
            stepped.add(attempt)
            part, duration_s = FIRST_STEP, record.get("step_s")
        else:
            continue
        if isinstance(part, str) and isinstance(duration_s, int | float) and math.isfinite(duration_s):
            yield attempt, part, rank, order, float(duration_s)


ENVIRONMENT_COLUMNS = ["rank", "node", "variable", "value"]


def environment_table(used: Sequence[tuple[ReportFacts, RankTrace]]) -> pd.DataFrame:
    """Variables of the program that nsys started, by rank (ENVIRONMENT_COLUMNS).

    ``[redacted]`` stands for values that may be secrets.

    Ranks that were captured in one report share its environment, which is that of their launcher.
    """
    rows = [
        (trace.rank, trace.node, variable, value)
        for fact, trace in used
        for variable, value in sorted(fact.identity.environment.items())
    ]
    return pd.DataFrame(rows, columns=ENVIRONMENT_COLUMNS)


GPU_COLUMNS = [
    "rank", "node", "pid", "device", "step", "warmup", "start_s", "span_s", "compute_s", "comm_s", "memory_s",
    "overlap_s", "overlap_share", "exposed_comm_s", "comm_wait_s", "idle_s", "idle_host_s", "idle_sync_s",
    "idle_other_s", "idle_other_cause",
]  # fmt: skip
PROJECTION_COLUMNS = [
    "rank", "node", "pid", "domain", "range", "calls", "host_s", "gpu_envelope_s", "gpu_union_s", "gpu_self_s",
    "kernels", "copies",
]  # fmt: skip


def gpu_table(traces: Sequence[RankTrace], rows: pd.DataFrame, warmup_step: int | None) -> pd.DataFrame:
    """The ``gpu`` table (GPU_COLUMNS). ``rows``: matched collectives with ``wait_ns``, for comm_wait_s."""
    frames = [
        _in_seconds(trace, trace.gpu, _waiting(rows, index, trace.gpu))
        for index, trace in enumerate(traces)
        if trace.gpu is not None and len(trace.gpu)
    ]
    if not frames:
        return pd.DataFrame(columns=GPU_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else -2)
    table["step"] = table["step"].astype("Int64").where(table["step"] != OUTSIDE)
    return table.sort_values(["rank", "device", "step"], ignore_index=True)[GPU_COLUMNS]


def _waiting(rows: pd.DataFrame, trace: int, gpu: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Nanoseconds of each row of ``gpu`` in which a collective's kernel on that device waited for another rank."""
    waited = np.zeros(len(gpu))
    if rows.empty or "device" not in rows:
        return waited
    mine = rows[(rows["trace"] == trace) & rows["device"].notna() & rows["wait_ns"].notna()]
    for device, own in mine.groupby("device"):
        begin = own["start_ns"].to_numpy(np.int64)
        waits = IntervalSet.union_of(begin, begin + own["wait_ns"].to_numpy(np.float64).astype(np.int64))
        at = np.flatnonzero(gpu["device"] == device)
        inside = (gpu["step"] != OUTSIDE).to_numpy()[at]
        covered = waits.covered_within(gpu["start_ns"].to_numpy(np.int64)[at], gpu["end_ns"].to_numpy(np.int64)[at])
        # The row of what lies outside the steps spans them.
        waited[at] = np.where(inside, covered, waits.total_ns - covered[inside].sum())
    return waited


def _in_seconds(trace: RankTrace, gpu: pd.DataFrame, waited_ns: npt.NDArray[np.float64]) -> pd.DataFrame:
    idle = gpu[[f"idle_{index}_ns" for index in range(len(CAUSES))]].to_numpy(np.float64)
    other = idle[:, 1:]
    cause = np.array(CAUSES[1:], dtype=object)[other.argmax(axis=1)]
    comm, overlap = gpu["comm_ns"].to_numpy(np.float64), gpu["overlap_ns"].to_numpy(np.float64)
    seconds = {
        "start_s": gpu["start_ns"],
        **{name: gpu[f"{name[:-2]}_ns"] for name in ("span_s", "compute_s", "comm_s", "memory_s", "overlap_s")},
        "exposed_comm_s": comm - overlap,
        "comm_wait_s": waited_ns,
        "idle_s": idle.sum(axis=1),
        "idle_host_s": idle[:, 0],
        "idle_sync_s": gpu["idle_sync_ns"],
        "idle_other_s": other.sum(axis=1),
    }
    share = np.divide(overlap, comm, out=np.full(len(gpu), np.nan), where=comm > 0)
    return gpu[["device", "step"]].assign(
        rank=trace.rank,
        node=trace.node,
        pid=trace.pid,
        overlap_share=share,
        idle_other_cause=np.where(other.sum(axis=1) > 0, cause, ""),
        **{name: np.asarray(values, dtype=np.float64) / NS_PER_S for name, values in seconds.items()},
    )


def projection_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """The ``projection`` table (PROJECTION_COLUMNS): most GPU time first within a rank."""
    times = ("host", "gpu_envelope", "gpu_union", "gpu_self")
    frames = [
        trace.projection.assign(
            rank=trace.rank,
            node=trace.node,
            pid=trace.pid,
            **{f"{name}_s": trace.projection[f"{name}_ns"] / NS_PER_S for name in times},
        )
        for trace in traces
        if trace.projection is not None and len(trace.projection)
    ]
    if not frames:
        return pd.DataFrame(columns=PROJECTION_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values("rank", kind="stable", ignore_index=True)[PROJECTION_COLUMNS]
