"""The tables as they are written: seconds since the run's first event, units in the names. See ``docs/tables.md``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis import osrt, waitpid
from hpcmm.analysis.delay import exposed_communication
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.trace import RankTrace

PHASE_COLUMNS = ["rank", "node", "step", "phase", "duration_s", "comm_s", "exposed_comm_s", "useful_s", "warmup"]
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
    "duration_s",
    "wait_s",
    "transfer_s",
    "wait_a_s",
    "wait_b_s",
    "exposed_wait_s",
    "exposed_transfer_s",
    "bytes",
    "bus_bytes_per_s",
    "late_rank",
    "lateness_s",
    "ranks",
    "complete",
]
WAITPID_COLUMNS = ["rank", "role", "function", "child", "step", "phase", "start_s", "duration_s", "verdict"]
WINDOW_COLUMNS = ["rank", "role", "verdict", "start_s", "end_s", "calls", "union_s"]


def _step(numbers: pd.Series) -> pd.Series:
    """Step numbers with nothing where there is no step."""
    return numbers.astype("Int64").where(numbers != OUTSIDE)


def osrt_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """OS runtime calls of every rank: rank, role, thread_role, function and OSRT_COLUMNS' times."""
    frames = [trace.osrt.assign(rank=trace.rank) for trace in traces]
    columns = ["rank", *osrt.OSRT_COLUMNS]
    table = pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    return table.rename(columns={"process_role": "role"})


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
    return table.drop(columns="role", errors="ignore").rename(columns={"process_role": "role"})[WAITPID_COLUMNS]


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
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=WINDOW_COLUMNS)


def phases_table(traces: Sequence[RankTrace], warmup_step: int | None) -> pd.DataFrame:
    """Time of each phase in each step of each rank (PHASE_COLUMNS); the phases of a step add up to it."""
    frames = []
    for trace in traces:
        segments = trace.segments
        if segments.empty:
            continue
        start, end = segments["start_ns"].to_numpy(np.int64), segments["end_ns"].to_numpy(np.int64)
        flight = IntervalSet.union_of(trace.collectives["start_ns"], trace.collectives["end_ns"])
        parts = pd.DataFrame(
            {
                "step": segments["step"].to_numpy(),
                "phase": segments["phase"].to_numpy(),
                "duration_s": (end - start) / NS_PER_S,
                "comm_s": flight.covered_within(start, end) / NS_PER_S,
                "exposed_comm_s": exposed_communication(trace).covered_within(start, end) / NS_PER_S,
            }
        )
        summed = parts.groupby(["step", "phase"], as_index=False).sum()
        frames.append(summed.assign(rank=trace.rank, node=trace.node))
    if not frames:
        return pd.DataFrame(columns=PHASE_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    table["useful_s"] = table["duration_s"] - table["exposed_comm_s"]
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else -2)
    table = table.sort_values(["rank", "step", "phase"], ignore_index=True)
    return table.assign(step=_step(table["step"]))[PHASE_COLUMNS]


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
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=STEP_COLUMNS)


def collectives_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each rank's part in each collective (COLLECTIVE_COLUMNS), sorted by instance and rank."""
    seconds = {
        "start_s": "start_ns",
        "duration_s": "duration_ns",
        "wait_s": "wait_ns",
        "transfer_s": "transfer_ns",
        "wait_a_s": "wait_a_ns",
        "wait_b_s": "wait_b_ns",
        "exposed_wait_s": "exposed_wait_ns",
        "exposed_transfer_s": "exposed_transfer_ns",
        "lateness_s": "lateness_ns",
    }
    table = rows.assign(**{name: rows[source] / NS_PER_S for name, source in seconds.items()}, step=_step(rows["step"]))
    return table.sort_values(["instance", "rank"], ignore_index=True)[COLLECTIVE_COLUMNS]
