"""Runs made of arithmetic: ranks whose steps, collectives and waits follow from how long each phase takes."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.trace import COLLECTIVE_COLUMNS, RankTrace
from hpcmm.analysis.waitpid import WAIT_COLUMNS

MS = 1_000_000


def make_trace(rank: int, node: str, segments: list[tuple], collectives: list[tuple], **parts) -> RankTrace:
    """``segments``: (step, phase, start, end); ``collectives``: (op, sequence, bytes, start, end, step, phase)."""
    phase = pd.DataFrame(segments, columns=["step", "phase", "start_ns", "end_ns"])
    steps = phase[phase["step"] >= 0].groupby("step", as_index=False).agg({"start_ns": "min", "end_ns": "max"})
    comm = pd.DataFrame(
        [
            (op, "0", seq, 0, size, start, end, True, step, name)
            for op, seq, size, start, end, step, name in collectives
        ],
        columns=COLLECTIVE_COLUMNS,
    ).astype({"start_ns": np.int64, "end_ns": np.int64, "closed": bool})
    return RankTrace(
        rank=rank,
        node=node,
        pid=100 + rank,
        report=f"rank_{rank:04d}.sqlite",
        steps=steps.assign(closed=True),
        segments=phase,
        collectives=comm,
        blocked=parts.get("blocked", IntervalSet.union_of(comm["start_ns"], comm["end_ns"])),
        waits=parts.get("waits", pd.DataFrame(columns=WAIT_COLUMNS)),
        osrt=pd.DataFrame(),
        calls=parts.get("calls", pd.DataFrame(columns=["step", "phase", "function", "total_ns"])),
    )


def simulate_run(
    work_ms: Callable[[int, int, str], float],
    *,
    ranks: int = 8,
    ranks_per_node: int = 2,
    steps: int = 30,
    transfer_ms: float = 4.0,
    noise_ms: float = 1.0,
    seed: int = 0,
) -> list[RankTrace]:
    """A run in which each step is data, forward, backward, then one all-reduce within backward that waits for all."""
    noise = np.random.default_rng(seed)
    at = np.zeros(ranks)
    segments: list[list[tuple]] = [[] for _ in range(ranks)]
    comm: list[list[tuple]] = [[] for _ in range(ranks)]
    for step in range(steps):
        begin_backward = np.zeros(ranks)
        for rank in range(ranks):
            for phase in ("data", "forward", "backward"):
                length = max(0.1, work_ms(rank, step, phase) + noise.normal(0, noise_ms)) * MS
                if phase == "backward":
                    begin_backward[rank] = at[rank]
                else:
                    segments[rank].append((step, phase, int(at[rank]), int(at[rank] + length)))
                at[rank] += length
        arrival = at.copy()
        done = arrival.max() + transfer_ms * MS
        for rank in range(ranks):
            segments[rank].append((step, "backward", int(begin_backward[rank]), int(done)))
            comm[rank].append(("all_reduce", step, 4_000_000, int(arrival[rank]), int(done), step, "backward"))
        at[:] = done
    return [make_trace(r, f"node{r // ranks_per_node + 1}", segments[r], comm[r]) for r in range(ranks)]
