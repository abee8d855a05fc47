"""A study of many ranks and steps, made of arithmetic, for trying the page at its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from hpcmm.analysis import collectives, time_tables
from hpcmm.analysis.phases import SEGMENT_COLUMNS, step_times
from hpcmm.analysis.study import Study
from hpcmm.analysis.time_tables import phases_table, wait_matrix
from hpcmm.analysis.trace import COLLECTIVE_COLUMNS, RankTrace

MS = 1_000_000
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "other")
WORK_MS = np.array([4.0, 11.0, 18.0, 5.0, 1.0, 2.0])
TRANSFER_MS = 3.0
SLOW_RANK, SLOW_MS = 5, 9.0


def large_study(small: Study, *, ranks: int = 64, steps: int = 1000, ranks_per_node: int = 8) -> Study:
    """``small`` with the traces of ``ranks`` x ``steps`` x six phases, two collectives a step, and rank 5 slow to load.

    The large tables that the page draws from are made from those traces; the others stay those of ``small``.
    """
    traces = _traces(ranks, steps, ranks_per_node)
    rows = collectives.match_with_waits(traces, small.clock.error_ns)
    times = step_times(traces)
    made = {
        "steps": time_tables.steps_table(traces, times.warmup_number),
        "phases": phases_table(traces, rows, times.warmup_number),
        "collectives": collectives.collectives_table(rows),
        "comm_wait": _comm_wait(rows, steps),
    }
    matrix = wait_matrix(rows, ranks, rows["step"].isin(times.numbers)) / 1e9 / steps
    return replace(
        small,
        name=f"{ranks} ranks, {steps} steps",
        tables={**small.tables, **made},
        traces=tuple(traces),
        collectives=rows,
        steps=times,
        wait_matrix=matrix,
    )


def _comm_wait(rows: pd.DataFrame, steps: int) -> pd.DataFrame:
    columns = {"exposed_wait_ns": "wait_s_per_step", "exposed_transfer_ns": "transfer_s_per_step"}
    sums = rows.groupby(["rank", "node", "phase"])[list(columns)].sum() / 1e9 / steps
    return sums.rename(columns=columns).reset_index()


def _traces(ranks: int, steps: int, ranks_per_node: int) -> list[RankTrace]:
    noise = np.random.default_rng(0)
    work = WORK_MS * noise.gamma(60.0, 1 / 60.0, size=(steps, ranks, len(PHASES)))
    work[:, SLOW_RANK % ranks, 0] += SLOW_MS
    # Backward ends in one all-reduce that waits for all, the optimizer in another.
    starts, ends = np.empty_like(work), np.empty_like(work)
    arrivals = np.empty((steps, ranks, 2))
    at = np.zeros(ranks)
    for step in range(steps):
        for phase in range(len(PHASES)):
            starts[step, :, phase] = at
            at = at + work[step, :, phase]
            if phase in (2, 3):
                arrivals[step, :, phase - 2] = at
                at = np.full(ranks, at.max() + TRANSFER_MS)
            ends[step, :, phase] = at
    return [
        _trace(rank, f"node{rank // ranks_per_node + 1}", starts[:, rank], ends[:, rank], arrivals[:, rank])
        for rank in range(ranks)
    ]


def _trace(rank: int, node: str, starts: np.ndarray, ends: np.ndarray, arrivals: np.ndarray) -> RankTrace:
    steps = len(starts)
    number = np.arange(steps)
    segments = pd.DataFrame(
        {
            "step": np.repeat(number, len(PHASES)),
            "phase": np.tile(np.array(PHASES, dtype=object), steps),
            "start_ns": (starts.ravel() * MS).astype(np.int64),
            "end_ns": (ends.ravel() * MS).astype(np.int64),
        }
    )[SEGMENT_COLUMNS]
    comm = pd.DataFrame(
        {
            "op": "all_reduce",
            "group": "0",
            "sequence": np.arange(2 * steps),
            "occurrence": 0,
            "bytes": np.tile([25_000_000, 4096], steps),
            "start_ns": (arrivals.ravel() * MS).astype(np.int64),
            "end_ns": (ends[:, 2:4].ravel() * MS).astype(np.int64),
            "closed": True,
            "step": np.repeat(number, 2),
            "phase": np.tile(np.array(["backward", "optimizer"], dtype=object), steps),
        }
    )[COLLECTIVE_COLUMNS]
    whole = pd.DataFrame(
        {
            "step": number,
            "start_ns": (starts[:, 0] * MS).astype(np.int64),
            "end_ns": (ends[:, -1] * MS).astype(np.int64),
            "closed": True,
        }
    )
    empty = pd.DataFrame()
    return RankTrace(
        rank=rank,
        node=node,
        pid=100 + rank,
        report=f"rank_{rank:04d}.sqlite",
        steps=whole,
        segments=segments,
        collectives=comm,
        blocked=None,
        waits=empty,
        osrt=empty,
        calls=empty,
    )
