"""Stalls: a process that stood still, communication that did, and the node behind a slow link.

A process that is stopped (SIGSTOP, a debugger, a freezer, a machine that swaps) while it is in a collective looks like
a slow transfer to all others. But no thread of it enters or leaves any OS call meanwhile, though some do so all the
time: that tells the two apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis.delay_costs import Floats, exposed_communication
from hpcmm.analysis.findings import CAUSES, MEDIUM, AnalysisContext, Finding
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.osrt import STEP_THREAD
from hpcmm.analysis.phases import StepTimes
from hpcmm.analysis.trace import WORKER, RankTrace


def find_process_stalls(
    traces: Sequence[RankTrace], steps: StepTimes, collectives: pd.DataFrame
) -> list[tuple[int, Floats]]:
    """Traces whose process stood still within a collective, and the seconds that each such step lost by it.

    The loss, shape (steps,), is a mean over ranks: what of the stall the ranks spent in exposed transfer.
    """
    found: list[tuple[int, Floats]] = []
    if not any(trace.stalled is not None and len(trace.stalled) for trace in traces):
        return found
    exposed = [exposed_communication(trace) for trace in traces]
    for index, trace in enumerate(traces):
        if trace.stalled is None or not len(trace.stalled):
            continue
        own = collectives[(collectives["trace"] == index) & collectives["closed"].astype(bool)]
        inside = _began_within(trace.stalled, own)
        if not len(inside):
            continue
        shared = sum(
            (_by_step(inside.intersect(mine), trace.steps, steps) for mine in exposed), np.zeros(len(steps.numbers))
        )
        lost = np.asarray(shared / len(traces), dtype=np.float64)
        if lost.any():
            found.append((index, lost))
    return found


def _began_within(stalled: IntervalSet, collectives: pd.DataFrame) -> IntervalSet:
    """The stalls that began while a collective of the process was in flight, each cut to that collective's end."""
    start, end = collectives["start_ns"].to_numpy(np.int64), collectives["end_ns"].to_numpy(np.int64)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order]) if len(end) else end
    index = np.searchsorted(start, stalled.start_ns, side="right") - 1
    # Collectives overlap: whether one is in flight tells the latest end of all that began before.
    within = (index >= 0) & (np.append(reach, 0)[index] > stalled.start_ns)
    bound = np.append(reach, 0)[index]
    return IntervalSet(stalled.start_ns[within], np.minimum(stalled.end_ns, bound)[within])


def _by_step(intervals: IntervalSet, own_steps: pd.DataFrame, steps: StepTimes) -> Floats:
    bounds = own_steps.set_index("step")[["start_ns", "end_ns"]].reindex(steps.numbers).to_numpy(np.float64)
    there = np.isfinite(bounds).all(axis=1)
    found = np.zeros(len(steps.numbers))
    found[there] = (
        intervals.covered_within(bounds[there, 0].astype(np.int64), bounds[there, 1].astype(np.int64)) / NS_PER_S
    )
    return found


TIMES_USUAL = 3.0
"""A step is interrupted when its exposed transfer is so many times the median step's ..."""
LEAST_S = 0.3
"""... and exceeds it by so much: below this TCP does not try again, and busy processors explain as much."""
MOST_STEPS = 0.2
"""... which happens in at most this share of the steps; else it is how the network is."""


def find_network_stalls(context: AnalysisContext, stopped_s: Floats) -> list[Finding]:
    """One finding, or none. ``stopped_s`` by step, a mean over ranks, is lost to processes that stood still."""
    rows, numbers = context.rows, context.steps.numbers
    unseen = context.expected_ranks > sum(len(trace.steps) > 0 for trace in context.traces)
    if rows.empty or unseen:
        return []
    inside = rows[rows["step"].isin(numbers)]
    total = inside.groupby("step")["exposed_transfer_ns"].sum().reindex(numbers).fillna(0.0).to_numpy(np.float64)
    transfer = np.maximum(total / NS_PER_S / len(context.traces) - stopped_s, 0.0)
    usual = float(np.median(transfer))
    hit = (transfer > TIMES_USUAL * usual) & (transfer > usual + LEAST_S)
    if not hit.any() or hit.sum() > max(1.0, MOST_STEPS * len(hit)):
        return []
    lost = np.where(hit, transfer - usual, 0.0)
    worst = context.worst_step(lost)
    there = inside[inside["step"] == worst]
    longest = there.iloc[int(there["exposed_transfer_ns"].to_numpy(np.float64).argmax())]
    steps = ", ".join(map(str, numbers[hit][:5]))
    told = (
        f"all ranks wait for bytes in {int(hit.sum())} of {len(hit)} steps ({steps}), up to {float(lost.max()):.3g} s "
        f"longer than in the usual step; most of it in one {longest['op']}: a link or a network card failed for a while"
    )
    pointer = f"collectives: step={worst} op={longest['op']} group={longest['group']} sequence={longest['sequence']}"
    phase = str(longest["phase"])
    mean = float(lost.mean())
    return [Finding("interruption", CAUSES["interruption"], mean, None, "", phase, told, MEDIUM, pointer, worst)]


RECEIVING = frozenset({"recv", "recvfrom", "recvmsg", "readv"})
TRICKLE = 3.0
"""A rank's data trickle in when it receives so many times as often as the lower quartile of ranks."""
MIN_CALLS = 20


def slow_node(traces: Sequence[RankTrace]) -> tuple[str, str]:
    """The node behind a slow link and what shows it, in words; both empty if nothing does."""
    calls = np.array([_receives(trace) for trace in traces], dtype=np.float64)
    usual = float(np.quantile(calls, 0.25)) if len(calls) else 0.0
    if usual < MIN_CALLS:
        return "", ""
    trickling = calls > TRICKLE * usual
    order = np.argsort([trace.rank for trace in traces], kind="stable")
    pairs = zip(order, np.roll(order, -1), strict=True)
    slow_hops = {
        (traces[here].node, traces[there].node)
        for here, there in pairs
        if trickling[here] and trickling[there] and traces[here].node != traces[there].node
    }
    hops = Counter(node for pair in slow_hops for node in set(pair))
    most = [node for node, count in hops.items() if count == max(hops.values()) and count > 1]
    if len(most) != 1:
        return "", ""
    neighbours = sorted({node for pair in slow_hops if most[0] in pair for node in pair} - {most[0]})
    if len(neighbours) < 2:
        return "", ""
    ranks = ", ".join(str(trace.rank) for trace, slow in zip(traces, trickling, strict=True) if slow)
    return most[0], (
        f"data trickle in at ranks {ranks}, which receive {TRICKLE:.0f} to {float(calls.max()) / usual:.0f} times as "
        f"often as others: the hops between {most[0]} and its neighbours {' and '.join(neighbours)} are slow"
    )


def _receives(trace: RankTrace) -> int:
    """How often the process's own threads, other than the one that trains, have received."""
    table = trace.osrt
    if table.empty:
        return 0
    mine = (table["process_role"] == WORKER) & (table["thread_role"] != STEP_THREAD) & table["function"].isin(RECEIVING)
    return int(table.loc[mine, "calls"].sum())
