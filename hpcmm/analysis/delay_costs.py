"""Who made others wait, for how long, and in which part of the late rank's own work the delay arose.

Arrivals of one synchronising collective, sorted: s_(0) <= ... <= s_(n-1). Between s_(l) and s_(l+1), l+1 ranks wait
for the n-1-l that have not arrived; each of those is charged an equal share. So every second of waiting is charged
exactly once, and a single straggler is charged all of it.

The charge is then shared out over the parts c of the late rank's work since the previous synchronisation, in proportion
to d_c = max(0, t_c(late) - median over ranks of t_c): delay costs after Boehme, Geimer, Arnold, Voigtlaender and Wolf,
"Identifying the root causes of wait states in large-scale parallel applications" (2016), with the median in place of
the waiter. A delay that was itself caused by waiting in another group is passed back by
:mod:`hpcmm.analysis.wait_chains`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.trace import OUTSIDE, WITHIN_STEP, DeviceWork, RankTrace

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_CHUNK = 1024
"""Instances whose median is taken at once."""

BETWEEN_STEPS = "between steps"
UNEXPLAINED = "unexplained"
SUBPROCESS = "subprocess in "
"""Start of the name of a part in which the step thread waited for a child process; the phase follows."""


@dataclass(frozen=True, slots=True)
class GroupArrivals:
    """Complete instances of one group in which every rank needs all others; shapes (instances, members)."""

    members: npt.NDArray[np.intp]
    """Trace of each column."""
    start: Floats
    end: Floats
    wait: Floats
    exposed: Floats
    step: npt.NDArray[np.int64]
    """Step that each rank was in when it arrived."""
    blamable: npt.NDArray[np.bool_]


_ARRIVAL_COLUMNS = [
    "group",
    "trace",
    "instance",
    "start_ns",
    "end_ns",
    "wait_ns",
    "exposed_wait_ns",
    "step",
    "blamable",
]


def group_arrivals(rows: pd.DataFrame) -> list[GroupArrivals]:
    """Matrices of every group, instances in the order of their first arrival."""
    # A copy of all columns would take as much again as the rows themselves.
    needed = rows[_ARRIVAL_COLUMNS][rows["needs_all"].astype(bool)]
    return [_arrivals_of(group) for _, group in needed.groupby("group", sort=True)]


def _arrivals_of(group: pd.DataFrame) -> GroupArrivals:
    members, column = np.unique(group["trace"].to_numpy(np.intp), return_inverse=True)
    _, row = np.unique(group["instance"].to_numpy(np.int64), return_inverse=True)
    shape = (int(row.max()) + 1, len(members))

    def matrix(name: str) -> Floats:
        filled = np.full(shape, np.nan)
        filled[row, column] = group[name].to_numpy(np.float64)
        return filled

    start = matrix("start_ns")
    order = np.argsort(start.min(axis=1), kind="stable")
    return GroupArrivals(
        members=members,
        start=start[order],
        end=matrix("end_ns")[order],
        wait=matrix("wait_ns")[order],
        exposed=matrix("exposed_wait_ns")[order],
        step=matrix("step")[order].astype(np.int64),
        blamable=matrix("blamable")[order, 0].astype(np.bool_),
    )


@dataclass(frozen=True, slots=True)
class Charges:
    """Shape (instances, members) each, nanoseconds: waiting of others charged to a rank, and its own excess time."""

    caused: Floats
    own: Floats
    late_from: Floats
    """When its own excess time begins; it ends with its arrival, and there is none where that comes first."""
    scale: Floats
    """How much of the own excess time counts, in [0, 1]."""


def attribute_wait(arrivals: GroupArrivals) -> Charges:
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
    # Between two neighbouring arrivals every rank that is still missing is charged an equal share of a waiting rank's
    # time; ``cost`` adds these shares up.
    missing = np.arange(count - 1, 0, -1)
    cost = np.concatenate((np.zeros((len(start), 1)), np.cumsum(np.diff(arrived, axis=1) / missing, axis=1)), axis=1)
    # What rank j is charged by all earlier ranks i is the sum of share_i * (cost_j - cost_i).
    before = np.concatenate((np.zeros((len(start), 1)), np.cumsum(share, axis=1)[:, :-1]), axis=1)
    before_cost = np.concatenate((np.zeros((len(start), 1)), np.cumsum(share * cost, axis=1)[:, :-1]), axis=1)
    caused = np.empty_like(start)
    np.put_along_axis(caused, order, cost * before - before_cost, axis=1)
    # Lateness begins where a usual rank would have arrived, but a rank cannot be late before its own last arrival.
    median = arrived[:, [(count - 1) // 2]]
    previous = np.concatenate((np.full((1, count), -np.inf), start[:-1]))
    total = waited.sum(axis=1, keepdims=True)
    scale = np.divide(exposed.sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0).clip(
        0.0, 1.0
    )
    late_from = np.maximum(median, previous)
    own = np.maximum(start - late_from, 0.0) * scale
    return Charges(caused, own, late_from, np.broadcast_to(scale, start.shape))


def waited_for(arrivals: GroupArrivals, traces: int) -> Floats:
    """Exposed waiting of each rank (row) for each other rank (column), shape (traces, traces), ns."""
    matrix = np.zeros((traces, traces))
    start, members = arrivals.start, arrivals.members
    exposed = np.where(arrivals.blamable[:, None], arrivals.exposed, 0.0)
    count = len(members)
    chunk = max(1, 4_000_000 // (count * count))
    # The matrix of all pairs of all instances would not fit into memory for many ranks.
    for first in range(0, len(start), chunk):
        part = start[first : first + chunk]
        order = np.argsort(part, axis=1, kind="stable")
        arrived = np.take_along_axis(part, order, axis=1)
        # As in attribute_wait, but kept apart by who waited.
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
    step_starts: tuple[Mapping[int, int], ...] = ()
    """Of each trace, when each of its steps began."""
    communication: tuple[IntervalSet | None, ...] = ()
    """Of each trace, when its GPUs did nothing but communicate; None if that is not known."""

    def starving(self, traces: Sequence[RankTrace]) -> WorkParts:
        """The same where a rank's GPUs had nothing to do meanwhile; all of it if no GPU activity was traced."""
        sets = [
            own if trace.starved is None else tuple(part.intersect(trace.starved) for part in own)
            for trace, own in zip(traces, self.sets, strict=True)
        ]
        return replace(self, sets=tuple(sets))

    def between(self, trace: int, start_ns: Floats, end_ns: Floats) -> Floats:
        """Time in each part within windows, shape (windows, parts)."""
        start, end = start_ns.astype(np.int64), end_ns.astype(np.int64)
        return np.column_stack([part.covered_within(start, end) for part in self.sets[trace]]).astype(np.float64)


def work_parts(traces: Sequence[RankTrace]) -> WorkParts:
    """Phases, without exposed communication and with waiting for child processes set apart; and time between steps.

    While the GPUs of a rank run something, that is its work, in the phase that launched it: a host that runs ahead and
    waits for its GPU at the end of the step would have all of it there. What the host does counts while they do not.
    If the records of any rank's GPUs are missing, ranks can be compared by their hosts alone; if the calls are that
    launched their work, by how long all of it takes.
    """
    stepping = [trace for trace in traces if len(trace.steps)]
    if any(trace.device_work is None or trace.gpu_missing for trace in stepping):
        traces = [replace(trace, device_work=None) for trace in traces]
    elif lack_launches(traces):
        traces = [replace(each, device_work=each.device_work and each.device_work.without_phases()) for each in traces]
    launched = {name for trace in traces if trace.device_work for name in trace.device_work.by_phase if name}
    phases = sorted(launched.union(*(trace.segments["phase"].unique() for trace in traces)))
    names = (*phases, *(SUBPROCESS + phase for phase in phases), BETWEEN_STEPS)
    columns = [(trace.steps["step"].tolist(), trace.steps["start_ns"].tolist()) for trace in traces]
    starts = tuple(dict(zip(steps, at, strict=True)) for steps, at in columns)
    communication = tuple(None if each.device_work is None else each.device_work.communication for each in traces)
    return WorkParts(names, tuple(_parts_of(trace, phases) for trace in traces), starts, communication)


def lack_launches(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Those whose GPUs' work the recorded calls do not tell by phase."""
    return [trace for trace in traces if len(trace.steps) and trace.device_work and trace.device_work.lacks_launches]


def exposed_communication(trace: RankTrace) -> IntervalSet:
    """When the step thread of ``trace`` could do nothing but wait for communication."""
    closed = trace.collectives[trace.collectives["closed"]]
    flight = IntervalSet.union_of(closed["start_ns"], closed["end_ns"])
    return flight if trace.blocked is None else flight.intersect(trace.blocked)


def _parts_of(trace: RankTrace, phases: list[str]) -> tuple[IntervalSet, ...]:
    communication = exposed_communication(trace)
    device = DeviceWork({}, IntervalSet.empty()) if trace.device_work is None else trace.device_work
    not_host = IntervalSet.union(communication, device.busy)
    within = trace.waits[trace.waits["verdict"] == WITHIN_STEP]
    children = IntervalSet.union_of(within["start_ns"], within["end_ns"])
    own, subprocesses = [], []
    starts, ends = trace.segments["start_ns"].to_numpy(np.int64), trace.segments["end_ns"].to_numpy(np.int64)
    places = trace.segments.groupby("phase", sort=False).indices
    for phase in phases:
        at = places.get(phase, np.empty(0, dtype=np.intp))
        work = IntervalSet.union_of(starts[at], ends[at]).subtract(not_host)
        own.append(IntervalSet.union(work.subtract(children), device.by_phase.get(phase, IntervalSet.empty())))
        subprocesses.append(work.intersect(children))
    start, end = trace.steps["start_ns"].to_numpy(np.int64), trace.steps["end_ns"].to_numpy(np.int64)
    # What lies between steps is work, too, unless it is communication or a phase of its own such as a checkpoint.
    gaps = IntervalSet.union_of(end[:-1][trace.follows], start[1:][trace.follows]).subtract(not_host)
    outside = trace.segments[trace.segments["step"] == OUTSIDE]
    gaps = gaps.subtract(IntervalSet.union_of(outside["start_ns"], outside["end_ns"]))
    return (*own, *subprocesses, IntervalSet.union(gaps, device.by_phase.get("", IntervalSet.empty())))


TAIL_NS = 100_000.0
"""A GPU that does nothing else for half of the last 0.1 ms of a collective has waited for its end."""


def awaited(arrivals: GroupArrivals, parts: WorkParts) -> npt.NDArray[np.bool_]:
    """Which instances the computation of all members waited for, shape (instances,).

    GPUs exchange the gradients of a bucket while they compute those of the next one. Who computes on is not in step
    with the others after it. Instances of ranks whose GPUs are not known count; so do all, if none was waited for.
    """
    found = np.ones(len(arrivals.start), dtype=np.bool_)
    for column, trace in enumerate(arrivals.members.tolist()):
        alone = parts.communication[trace] if parts.communication else None
        if alone is not None:
            end = arrivals.end[:, column]
            begin = np.maximum(arrivals.start[:, column], end - TAIL_NS)
            found &= alone.covered_within(begin.astype(np.int64), end.astype(np.int64)) >= (end - begin) / 2
    return found if found.any() else np.ones_like(found)


def window_starts(arrivals: GroupArrivals, in_step: npt.NDArray[np.bool_]) -> Floats:
    """For each arrival, the end of the last instance that all ranks had behind them when they arrived.

    Shape as ``start``. Asynchronous collectives overlap, so that is not always the one before. NaN at the first.
    ``in_step`` (instances,): after which instances ranks are in step, as :func:`awaited` tells.
    """
    instances, _ = arrivals.start.shape
    # An instance is behind a rank once it and all before it have ended there.
    reach = np.maximum.accumulate(arrivals.end, axis=0)
    done = np.stack(
        [
            np.searchsorted(reach[:, column], arrivals.start[:, column], side="right")
            for column in range(reach.shape[1])
        ],
        axis=1,
    ).min(axis=1)
    # A window begins before its own instance, whatever later ones that overlap it say.
    done = np.minimum(done, np.arange(instances))
    last = np.maximum.accumulate(np.where(in_step, np.arange(1, instances + 1), 0))
    done = np.append(0, last)[done]
    first = np.full((1, reach.shape[1]), np.nan)
    begins: Floats = np.concatenate((first, reach))[done]
    return begins


def excess_work(arrivals: GroupArrivals, parts: WorkParts, begin: Floats) -> Singles:
    """By how much each part of a rank's work since the last synchronisation exceeds the median over the group's ranks.

    Shape (instances, members, parts), ns. ``begin`` is as :func:`window_starts` gives it. If no synchronisation came
    before, the work counts since all had begun the step; 0 outside of steps.
    """
    begin = begin.copy()
    for instance in np.flatnonzero(np.isnan(begin).any(axis=1)):
        begin[instance] = np.minimum(_all_began(arrivals, int(instance), parts), arrivals.start[instance])
    # Of 64 ranks with thousands of collectives this is the largest array of all: single precision, and one copy.
    excess = np.empty((*begin.shape, len(parts.names)), dtype=np.float32)
    for column, trace in enumerate(arrivals.members):
        excess[:, column] = parts.between(int(trace), begin[:, column], arrivals.start[:, column])
    for first in range(0, len(excess), _CHUNK):
        chunk = excess[first : first + _CHUNK]
        chunk -= np.median(chunk, axis=1, keepdims=True)
        np.maximum(chunk, 0.0, out=chunk)
    return excess


def _all_began(arrivals: GroupArrivals, instance: int, parts: WorkParts) -> float:
    """When the last rank of an instance began the step of its arrival; infinite if that is not known."""
    steps = zip(arrivals.members.tolist(), arrivals.step[instance].tolist(), strict=True)
    if not parts.step_starts:
        return math.inf
    return max(float(parts.step_starts[trace].get(step, math.inf)) for trace, step in steps)


def fractions(excess: Singles) -> Singles:
    """``excess`` as shares of its sum over the last axis; a column is added for what nothing explains."""
    whole = excess.sum(axis=-1, keepdims=True)
    found = np.zeros((*excess.shape[:-1], excess.shape[-1] + 1), dtype=np.float32)
    np.divide(excess, whole, out=found[..., :-1], where=whole > 0)
    found[..., -1:] = whole <= 0
    return found
