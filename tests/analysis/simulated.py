"""Runs made of arithmetic: ranks whose steps, collectives and waits follow from how long each phase takes."""

from collections.abc import Callable
from dataclasses import replace

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


Group = Callable[[int], str]
"""Name of the group that a rank belongs to; an empty one if the rank takes no part."""


def everyone(_rank: int) -> str:
    return "0"


def simulate_program(
    program: list[str | tuple[str, Group]],
    work_ms: Callable[[int, int, str], float],
    *,
    ranks: int = 8,
    ranks_per_node: int = 2,
    steps: int = 20,
    transfer_ms: float = 4.0,
    noise: float = 0.05,
    pauses: float = 0.0,
    seed: int = 0,
    size: Callable[[int, int], int] | None = None,
) -> list[RankTrace]:
    """A run whose step is ``program``: names of phases that take ``work_ms``, and synchronisations of groups.

    A synchronisation, (phase, group), belongs to the phase that came before it. Work varies from time to time by a
    factor that is lognormal with deviation ``noise``, and with chance ``pauses`` stands still for 20 to 200 ms.
    """
    dice = np.random.default_rng(seed)
    at = np.zeros(ranks)
    segments: list[list[tuple]] = [[] for _ in range(ranks)]
    comm: list[list[tuple]] = [[] for _ in range(ranks)]
    sequence: dict[str, int] = {}
    for step in range(steps):
        at += np.array([work_ms(rank, step, "between") for rank in range(ranks)]) * MS
        for item in program:
            begin = at.copy()
            if isinstance(item, str):
                wanted = np.array([work_ms(rank, step, item) for rank in range(ranks)])
                length = wanted * dice.lognormal(0.0, noise, ranks)
                length += np.where(dice.random(ranks) < pauses, dice.uniform(20, 200, ranks), 0.0)
                at += np.maximum(length, 0.01) * MS
                phase = item
            else:
                phase, group_of = item
                groups: dict[str, list[int]] = {}
                for rank in range(ranks):
                    if group_of(rank):
                        groups.setdefault(group_of(rank), []).append(rank)
                for group, members in groups.items():
                    number = sequence[group] = sequence.get(group, -1) + 1
                    arrival = at[members].copy()
                    done = arrival.max() + transfer_ms * MS * dice.lognormal(0.0, 0.1)
                    at[members] = done + dice.uniform(0, 0.05 * MS, len(members))
                    for rank, start in zip(members, arrival, strict=True):
                        name = ("all_reduce", group, number, 4_000_000)
                        comm[rank].append((*name, int(start), int(at[rank]), step, phase))
            for rank in range(ranks):
                if at[rank] > begin[rank]:
                    segments[rank].append((step, phase, int(begin[rank]), int(at[rank])))
    traces = []
    for rank in range(ranks):
        rows = [
            (op, number, bytes_, start, end, step, name) for op, _, number, bytes_, start, end, step, name in comm[rank]
        ]
        trace = make_trace(rank, f"node{rank // ranks_per_node + 1}", segments[rank], rows)
        trace.collectives["group"] = [row[1] for row in comm[rank]]
        if size is not None:
            sizes = [(step, "forward", size(rank, step)) for step in range(steps)]
            trace = replace(trace, batches=pd.DataFrame(sizes, columns=["step", "phase", "size"]))
        traces.append(trace)
    return traces
