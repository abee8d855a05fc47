"""Why a GPU had nothing to do: what the host did in each nanosecond of each gap, not at one instant of it.

A gap is looked at on the thread that launches the activity after it; else, if that launch is not known or there is
none, on the thread that launched the one before. Each nanosecond has one cause, the first of these that holds: a call
of MPI (which may wait for the device itself), a synchronising call of CUDA, another long call of CUDA, a call into the
OS, and else code of the host. If the thread waits for another thread, as autograd's does for work, then what that one
does which launched last comes before the wait. If OS calls were not traced, its calls of MPI and CUDA count as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api.types import union_categoricals

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, Times, highest_covering
from hpcmm.analysis.projection import MAX_NAMES, REST
from hpcmm.analysis.range_names import is_library, part_of_a_step, plain, without_counters
from hpcmm.analysis.trace import OUTSIDE, RankTrace, rows_of_ranks
from hpcmm.reports.report import CUDA_CALL, MPI, SYNCHRONISING, UNKNOWN, CudaEvents

OS_CALL, HOST_CODE, UNTRACED_CODE = "OS call", "host code", "host code or OS call"
"""The last one is what is known if OS calls were not traced."""
CALLS = (MPI, SYNCHRONISING, CUDA_CALL, OS_CALL)
"""Kinds of calls in the order in which they explain a moment."""
HOST_CAUSES = (*CALLS, HOST_CODE, UNTRACED_CODE)
SCOPES = (STEPS, WARMUP, OUTSIDE_STEPS, ONCE) = ("steps", "warmup", "outside", "once")
"""Where a gap lies: in a step, in the first one, outside of them; or it is one of few that last far longer than all
others of a capture without steps."""

READS = frozenset(
    {"read", "pread", "pread64", "readv", "preadv", "preadv2", "preadv64", "fread", "fread_unlocked", "fgets",
     "getline", "getdelim", "io_getevents"}
)  # fmt: skip
THREAD_WAITS = re.compile(r"pthread_(cond|join|barrier|mutex|rwlock)|sem_|futex|sched_yield")
SINGLE_TIMES, SINGLE_SHARE, MOST_SINGLE = 10.0, 0.02, 3
"""At most so many gaps are single ones: each so many times as long as any other, and so much of the capture."""
ALIKE_TIMES = 1.5
"""... and if there are several, they are not all of one length: what comes again and again is as long each time."""

Places = npt.NDArray[np.intp]
COLUMNS = [
    "device", "scope", "step", "cause", "what", "range", "loading", "idle_ns", "gaps", "gaps_ns", "largest_ns",
    "start_ns", "end_ns", "before",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Host:
    """What the threads of a process were in: ``calls`` (start_ns, end_ns, tid, kind, function), and the user's
    ``ranges`` (start_ns, end_ns, tid, name without what counts, whole_name). Kinds, functions and names are categories.
    """

    calls: pd.DataFrame
    ranges: pd.DataFrame
    traces_os: bool
    """Whether its OS calls were traced."""


def host_of(cuda: CudaEvents, osrt: pd.DataFrame, pid: int) -> Host:
    """The threads of process ``pid`` that launch something."""
    threads = np.unique(cuda.activities.loc[cuda.activities["pid"] == pid, "launch_tid"])
    known, in_os, ranges = (
        frame[(frame["pid"] == pid) & frame["tid"].isin(threads)] for frame in (cuda.host_calls, osrt, cuda.ranges)
    )
    domains = ranges["domain"].cat.categories.astype(str).str.lower()
    of_mpi = ranges[ranges["domain"].cat.codes.isin(np.flatnonzero(domains == "mpi"))]
    users = ranges[~ranges["domain"].cat.codes.isin(np.flatnonzero(domains.map(is_library)))]
    in_os = in_os.assign(kind=OS_CALL)
    of_mpi = of_mpi.assign(kind=MPI).rename(columns={"name": "function"})
    columns = ["start_ns", "end_ns", "tid"]
    parts = [part for part in (known, in_os, of_mpi) if len(part)] or [known]
    calls = pd.concat([part[columns] for part in parts], ignore_index=True)
    return Host(
        calls.assign(**{name: _joined([part[name] for part in parts]) for name in ("kind", "function")}),
        users[columns]
        .assign(name=pd.Categorical(without_counters(users["name"])), whole_name=users["name"])
        .reset_index(drop=True),
        bool((osrt["pid"] == pid).any()),
    )


def _joined(parts: Sequence[pd.Series]) -> pd.Categorical:
    categories = [part.astype("category").cat for part in parts]
    plain = [pd.Categorical.from_codes(each.codes, each.categories.astype(object)) for each in categories]
    return union_categoricals(plain)


def _distinct(values: Times) -> Times:
    """Sorted; by a sort, which is faster than hashing for millions of times that are in order, nearly."""
    values = np.sort(values, kind="stable")
    fresh: npt.NDArray[np.bool_] = np.append(True, values[1:] != values[:-1])
    return np.asarray(values[fresh[: len(values)]], dtype=np.int64)


class Timeline(NamedTuple):
    """Segments between the begins and ends of intervals on lanes, sorted by lane and time."""

    times: Times
    """All times that occur, sorted."""
    keys: Times
    """Lane and place in ``times`` of each segment's begin, as one number."""
    lane: Times
    inner: tuple[npt.NDArray[np.intp], ...]
    """For each layer of intervals the one that began last of those that cover each segment, -1 if none does."""

    @classmethod
    def of(cls, layers: Sequence[pd.DataFrame]) -> Timeline:
        """``layers``: intervals (start_ns, end_ns, tid), whose lanes are the tids."""
        start, end, tid = (
            [layer[name].to_numpy(np.int64) for layer in layers] for name in ("start_ns", "end_ns", "tid")
        )
        times = _distinct(np.concatenate((*start, *end)))
        width = len(times) + 1
        begins = [lane * width + np.searchsorted(times, each) for lane, each in zip(tid, start, strict=True)]
        ends = [lane * width + np.searchsorted(times, each) for lane, each in zip(tid, end, strict=True)]
        keys = _distinct(np.concatenate((*begins, *ends)))
        inner = []
        for first, last in zip(begins, ends, strict=True):
            # Of intervals that begin together the longer one is outside.
            order = np.lexsort((-last, first))
            low, high = np.searchsorted(keys, first[order]), np.searchsorted(keys, last[order])
            inner.append(np.append(order, -1)[highest_covering(low, high, len(keys))])
        return cls(times, keys, keys // width, tuple(inner))

    def cuts(self, lane: Times, start: Times, end: Times) -> tuple[npt.NDArray[np.intp], Times]:
        """Begins of segments strictly within windows of lanes: the number of the window, and the time."""
        width = len(self.times) + 1
        low = np.searchsorted(self.keys, lane * width + np.searchsorted(self.times, start, side="right"), side="left")
        high = np.searchsorted(self.keys, lane * width + np.searchsorted(self.times, end, side="left"), side="left")
        window, at = _expanded(low, np.where(lane < 0, low, high))
        return window, self.times[self.keys[at] % width] if len(at) else np.empty(0, dtype=np.int64)

    def at(self, lane: Times, time: Times) -> list[npt.NDArray[np.intp]]:
        """For each layer the innermost interval at each time of a lane, -1 if there is none."""
        width = len(self.times) + 1
        key = lane * width + np.searchsorted(self.times, time, side="right") - 1
        place = np.searchsorted(self.keys, key, side="right") - 1
        there = (place >= 0) & (lane >= 0)
        there[there] = self.lane[place[there]] == lane[there]
        found = []
        for inner in self.inner:
            index = np.full(len(time), -1, dtype=np.intp)
            index[there] = inner[place[there]]
            found.append(index)
        return found


def _expanded(
    low: npt.NDArray[np.intp], high: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The positions of stretches [low, high), and the stretch of each."""
    count = np.maximum(high - low, 0)
    owner = np.repeat(np.arange(len(low)), count)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)


class Idle(NamedTuple):
    """The idle time of one device: ``rows`` (COLUMNS), and when the host was in a synchronising call meanwhile."""

    rows: pd.DataFrame
    synchronising: IntervalSet


def split(
    idle: Mapping[str, IntervalSet], of_host: str, activities: pd.DataFrame, host: Host, steps: pd.DataFrame
) -> Idle:
    """Split the gaps of one device, given by cause; those of cause ``of_host`` by what the host did in them.

    ``activities`` are the device's; ``steps`` its windows (step, start_ns, end_ns), disjoint and sorted.
    """
    causes = [*HOST_CAUSES, *idle]
    gaps = _gaps(idle, of_host, activities, len(HOST_CAUSES))
    inside = IntervalSet.union_of(gaps["start_ns"], gaps["end_ns"])
    calls, ranges = _within(host.calls, inside), _within(host.ranges, inside)
    layers = [calls[calls["kind"] == kind] for kind in CALLS]
    timeline = Timeline.of([*layers, ranges, ranges[_load(ranges["name"])]])
    pieces = _pieces(gaps, timeline, steps)
    names = ranges["name"].cat
    codes = [np.asarray(layer["function"].cat.codes, dtype=np.int64) for layer in layers]
    functions = calls["function"].cat
    codes.append(np.asarray(names.codes, dtype=np.int64))
    pieces = _explained(pieces, timeline, codes, functions.categories, traces_os=host.traces_os)
    waiting = pieces[pieces["cause"] == CALLS.index(SYNCHRONISING)]
    rows = _summed(pieces, gaps, (SCOPES, causes, [*functions.categories, ""], [*names.categories, REST, ""]))
    rows["before"] = [
        _before(host.ranges, int(gaps["tid"][gap]), int(gaps["launch_ns"][gap])) if scope == ONCE else ""
        for gap, scope in zip(rows.pop("longest"), rows["scope"], strict=True)
    ]
    rows["step"] = np.where(rows["scope"] == WARMUP, int(steps["step"].min()) if len(steps) else OUTSIDE, OUTSIDE)
    return Idle(rows, IntervalSet.union_of(waiting["start_ns"], waiting["end_ns"]))


def _within(events: pd.DataFrame, inside: IntervalSet) -> pd.DataFrame:
    chosen = inside.covered_within(events["start_ns"], events["end_ns"]) > 0
    return events[chosen].reset_index(drop=True)


def _load(names: pd.Series) -> npt.NDArray[np.bool_]:
    """Which of ``names`` (categories) say that the range loads data."""
    hits = np.array([*(part_of_a_step(str(name)) == "data" for name in names.cat.categories), False], dtype=np.bool_)
    return hits[names.cat.codes.to_numpy()]


def _gaps(idle: Mapping[str, IntervalSet], of_host: str, activities: pd.DataFrame, first: int) -> pd.DataFrame:
    """All gaps, sorted: start_ns, end_ns, cause (its place in ``idle``, counted from ``first``), tid and other_tid (-1
    if not the host's fault), launch_ns of the activity that ends it, and whether it is single."""
    gaps = pd.DataFrame(
        {
            "start_ns": np.concatenate([each.start_ns for each in idle.values()]),
            "end_ns": np.concatenate([each.end_ns for each in idle.values()]),
            "cause": np.repeat(first + np.arange(len(idle)), [len(each) for each in idle.values()]),
        }
    ).sort_values("start_ns", ignore_index=True)
    order = np.lexsort((activities["launch_ns"], activities["start_ns"]))
    start, launch, tid = (
        activities[name].to_numpy(np.int64)[order] for name in ("start_ns", "launch_ns", "launch_tid")
    )
    tid = np.append(np.where(launch == UNKNOWN, UNKNOWN, tid), UNKNOWN)  # the last one stands for none
    following = np.searchsorted(start, gaps["end_ns"], side="left")
    before = tid[np.where(following > 0, following - 1, len(start))]
    after = np.where(tid[following] >= 0, tid[following], before)
    hosts = (gaps["cause"] == first + list(idle).index(of_host)).to_numpy()
    length = (gaps["end_ns"] - gaps["start_ns"]).to_numpy()
    span = int(activities["end_ns"].max() - start[0]) if len(start) else 0
    return gaps.assign(
        tid=np.where(hosts, after, UNKNOWN),
        other_tid=np.where(hosts, before, UNKNOWN),
        launch_ns=np.append(launch, UNKNOWN)[following],
        single=single_gaps(np.where(hosts, length, 0), span),
    )


def single_gaps(length_ns: Times, span_ns: int) -> npt.NDArray[np.bool_]:
    """Which of the gaps are single ones: few, far longer than all others, and not for something that comes again."""
    order = np.argsort(-length_ns, kind="stable")
    longest = length_ns[order][: MOST_SINGLE + 1].astype(np.float64)
    found = np.zeros(len(length_ns), dtype=np.bool_)
    for count in range(min(MOST_SINGLE, len(longest)), 0, -1):
        least = longest[count - 1]
        rest = longest[count] if count < len(longest) else 0.0
        alike = count > 1 and longest[0] <= ALIKE_TIMES * least
        if least >= max(SINGLE_TIMES * rest, SINGLE_SHARE * span_ns, 1.0) and not alike:
            found[order[:count]] = True
            break
    return found


def _pieces(gaps: pd.DataFrame, timeline: Timeline, steps: pd.DataFrame) -> pd.DataFrame:
    """The gaps cut wherever what the host does changes, or a step begins or ends; sorted."""
    start, end = gaps["start_ns"].to_numpy(np.int64), gaps["end_ns"].to_numpy(np.int64)
    tid, other = gaps["tid"].to_numpy(np.int64), gaps["other_tid"].to_numpy(np.int64)
    unstepped, first = steps.empty, int(steps["step"].min()) if len(steps) else 0
    steps = steps[steps["end_ns"] > steps["start_ns"]]
    bounds = _distinct(np.concatenate((steps["start_ns"], steps["end_ns"])).astype(np.int64))
    owner, at = _expanded(np.searchsorted(bounds, start, side="right"), np.searchsorted(bounds, end, side="left"))
    cuts = [
        (np.arange(len(gaps)), start),
        timeline.cuts(tid, start, end),
        timeline.cuts(np.where(other == tid, UNKNOWN, other), start, end),
        (owner, bounds[at]),
    ]
    gap, begin = (np.concatenate(each) for each in zip(*cuts, strict=True))
    order = np.lexsort((begin, gap))
    gap, begin = gap[order], begin[order]
    last = np.append(gap[1:] != gap[:-1], True)[: len(gap)]
    finish = np.where(last, end[gap], np.append(begin[1:], 0)[: len(gap)])
    scope = np.where(gaps["single"].to_numpy()[gap] & unstepped, SCOPES.index(ONCE), _scope(begin, steps, first))
    pieces = gaps[["cause", "tid", "other_tid"]].iloc[gap].reset_index(drop=True)
    pieces = pieces.assign(gap=gap, start_ns=begin, end_ns=finish, scope=scope)
    return pieces[finish > begin].reset_index(drop=True)


def _scope(at: Times, steps: pd.DataFrame, first: int) -> Times:
    """The place in SCOPES of what lies in or outside of ``steps``, of which ``first`` is for warming up."""
    within = np.searchsorted(steps["start_ns"].to_numpy(np.int64), at, side="right") - 1
    inside = (within >= 0) & (at < np.append(steps["end_ns"].to_numpy(np.int64), 0)[within])
    warm = np.append(steps["step"] == first, False)[within]
    return np.select([~inside, warm], [SCOPES.index(OUTSIDE_STEPS), SCOPES.index(WARMUP)], SCOPES.index(STEPS))


def _explained(
    pieces: pd.DataFrame, timeline: Timeline, codes: Sequence[Times], functions: pd.Index, *, traces_os: bool
) -> pd.DataFrame:
    """Cause, function (``what``), range, and whether the host loads data, of each piece; as codes, -1 for none.

    ``codes``: the function of each interval of the layers of calls, and the name of each range.
    """
    begin, tid, other = (pieces[name].to_numpy(np.int64) for name in ("start_ns", "tid", "other_tid"))
    own, others = timeline.at(tid, begin), timeline.at(np.where(other == tid, UNKNOWN, other), begin)
    unnamed = [np.append(each, -1) for each in codes]
    system = CALLS.index(OS_CALL)
    waits = np.array([*(bool(THREAD_WAITS.match(str(name))) for name in functions), False], dtype=np.bool_)
    cause = np.where(tid >= 0, HOST_CAUSES.index(HOST_CODE if traces_os else UNTRACED_CODE), pieces["cause"])
    what = np.full(len(pieces), -1, dtype=np.int64)
    waiting = waits[unnamed[system][own[system]]]
    ask_other = waiting | ((own[system] < 0) & (not traces_os))
    works = waiting & ~waits[unnamed[system][others[system]]]
    # From the last answer to the first: each overwrites what holds less.
    answers = [
        (system, own[system], waiting),
        (system, others[system], works),
        *((layer, others[layer], ask_other) for layer in reversed(range(system))),
        (system, own[system], ~waiting),
        *((layer, own[layer], np.True_) for layer in reversed(range(system))),
    ]
    for layer, index, holds in answers:
        chosen = (index >= 0) & holds
        cause[chosen] = layer
        what[chosen] = codes[layer][index[chosen]]
    inner = np.where(own[system + 1] >= 0, own[system + 1], others[system + 1])
    loading = (own[system + 2] >= 0) | ((own[system + 1] < 0) & (others[system + 2] >= 0))
    reads = np.append(functions.isin(READS), False)[what] & (cause == system)
    return pieces.assign(
        cause=cause, what=what, range=unnamed[system + 1][inner], loading=(tid >= 0) & (loading | reads)
    )


def _summed(pieces: pd.DataFrame, gaps: pd.DataFrame, labels: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Rows of COLUMNS but the last, and the ``longest`` gap of each, most idle time first.

    ``labels`` are of scope, cause, what and range by their codes; the last of ranges but one is for those beyond
    MAX_NAMES.
    """
    length = (pieces["end_ns"] - pieces["start_ns"]).to_numpy(np.int64)
    ranges = len(labels[3])
    code = pieces["range"].to_numpy(np.int64) % ranges
    most = np.argsort(-np.bincount(code, weights=length, minlength=ranges)[: ranges - 2], kind="stable")[:MAX_NAMES]
    code = np.where(np.isin(code, most) | (code == ranges - 1), code, ranges - 2)
    key = np.zeros(len(pieces), dtype=np.int64)
    parts = [
        (pieces[name].to_numpy(np.int64), len(each))
        for name, each in zip(("scope", "cause", "what"), labels, strict=False)
    ]
    for each, count in [*parts, (code, ranges), (pieces["loading"].to_numpy(np.int64), 2)]:
        key = key * count + each % count
    key, gap, held = _sums(key, pieces["gap"].to_numpy(np.int64), length)
    whole = (gaps["end_ns"] - gaps["start_ns"]).to_numpy(np.int64)[gap]
    by_gap = pd.DataFrame({"key": key, "longest": gap, "gaps_ns": whole, "idle_ns": held})
    by_gap = by_gap.sort_values("idle_ns", ascending=False, kind="stable")
    rows = by_gap.groupby("key", sort=False).agg(
        largest_ns=("idle_ns", "first"),
        longest=("longest", "first"),
        gaps=("longest", "size"),
        gaps_ns=("gaps_ns", "sum"),
        idle_ns=("idle_ns", "sum"),
    )
    key = rows.index.to_numpy(np.int64)
    key, loading = np.divmod(key, 2)
    told = {"loading": loading.astype(bool)}
    for name, texts in zip(("range", "what", "cause", "scope"), reversed(labels), strict=True):
        key, code = np.divmod(key, len(texts))
        told[name] = np.array(texts, dtype=object)[code]
    longest = gaps.iloc[rows["longest"]]
    times = {name: longest[name].to_numpy() for name in ("start_ns", "end_ns")}
    order = ["scope", "idle_ns"]
    return rows.assign(**told, **times).sort_values(order, ascending=[True, False], kind="stable", ignore_index=True)


def _sums(key: Times, gap: Times, length: Times) -> tuple[Times, Times, Times]:
    """The sum of ``length`` of each key and gap."""
    order = np.lexsort((gap, key))
    key, gap = key[order], gap[order]
    first = np.flatnonzero(np.append(True, (key[1:] != key[:-1]) | (gap[1:] != gap[:-1]))[: len(key)])
    return key[first], gap[first], np.add.reduceat(length[order], first) if len(first) else length


def _before(ranges: pd.DataFrame, tid: int, launch_ns: int) -> str:
    """The outermost range on a thread at a time; empty if it is in none."""
    at = ranges[(ranges["tid"] == tid) & (ranges["start_ns"] <= launch_ns) & (ranges["end_ns"] > launch_ns)]
    return plain(str(at["whole_name"].iloc[int(at["start_ns"].to_numpy(np.int64).argmin())])) if len(at) else ""


def _in_scopes(rows: pd.DataFrame, warmup_step: int | None) -> pd.DataFrame:
    """``rows`` (COLUMNS) with those of first steps that do not warm up among those of the other steps."""
    steady = (rows["scope"] == WARMUP) & (rows["step"] != (OUTSIDE if warmup_step is None else warmup_step))
    if not steady.any():
        return rows
    keys = ["device", "scope", "cause", "what", "range", "loading"]
    sums = ["idle_ns", "gaps", "gaps_ns"]
    rows = rows.assign(scope=rows["scope"].mask(steady, STEPS)).sort_values("largest_ns", ascending=False)
    groups = rows.groupby(keys, sort=False, as_index=False, observed=True)
    joined = groups.agg({name: "sum" if name in sums else "first" for name in COLUMNS if name not in keys})
    return joined.sort_values(["device", "scope", "idle_ns"], ascending=[True, True, False], ignore_index=True)[COLUMNS]


TABLE_COLUMNS = [
    "rank", "node", "pid", "device", "scope", "cause", "what", "range", "loading", "idle_s", "gaps", "gaps_s",
    "largest_s", "largest_start_s", "largest_gap_s", "before",
]  # fmt: skip


def idle_table(traces: Sequence[RankTrace], warmup_step: int | None) -> pd.DataFrame:
    """The ``idle`` table (TABLE_COLUMNS): most idle time first within a device and scope.

    ``warmup_step``: the step that warms up. The first step of a rank, or of a window of its capture, may be another.
    """
    table = rows_of_ranks(
        (trace, None if trace.idle is None else _in_scopes(trace.idle, warmup_step)) for trace in traces
    )
    if table is None:
        return pd.DataFrame(columns=TABLE_COLUMNS)
    return table.assign(
        idle_s=table["idle_ns"] / NS_PER_S,
        gaps_s=table["gaps_ns"] / NS_PER_S,
        largest_s=table["largest_ns"] / NS_PER_S,
        largest_start_s=table["start_ns"] / NS_PER_S,
        largest_gap_s=(table["end_ns"] - table["start_ns"]) / NS_PER_S,
    )[TABLE_COLUMNS]
