"""Who made others wait, for how long, and in which part of the late rank's own work the delay arose.

Arrivals of one synchronising collective, sorted: s_(0) <= ... <= s_(n-1). Between s_(l) and s_(l+1), l+1 ranks wait
for the n-1-l that have not arrived; each of those is charged an equal share. So every second of waiting is charged
exactly once, and a single straggler is charged all of it.

The charge is then shared out over the parts c of the late rank's work since the previous synchronisation, in proportion
to d_c = max(0, t_c(late) - median over ranks of t_c): delay costs after Boehme, Geimer, Arnold, Voigtlaender and Wolf,
"Identifying the root causes of wait states in large-scale parallel applications" (2016), with the median in place of
the waiter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.trace import RankTrace
from hpcmm.analysis.waitpid import WITHIN_STEP

Floats = npt.NDArray[np.float64]

BETWEEN_STEPS = "between steps"
UNEXPLAINED = "unexplained"
SUBPROCESS = "subprocess in "
"""Start of the name of a part in which the step thread waited for a child process; the phase follows."""


@dataclass(frozen=True, slots=True)
class GroupArrivals:
    """The complete, synchronising instances of one group. Matrices have shape (instances, members)."""

    members: npt.NDArray[np.intp]
    """Trace of each column."""
    start: Floats
    end: Floats
    wait: Floats
    exposed: Floats
    step: npt.NDArray[np.int64]
    """Step that each rank was in when it arrived."""
    blamable: npt.NDArray[np.bool_]


def group_arrivals(rows: pd.DataFrame) -> list[GroupArrivals]:
    """Matrices of every group, instances in the order of their first arrival."""
    found = []
    for _, group in rows[rows["synchronising"].astype(bool)].groupby("group", sort=True):
        tables = {
            name: group.pivot_table(index="instance", columns="trace", values=name, aggfunc="first")
            for name in ("start_ns", "end_ns", "wait_ns", "exposed_wait_ns", "step")
        }
        order = np.argsort(tables["start_ns"].min(axis=1).to_numpy(), kind="stable")
        matrix = {name: table.to_numpy(np.float64)[order] for name, table in tables.items()}
        blamable = group.groupby("instance")["blamable"].first().to_numpy(bool)[order]
        found.append(
            GroupArrivals(
                members=tables["start_ns"].columns.to_numpy(np.intp),
                start=matrix["start_ns"],
                end=matrix["end_ns"],
                wait=matrix["wait_ns"],
                exposed=matrix["exposed_wait_ns"],
                step=matrix["step"].astype(np.int64),
                blamable=blamable,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Charges:
    """Shape (instances, members) each, nanoseconds: waiting of others charged to a rank, and its own excess time."""

    caused: Floats
    own: Floats


def charge(arrivals: GroupArrivals) -> Charges:
    """Charge each instance's exposed waiting to the ranks that arrived late.

    ``own`` is the time from the (lower) median arrival to the rank's own, no earlier than its previous arrival, scaled
    by how much of the instance's waiting was exposed: had the rank been like its peers, it would have gained that, too.
    """
    start = arrivals.start
    count = start.shape[1]
    order = np.argsort(start, axis=1, kind="stable")
    arrived = np.take_along_axis(start, order, axis=1)
    waited = arrived[:, -1:] - arrived
    exposed = np.take_along_axis(np.where(arrivals.blamable[:, None], arrivals.exposed, 0.0), order, axis=1)
    share = np.divide(exposed, waited, out=np.zeros_like(exposed), where=waited > 0).clip(0.0, 1.0)
    missing = np.arange(count - 1, 0, -1)
    cost = np.concatenate((np.zeros((len(start), 1)), np.cumsum(np.diff(arrived, axis=1) / missing, axis=1)), axis=1)
    # What rank j is charged by all earlier ranks i is the sum of share_i * (cost_j - cost_i).
    before = np.concatenate((np.zeros((len(start), 1)), np.cumsum(share, axis=1)[:, :-1]), axis=1)
    before_cost = np.concatenate((np.zeros((len(start), 1)), np.cumsum(share * cost, axis=1)[:, :-1]), axis=1)
    caused = np.empty_like(start)
    np.put_along_axis(caused, order, cost * before - before_cost, axis=1)
    median = arrived[:, [(count - 1) // 2]]
    previous = np.concatenate((np.full((1, count), -np.inf), start[:-1]))
    total = waited.sum(axis=1, keepdims=True)
    scale = np.divide(exposed.sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0).clip(
        0.0, 1.0
    )
    own = np.maximum(start - np.maximum(median, previous), 0.0) * scale
    return Charges(caused, own)


def waited_for(arrivals: GroupArrivals, traces: int) -> Floats:
    """Exposed waiting of each rank (row) for each other rank (column), shape (traces, traces), ns."""
    matrix = np.zeros((traces, traces))
    start, members = arrivals.start, arrivals.members
    exposed = np.where(arrivals.blamable[:, None], arrivals.exposed, 0.0)
    count = len(members)
    chunk = max(1, 4_000_000 // (count * count))
    for first in range(0, len(start), chunk):
        part = start[first : first + chunk]
        order = np.argsort(part, axis=1, kind="stable")
        arrived = np.take_along_axis(part, order, axis=1)
        steps = np.diff(arrived, axis=1) / np.arange(count - 1, 0, -1)
        sorted_cost = np.concatenate((np.zeros((len(part), 1)), np.cumsum(steps, axis=1)), axis=1)
        cost = np.empty_like(part)
        np.put_along_axis(cost, order, sorted_cost, axis=1)
        waited = part.max(axis=1, keepdims=True) - part
        share = np.divide(exposed[first : first + chunk], waited, out=np.zeros_like(part), where=waited > 0).clip(
            0.0, 1.0
        )
        pair = np.maximum(cost[:, None, :] - cost[:, :, None], 0.0) * share[:, :, None]
        matrix[np.ix_(members, members)] += pair.sum(axis=0)
    return matrix


@dataclass(frozen=True, slots=True)
class WorkParts:
    """What each rank did outside exposed communication: for each part a set of intervals per trace."""

    names: tuple[str, ...]
    sets: tuple[tuple[IntervalSet, ...], ...]
    """Indexed [trace][part]."""

    def between(self, trace: int, start_ns: Floats, end_ns: Floats) -> Floats:
        """Time in each part within windows, shape (windows, parts)."""
        start, end = start_ns.astype(np.int64), end_ns.astype(np.int64)
        return np.column_stack([part.covered_within(start, end) for part in self.sets[trace]]).astype(np.float64)


def work_parts(traces: Sequence[RankTrace]) -> WorkParts:
    """Phases, without exposed communication and with waiting for child processes set apart; and time between steps."""
    phases = sorted({str(phase) for trace in traces for phase in trace.segments["phase"].unique()})
    names = (*phases, *(SUBPROCESS + phase for phase in phases), BETWEEN_STEPS)
    return WorkParts(names, tuple(_parts_of(trace, phases) for trace in traces))


def exposed_communication(trace: RankTrace) -> IntervalSet:
    """When the step thread of ``trace`` could do nothing but wait for communication."""
    closed = trace.collectives[trace.collectives["closed"]]
    flight = IntervalSet.union_of(closed["start_ns"], closed["end_ns"])
    return flight if trace.blocked is None else flight.intersect(trace.blocked)


def _parts_of(trace: RankTrace, phases: list[str]) -> tuple[IntervalSet, ...]:
    communication = exposed_communication(trace)
    within = trace.waits[trace.waits["verdict"] == WITHIN_STEP]
    children = IntervalSet.union_of(within["start_ns"], within["end_ns"])
    own, subprocesses = [], []
    for phase in phases:
        segments = trace.segments[trace.segments["phase"] == phase]
        work = IntervalSet.union_of(segments["start_ns"], segments["end_ns"]).subtract(communication)
        own.append(work.subtract(children))
        subprocesses.append(work.intersect(children))
    start, end = trace.steps["start_ns"].to_numpy(np.int64), trace.steps["end_ns"].to_numpy(np.int64)
    gaps = IntervalSet.union_of(end[:-1], start[1:]).subtract(communication)
    outside = trace.segments[trace.segments["step"] == OUTSIDE]
    gaps = gaps.subtract(IntervalSet.union_of(outside["start_ns"], outside["end_ns"]))
    return (*own, *subprocesses, gaps)


def window_starts(arrivals: GroupArrivals) -> Floats:
    """For each arrival, the end of the last instance that all ranks had behind them when they arrived.

    Shape as ``start``. Asynchronous collectives overlap, so that is not always the one before. NaN at the first.
    """
    instances, _ = arrivals.start.shape
    reach = np.maximum.accumulate(arrivals.end, axis=0)
    done = np.stack(
        [
            np.searchsorted(reach[:, column], arrivals.start[:, column], side="right")
            for column in range(reach.shape[1])
        ],
        axis=1,
    ).min(axis=1)
    done = np.minimum(done, np.arange(instances))
    first = np.full((1, reach.shape[1]), np.nan)
    begins: Floats = np.concatenate((first, reach))[done]
    return begins


def attribute(arrivals: GroupArrivals, charges: Charges, parts: WorkParts) -> Floats:
    """Share each charge out over the parts of the late rank's work: shape (instances, members, parts + 1).

    The last column is what no part explains: the late rank did nothing for longer than its peers.
    """
    begin = window_starts(arrivals)
    unknown = np.isnan(begin)
    begin = np.where(unknown, arrivals.start, begin)
    time = np.stack(
        [parts.between(int(trace), begin[:, j], arrivals.start[:, j]) for j, trace in enumerate(arrivals.members)],
        axis=1,
    )
    excess = np.maximum(time - np.median(time, axis=1, keepdims=True), 0.0)
    whole = excess.sum(axis=2, keepdims=True)
    fraction = np.divide(excess, whole, out=np.zeros_like(excess), where=whole > 0)
    fraction = np.concatenate((fraction, np.where(whole > 0, 0.0, 1.0)), axis=2)
    shares: Floats = (charges.caused + charges.own)[:, :, None] * fraction
    return shares


def losses_by_step(
    traces: Sequence[RankTrace], rows: pd.DataFrame, parts: WorkParts, steps: npt.NDArray[np.int64]
) -> Floats:
    """Loss that each rank's parts cause in each step: shape (steps, traces, parts + 1), ns, mean over all ranks.

    A delay counts in the step in which the late rank arrived. Collectives outside ``steps`` are left out.
    """
    total = np.zeros((len(steps), len(traces), len(parts.names) + 1))
    for arrivals in group_arrivals(rows):
        shares = attribute(arrivals, charge(arrivals), parts)
        for column, trace in enumerate(arrivals.members):
            position = np.searchsorted(steps, arrivals.step[:, column])
            known = (position < len(steps)) & (steps[np.minimum(position, len(steps) - 1)] == arrivals.step[:, column])
            np.add.at(total, (position[known], int(trace)), shares[known, column])
    return total / max(len(traces), 1)
