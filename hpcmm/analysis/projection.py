"""NVTX ranges projected onto the GPU: what each range launched, and when that ran.

A range owns the GPU activities whose launching call begins within it, on its own thread. Every enclosing range owns an
activity; the one that began last, its innermost, also counts it as its own time. The ranges of hpcmm's domain own what
any thread of the process launches meanwhile, since PyTorch launches the backward pass from threads of its own. Any
other range owns what another thread launches if its own thread waits for that (see :func:`waited_for`).

In the order of the launches on one thread the activities of a range are one stretch [low, high), whether or not ranges
nest, so that envelope, count and innermost range follow from minima and maxima over stretches: O((n + m) log m) for n
ranges and m activities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, highest_covering
from hpcmm.analysis.range_names import without_counters
from hpcmm.analysis.trace import RankTrace
from hpcmm.annotate import schema
from hpcmm.reports.report import KERNEL, UNKNOWN, CudaEvents

Integers = npt.NDArray[np.int64]

MAX_NAMES = 1000
"""Rows of a process; where names carry numbers the rest are summed under :data:`REST`."""
REST = "(other ranges)"
IN_NO_RANGE, NOT_TRACED = "(in no range)", "(launch not traced)"
"""Rows of what no range owns."""
PAIRS_AT_ONCE = 1 << 22
"""Ranges times their activities that are expanded together, to bound the memory."""
MAX_PAIRS = 1 << 28
"""Ranges times their activities that are expanded at all; only nesting some thousand deep exceeds it."""

PROJECTION_COLUMNS = [
    "domain", "range", "calls", "open_calls", "host_ns", "gpu_envelope_ns", "gpu_union_ns", "gpu_self_ns", "kernels",
    "copies",
]  # fmt: skip


class Stretches(NamedTuple):
    """For each range the activities [low, high) that it owns, as positions in ``order``."""

    order: npt.NDArray[np.intp]
    """Activities with a known launch, sorted by lane and launch."""
    low: npt.NDArray[np.intp]
    high: npt.NDArray[np.intp]


class Projection(NamedTuple):
    """Arrays by range, in nanoseconds; a range that launched nothing has ``owned`` 0, and 0 everywhere else.

    ``union_ns`` is NaN for ranges beyond :data:`MAX_PAIRS`.
    """

    start_ns: Integers
    end_ns: Integers
    union_ns: npt.NDArray[np.float64]
    self_ns: npt.NDArray[np.float64]
    """Union of the activities whose innermost range it is."""
    owned: Integers
    """Activities that it owns."""
    stretches: Stretches


def project(ranges: pd.DataFrame, activities: pd.DataFrame, *, by_thread: bool = True) -> Projection:
    """Project ``ranges`` (start_ns, end_ns, pid, tid) onto ``activities``, as :mod:`hpcmm.reports.cuda` reads both.

    Without ``by_thread`` a range owns what any thread of its process launches.
    """
    start, end = activities["start_ns"].to_numpy(np.int64), activities["end_ns"].to_numpy(np.int64)
    stretches = _own(ranges, activities, by_thread=by_thread)
    start, end = start[stretches.order], end[stretches.order]
    low, high = stretches.low, stretches.high
    some = high > low
    return Projection(
        start_ns=np.where(some, _extreme(start, low, high, np.minimum), 0),
        end_ns=np.where(some, _extreme(end, low, high, np.maximum), 0),
        union_ns=_unions(start, end, low, high),
        self_ns=_self_times(ranges["start_ns"].to_numpy(np.int64), ranges["end_ns"].to_numpy(np.int64), stretches,
                            start, end),
        owned=(high - low).astype(np.int64),
        stretches=stretches,
    )  # fmt: skip


def _own(ranges: pd.DataFrame, activities: pd.DataFrame, *, by_thread: bool) -> Stretches:
    launch = activities["launch_ns"].to_numpy(np.int64)
    known = np.flatnonzero(launch != UNKNOWN)
    lane = _lanes(activities["pid"], activities["launch_tid"], by_thread=by_thread)[known]
    order = np.lexsort((launch[known], lane))
    # Position of (lane, time) in the sorted launches by one search: lanes and times as ranks of what occurs.
    lane, launch = lane[order], launch[known[order]]
    begins = np.concatenate(([True], lane[1:] != lane[:-1]))[: len(lane)]
    lanes = lane[begins]
    times = np.sort(launch)
    width = len(times) + 1
    keys = (np.cumsum(begins) - 1) * width + np.searchsorted(times, launch)
    own = _lanes(ranges["pid"], ranges["tid"], by_thread=by_thread)
    at = np.searchsorted(lanes, own)
    there = at < len(lanes)
    there[there] = lanes[at[there]] == own[there]
    first = np.searchsorted(times, ranges["start_ns"].to_numpy(np.int64), side="left")
    last = np.searchsorted(times, ranges["end_ns"].to_numpy(np.int64), side="right")
    low = np.where(there, np.searchsorted(keys, at * width + first), 0)
    high = np.where(there, np.searchsorted(keys, at * width + last), 0)
    return Stretches(known[order], low, np.maximum(high, low))


def _lanes(pid: pd.Series, tid: pd.Series, *, by_thread: bool) -> Integers:
    process = pid.to_numpy(np.int64) << 24
    return process | tid.to_numpy(np.int64) if by_thread else process


def _extreme(values: Integers, low: npt.NDArray[np.intp], high: npt.NDArray[np.intp], better: np.ufunc) -> Integers:
    """Minimum or maximum of ``values`` over each [low, high), from tables of stretches of 1, 2, 4, ... values."""
    result = np.zeros(len(low), dtype=np.int64)
    length = high - low
    level = np.where(length > 0, np.frexp(np.maximum(length, 1))[1] - 1, -1)
    table = values
    for power in range(int(level.max(initial=-1)) + 1):
        mine = np.flatnonzero(level == power)
        result[mine] = better(table[low[mine]], table[high[mine] - (1 << power)])
        reach = 1 << power
        table = better(table[:-reach], table[reach:]) if len(table) > reach else table[:0]
    return result


def _unions(
    start: Integers, end: Integers, low: npt.NDArray[np.intp], high: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Length of the union of the intervals [low, high) of each range.

    Where each activity of a stretch begins after all before it have ended, as on one stream, the union is the sum.
    Only the other stretches, each once, are expanded.
    """
    if not len(start):
        return np.zeros(len(low))
    total = np.concatenate(([0], np.cumsum(end - start)))
    union = (total[high] - total[low]).astype(np.float64)
    reach = np.maximum.accumulate(end)
    meets = np.concatenate(([False], start[1:] < reach[:-1]))
    meetings = np.concatenate(([0], np.cumsum(meets)))
    inside = np.minimum(low + 1, high)
    mixed = np.flatnonzero(meetings[high] > meetings[inside])
    if len(mixed):
        pairs, which = np.unique(low[mixed] * (len(start) + 1) + high[mixed], return_inverse=True)
        union[mixed] = _expanded_unions(start, end, pairs // (len(start) + 1), pairs % (len(start) + 1))[which]
    return union


def _expanded_unions(
    start: Integers, end: Integers, low: npt.NDArray[np.intp], high: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    union = np.full(len(low), np.nan)
    by_length = np.argsort(high - low, kind="stable")
    size = np.cumsum((high - low)[by_length])
    affordable = by_length[: np.searchsorted(size, MAX_PAIRS, side="right")]
    piece = size[: len(affordable)] // PAIRS_AT_ONCE
    by_start = np.argsort(start, kind="stable")
    rank = np.empty(len(start), dtype=np.int64)
    rank[by_start] = np.arange(len(start))
    for some in np.split(affordable, np.flatnonzero(np.diff(piece)) + 1):
        count = high[some] - low[some]
        owner = np.repeat(np.arange(len(some)), count)
        member = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low[some], count)
        union[some] = _union_by_owner(owner, rank[member], start[by_start], end[by_start], len(some))
    return union


def _union_by_owner(
    owner: Integers, rank: Integers, start: Integers, end: Integers, owners: int
) -> npt.NDArray[np.float64]:
    """Union length by owner of the intervals ``rank``, positions in ``start`` (sorted) and ``end``."""
    if not len(owner):
        return np.zeros(owners)
    key = np.sort(owner * len(start) + rank)
    owner, rank = np.divmod(key, len(start))
    begin, finish = start[rank], end[rank]
    # A running maximum that starts anew with each owner: owners lie one whole span of time apart.
    span = int(end.max() - start[0]) + 1
    wide = owners * span < 1 << 62
    shift = owner * span if wide else owner * np.float64(span)
    reach = np.maximum.accumulate(finish - start[0] + shift) - shift + start[0]
    before = np.concatenate((begin[:1], reach[:-1]))
    before[np.concatenate(([True], owner[1:] != owner[:-1]))] = np.iinfo(np.int64).min
    fresh = np.maximum(finish - np.maximum(begin, before), 0)
    return np.bincount(owner, weights=fresh, minlength=owners).astype(np.float64)


def innermost(range_start_ns: Integers, range_end_ns: Integers, stretches: Stretches) -> Integers:
    """For each activity of ``stretches.order`` the range that owns it and began last, -1 if none does."""
    # Of ranges that begin together the longer one is outside.
    precedence = np.lexsort((-range_end_ns, range_start_ns))
    inner = highest_covering(stretches.low[precedence], stretches.high[precedence], len(stretches.order))
    return np.append(precedence, -1)[inner]


def _self_times(
    range_start: Integers, range_end: Integers, stretches: Stretches, start: Integers, end: Integers
) -> npt.NDArray[np.float64]:
    inner = innermost(range_start, range_end, stretches)
    mine = np.flatnonzero(inner >= 0)
    by_start = np.argsort(start, kind="stable")
    rank = np.empty(len(start), dtype=np.int64)
    rank[by_start] = np.arange(len(start))
    return _union_by_owner(inner[mine], rank[mine], start[by_start], end[by_start], len(range_start))


def waited_for(ranges: pd.DataFrame, activities: pd.DataFrame) -> Integers:
    """For each activity of one process the thread that waits for the one that launched it; UNKNOWN if none is known.

    A thread waits if it is the only other one within a range then, and if it launches nothing itself from the first to
    the last of what the other thread launches within its innermost range. So autograd's thread works for the one that
    called ``backward``.
    """
    launch, thread = activities["launch_ns"].to_numpy(np.int64), activities["launch_tid"].to_numpy(np.int64)
    known = launch != UNKNOWN
    waiting, others = np.full(len(activities), UNKNOWN, dtype=np.int64), np.zeros(len(activities), dtype=np.int64)
    if known.any() and (thread[known] == thread[known][0]).all() and (ranges["tid"] == thread[known][0]).all():
        return waiting
    for tid in ranges["tid"].unique():
        own = ranges[ranges["tid"] == tid]
        around = IntervalSet.union_of(own["start_ns"], own["end_ns"] + 1)
        there = known & (thread != tid) & (around.covered_within(launch, launch + 1) > 0)
        waiting[there] = tid
        others += there
    waiting[others != 1] = UNKNOWN
    for waiter in np.unique(waiting[waiting != UNKNOWN]):
        mine = np.flatnonzero(waiting == waiter)
        own = ranges[ranges["tid"] == waiter]
        stretches = _own(own, activities.iloc[mine].assign(launch_tid=waiter), by_thread=True)
        within = innermost(own["start_ns"].to_numpy(np.int64), own["end_ns"].to_numpy(np.int64), stretches)
        at = mine[stretches.order]
        _, group = np.unique(np.stack((within, thread[at])), axis=1, return_inverse=True)
        times = pd.Series(launch[at]).groupby(group).agg(["min", "max"])
        launches = np.sort(launch[known & (thread == waiter)])
        before, until = (times[key].to_numpy(np.int64) for key in ("min", "max"))
        works = np.searchsorted(launches, until, "right") > np.searchsorted(launches, before, "left")
        waiting[at[works[group]]] = UNKNOWN
    return waiting


def aggregate(events: CudaEvents, pid: int) -> pd.DataFrame:
    """What the ranges of each name of process ``pid`` launched, sums over their calls (PROJECTION_COLUMNS).

    Most GPU time first. Of ranges within one of their own name only the outermost counts. What no range owns has rows
    of its own, IN_NO_RANGE and NOT_TRACED.
    """
    ranges = events.ranges[events.ranges["pid"] == pid]
    activities = events.activities[events.activities["pid"] == pid].reset_index(drop=True)
    if ranges.empty:
        return pd.DataFrame(columns=PROJECTION_COLUMNS)
    kernel = (activities["kind"] == KERNEL).to_numpy()
    ours = (ranges["domain"] == schema.DOMAIN).to_numpy()
    owned = np.zeros(len(activities), dtype=np.bool_)
    parts = [_calls(ranges[ours], project(ranges[ours], activities, by_thread=False), kernel, owned)]
    others = ranges[~ours]
    waiting = waited_for(others, activities)
    moved = activities.assign(launch_tid=np.where(waiting == UNKNOWN, activities["launch_tid"], waiting))
    mine = project(others, moved)
    twice = _owned_by_thread(others, activities) & (waiting != UNKNOWN)
    if twice.any():  # autograd's thread has ranges of its own, which own what they launched, and more closely
        both = pd.concat([activities, moved[twice]], ignore_index=True)
        inner = moved.assign(launch_tid=np.where(twice, activities["launch_tid"], moved["launch_tid"]))
        mine = project(others, both)._replace(self_ns=project(others, inner).self_ns)
        kernel, owned = np.append(kernel, kernel[twice]), np.append(owned, np.zeros(twice.sum(), dtype=np.bool_))
    parts.append(_calls(others, mine, kernel, owned))
    return _by_name(pd.concat([*parts, _unowned(activities, owned[: len(activities)])], ignore_index=True))


def _owned_by_thread(ranges: pd.DataFrame, activities: pd.DataFrame) -> npt.NDArray[np.bool_]:
    return _within(_own(ranges, activities, by_thread=True), len(activities))


def _within(stretches: Stretches, count: int) -> npt.NDArray[np.bool_]:
    """Which of ``count`` activities lie in any stretch."""
    edges = np.zeros(len(stretches.order) + 1, dtype=np.int64)
    np.add.at(edges, stretches.low, 1)
    np.add.at(edges, stretches.high, -1)
    found = np.zeros(count, dtype=np.bool_)
    found[stretches.order] = np.cumsum(edges)[:-1] > 0
    return found


def _calls(
    ranges: pd.DataFrame, found: Projection, kernel: npt.NDArray[np.bool_], owned: npt.NDArray[np.bool_]
) -> pd.DataFrame:
    """A row a range, with nothing but its own time if it lies within one of its name; marks what is ``owned``."""
    owned |= _within(found.stretches, len(owned))
    kernels = np.concatenate(([0], np.cumsum(kernel[found.stretches.order])))
    own_kernels = kernels[found.stretches.high] - kernels[found.stretches.low]
    length = (ranges["end_ns"] - ranges["start_ns"]).to_numpy(np.float64)
    calls = pd.DataFrame(
        {
            "calls": 1,
            "open_calls": (~ranges["closed"].to_numpy(bool)).astype(np.int64),
            "host_ns": length,
            "gpu_envelope_ns": (found.end_ns - found.start_ns).astype(np.float64),
            "gpu_union_ns": found.union_ns,
            "kernels": own_kernels,
            "copies": found.owned - own_kernels,
        }
    )
    name = without_counters(ranges["name"])
    calls = calls.mul(_is_outermost(ranges, name), axis="index")
    return calls.assign(domain=ranges["domain"].to_numpy(object), range=name, gpu_self_ns=found.self_ns)


def _is_outermost(ranges: pd.DataFrame, name: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    """Which ranges do not lie within another of their domain and name, on their thread."""
    start, end = ranges["start_ns"].to_numpy(np.int64), ranges["end_ns"].to_numpy(np.int64)
    key = ranges.groupby(["tid", "domain", name], observed=True).ngroup().to_numpy(np.int64)
    order = np.lexsort((-end, start))
    reach = pd.Series(end[order]).groupby(key[order]).cummax()
    before = reach.groupby(key[order]).shift(fill_value=np.iinfo(np.int64).min).to_numpy(np.int64)
    outermost = np.zeros(len(ranges), dtype=np.bool_)
    outermost[order] = start[order] >= before
    return outermost


def _unowned(activities: pd.DataFrame, owned: npt.NDArray[np.bool_]) -> pd.DataFrame:
    """Rows of what no range owns, and of what has no known launch."""
    known = (activities["launch_ns"] != UNKNOWN).to_numpy()
    rows = []
    for name, chosen in ((IN_NO_RANGE, known & ~owned), (NOT_TRACED, ~known)):
        mine = activities[chosen]
        busy_ns = float(IntervalSet.union_of(mine["start_ns"], mine["end_ns"]).total_ns)
        kernels = int((mine["kind"] == KERNEL).sum())
        if len(mine):
            rows.append(("", name, 0, 0, 0.0, busy_ns, busy_ns, busy_ns, kernels, len(mine) - kernels))
    return pd.DataFrame(rows, columns=PROJECTION_COLUMNS)


def _by_name(calls: pd.DataFrame) -> pd.DataFrame:
    keys = ["domain", "range"]
    # One call without a union leaves its name without one.
    unknown = calls["gpu_union_ns"].isna().groupby([calls[key] for key in keys]).any()
    table = calls.groupby(keys).sum()
    table["gpu_union_ns"] = table["gpu_union_ns"].where(~unknown)
    table = table.reset_index().sort_values(["gpu_envelope_ns", *keys], ascending=[False, True, True])
    head, tail = table.iloc[:MAX_NAMES], table.iloc[MAX_NAMES:]
    if len(tail):
        rest = tail.drop(columns=keys).sum(skipna=False)
        head = pd.concat([head, pd.DataFrame([{"domain": "", "range": REST, **rest}])])
    counts = dict.fromkeys(("calls", "open_calls", "kernels", "copies"), np.int64)
    return head[PROJECTION_COLUMNS].astype(counts).reset_index(drop=True)


PROJECTION_TABLE_COLUMNS = [
    "rank", "node", "pid", "domain", "range", "calls", "open_calls", "host_s", "gpu_envelope_s", "gpu_union_s",
    "gpu_self_s", "kernels", "copies",
]  # fmt: skip


def projection_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """The ``projection`` table (PROJECTION_TABLE_COLUMNS): most GPU time first within a rank."""
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
        return pd.DataFrame(columns=PROJECTION_TABLE_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values("rank", kind="stable", ignore_index=True)[PROJECTION_TABLE_COLUMNS]
