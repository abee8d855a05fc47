"""The tables as they are written: seconds since the run's first event, units in the names. See ``docs/tables.md``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis import nccl, osrt, waitpid
from hpcmm.analysis.delay_costs import UNEXPLAINED
from hpcmm.analysis.findings import Evidence
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.trace import RankTrace

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


def delays_table(evidence: Evidence) -> pd.DataFrame:
    """What each rank's delays cost, by step and part of its work (DELAY_COLUMNS), seconds as a mean over all ranks."""
    step, trace, part = np.nonzero(evidence.losses)
    names = np.array([*evidence.parts.names, UNEXPLAINED], dtype=object)
    table = pd.DataFrame(
        {
            "rank": np.array([trace.rank for trace in evidence.traces], dtype=np.int64)[trace],
            "node": np.array([trace.node for trace in evidence.traces], dtype=object)[trace],
            "step": evidence.steps.numbers[step],
            "phase": names[part],
            "lost_s": evidence.losses[step, trace, part],
        }
    )
    return table.sort_values(["rank", "step", "phase"], ignore_index=True)[DELAY_COLUMNS].astype(
        {"node": "str", "phase": "str"}
    )
