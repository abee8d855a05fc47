"""Collectives matched over the ranks: who arrived when, who waited how long, and how fast the transfer was.

An instance is matched on (group, op, sequence), never on time. With start s_r and end e_r of rank r on the common
clock, d_r = e_r - s_r:

- estimator A, which needs no clock: transfer = min_r d_r, wait_r = d_r - transfer;
- estimator B: wait_r = clip(max_q s_q - s_r, 0, d_r), Scalasca's "wait at NxN".

A holds only where all ranks also leave together; B wherever every rank needs data of all others, so that an
all-to-all, whose ranks may exchange unequal amounts, has B alone. If the clocks are good to e only, which is a
millisecond or more, the wait is A within the bounds B - e and B + e: no more is called transfer than the shortest d_r,
unless the clocks contradict that. B alone has a broadcast or scatter, too, that its root comes last to; if its range
does not tell the root, or another rank is last, all of it is transfer. A send and its receive have B between the two of
them: the k-th send from one rank to another is what the k-th receive there gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import nccl, process_groups
from hpcmm.analysis.clock import SAME_HOST_ERROR_NS
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, Times, first_claims
from hpcmm.analysis.trace import KEY, NO_PEER, NO_SIZE, UNEVEN, RankTrace, nullable_steps
from hpcmm.ranges import ranks_in

SYNCHRONISING = frozenset({"all_reduce", "all_gather", "reduce_scatter", "barrier"})
"""No rank leaves before all have arrived, and all leave within the operation's own transfer time."""
NEEDS_ALL = SYNCHRONISING | {"all_to_all"}
"""No rank leaves before all have arrived."""
POINT_TO_POINT = frozenset({"send", "recv"})
FROM_ROOT = frozenset({"broadcast", "scatter"})
"""Nobody can leave before the root has arrived."""
VAGUE_NS = 1_000_000
"""From this error on a clock is taken for a bound of the waits alone, and not for their measure."""


def match_with_waits(
    traces: Sequence[RankTrace], clock_error_ns: float, clocks: Sequence[str] | None = None
) -> pd.DataFrame:
    """Matched collectives of all ranks, on one clock, with their waits: all that the analysis derives of collectives.

    One row a rank and instance, times in nanoseconds, with what :func:`match`, :func:`estimate_waits` and
    :func:`expose` give, and bus_bytes_per_s. ``clocks``: the name of the clock that each trace shares with others.
    """
    # Kernels that only their order identifies are no collectives if the times contradict that order.
    matched = nccl.confirm_order(match(traces), clock_error_ns)
    rows = estimate_waits(matched, _errors(matched, clock_error_ns, clocks) if clocks else clock_error_ns)
    return expose(rows.assign(bus_bytes_per_s=bus_bandwidth(rows)), traces)


def _errors(rows: pd.DataFrame, between_ns: float, clocks: Sequence[str]) -> npt.NDArray[np.float64]:
    """The clock's error for each row: ranks that share a clock, as those of a node do, arrive at exact times."""
    clock = pd.Series(np.array(clocks, dtype=object)[rows["trace"].to_numpy(np.intp)], index=rows.index)
    shared = (clock.groupby(rows["instance"]).transform("nunique") == 1) & ~rows["op"].isin(POINT_TO_POINT)
    return np.where(shared, min(SAME_HOST_ERROR_NS, between_ns), between_ns)


def match(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """All collectives of all ranks, one row a rank and instance, with ``instance``, ``ranks`` and ``complete``.

    An instance is complete when every rank that ever took part in its group has it, closed. Rows keep ``trace``, the
    index of their trace, and are sorted by trace and start.
    """
    frames = [trace.collectives.assign(trace=i, rank=trace.rank, node=trace.node) for i, trace in enumerate(traces)]
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if rows.empty:
        columns = ["op", "group", "sequence", "occurrence", "bytes", "start_ns", "end_ns", "closed", "step", "phase"]
        return pd.DataFrame(
            columns=[
                *(*columns, "peer", "trace", "rank", "node", "instance", "ranks", "complete", "synchronising"),
                *("needs_all", "partner_start_ns", *UNEVEN, "axis", "axis_basis", "group_ranks"),
            ]
        )
    rows["instance"] = rows.groupby(KEY, sort=False).ngroup()
    rows = nccl.in_phase_of_launch(nccl.with_basis(rows))
    rows["peer"] = rows["peer"].fillna(NO_PEER).astype(np.int64) if "peer" in rows else NO_PEER
    for column in UNEVEN:
        rows[column] = rows[column].fillna(NO_SIZE).astype(np.int64) if column in rows else NO_SIZE
    collective = ~rows["op"].isin(POINT_TO_POINT)
    members = rows[collective].groupby("group")["trace"].nunique()
    closed = rows["closed"].groupby(rows["instance"]).sum()
    rows["ranks"] = rows["group"].map(members).fillna(0).astype(np.int64)
    rows["complete"] = collective & (rows["instance"].map(closed) == rows["ranks"])
    shared = rows["complete"] & (rows["ranks"] > 1)
    rows["synchronising"] = shared & rows["op"].isin(SYNCHRONISING)
    rows["needs_all"] = shared & (rows["op"].isin(NEEDS_ALL) | (rows["op"].isin(FROM_ROOT) & _root_is_last(rows)))
    rows["partner_start_ns"] = _partner_starts(rows)
    rows = process_groups.with_groups(rows, traces)
    return rows.sort_values(["trace", "start_ns"], kind="stable", ignore_index=True)


def _root_is_last(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether the rank that arrives last at each row's instance is its root."""
    starts = rows["start_ns"].groupby(rows["instance"])
    of_root = rows["start_ns"].where(rows["rank"] == rows["peer"]).groupby(rows["instance"]).transform("max")
    return of_root == starts.transform("max")


def _partner_starts(rows: pd.DataFrame) -> pd.Series[float]:
    """When the other side of each send or receive began; NaN for all other rows, and if it was not seen."""
    pairs = rows.loc[rows["op"].isin(POINT_TO_POINT) & (rows["peer"] != NO_PEER)]
    sends = (pairs["op"] == "send").to_numpy()
    ends = {
        "from": np.where(sends, pairs["rank"], pairs["peer"]),
        "to": np.where(sends, pairs["peer"], pairs["rank"]),
    }
    pairs = pairs[["group", "op", "start_ns"]].assign(**ends).sort_values("start_ns", kind="stable")
    key = ["group", "from", "to"]
    pairs["number"] = pairs.groupby([*key, "op"]).cumcount()
    other = pairs.assign(op=np.where(pairs["op"] == "send", "recv", "send"))
    starts = other.drop_duplicates([*key, "op", "number"]).set_index([*key, "op", "number"])["start_ns"]
    found = starts.reindex(pd.MultiIndex.from_frame(pairs[[*key, "op", "number"]]))
    return pd.Series(found.to_numpy(np.float64), index=pairs.index).reindex(rows.index)


def estimate_waits(rows: pd.DataFrame, clock_error_ns: float | npt.NDArray[np.float64]) -> pd.DataFrame:
    """Add waits, transfer and late arriver to matched rows; all times in nanoseconds.

    Adds duration_ns, wait_a_ns, wait_b_ns, wait_ns, transfer_ns, blamable, late_rank, lateness_ns,
    lateness_to_median_ns, clock_error_ns, estimators_disagree, last_start_ns and unsure_ns.

    ``clock_error_ns``: of all rows, or of each. ``wait_ns`` is estimator A, which needs no clock, as far as B does not
    contradict it by more than the clock's error; below :data:`VAGUE_NS` it is B, if the clock tells. If there is B
    alone it is that, if it exceeds the error; else ``unsure_ns`` of the transfer may be waiting. The late arriver is
    named only if the longest wait by B exceeds the clock's error. If no rank needs all others, waits are NaN.
    """
    duration: pd.Series[float] = (rows["end_ns"] - rows["start_ns"]).astype(np.float64)
    by_instance = rows["instance"]
    has_a, has_b = rows["synchronising"].to_numpy(bool), rows["needs_all"].to_numpy(bool)
    last = rows.groupby("instance")["start_ns"].transform("max")
    wait_a = (duration - duration.groupby(by_instance).transform("min")).where(has_a)
    wait_b = (last - rows["start_ns"]).astype(np.float64).clip(upper=duration).where(has_b)
    for_partner = (rows["partner_start_ns"] - rows["start_ns"]).clip(lower=0.0, upper=duration)
    longest = wait_b.groupby(by_instance).transform("max")
    clock_tells = wait_a.fillna(wait_b).groupby(by_instance).transform("max") > clock_error_ns
    blamable = has_b & clock_tells.to_numpy() & (longest.to_numpy() > clock_error_ns)
    wait = wait_a.clip(lower=wait_b - clock_error_ns, upper=wait_b + clock_error_ns)
    wait = wait.where(np.broadcast_to(clock_error_ns, len(rows)) >= VAGUE_NS, wait_b.where(clock_tells, wait_a))
    by_clock = wait_b.fillna(for_partner)
    wait = wait.fillna(by_clock.where(np.where(has_b, clock_tells, by_clock > clock_error_ns)))
    # Who came last waited for nobody, so that the shortest part of an instance is transfer, whatever the clock says.
    beyond = duration - wait.fillna(0.0) - duration.groupby(by_instance).transform("min")
    unsure = beyond.clip(lower=0.0, upper=clock_error_ns).where(has_b & ~has_a, 0.0)
    late = _late_arrivers(rows)
    return rows.assign(
        duration_ns=duration,
        wait_a_ns=wait_a,
        wait_b_ns=wait_b.fillna(for_partner),
        wait_ns=wait,
        transfer_ns=duration - wait.fillna(0.0),
        blamable=blamable,
        late_rank=pd.Series(late.rank, dtype="Int64", index=rows.index).where(blamable),
        lateness_ns=np.where(blamable, late.after_second_ns, np.nan),
        lateness_to_median_ns=np.where(blamable, late.after_median_ns, np.nan),
        clock_error_ns=np.where(has_b, clock_error_ns, np.nan),
        estimators_disagree=(wait_a - wait_b).abs() > clock_error_ns,
        last_start_ns=last,
        unsure_ns=unsure,
    )


class _Late(NamedTuple):
    """For each row, its instance's last arriver."""

    rank: npt.NDArray[np.int64]
    after_second_ns: npt.NDArray[np.float64]
    """How long after the last but one it came; 0 where it is alone."""
    after_median_ns: npt.NDArray[np.float64]
    """How long after the median arrival."""


def _late_arrivers(rows: pd.DataFrame) -> _Late:
    order = np.lexsort((rows["start_ns"].to_numpy(), rows["instance"].to_numpy()))
    instance = rows["instance"].to_numpy()[order]
    start = rows["start_ns"].to_numpy(np.int64)[order]
    last = np.flatnonzero(np.append(instance[1:] != instance[:-1], True)[: len(instance)])
    first = np.append(0, last[:-1] + 1)[: len(last)]
    second = np.maximum(last - 1, first)
    middle, upper = (first + last) // 2, (first + last + 1) // 2
    median = start[middle] + (start[upper] - start[middle]) / 2
    position = np.searchsorted(instance[last], rows["instance"].to_numpy())
    rank = rows["rank"].to_numpy(np.int64)[order][last]
    late = start[last]
    return _Late(rank[position], (late - start[second]).astype(np.float64)[position], (late - median)[position])


def bus_bandwidth(rows: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Bus bandwidth in bytes a second, as nccl-tests define it: what each link has to carry, whatever the algorithm.

    The time is that of the transfer alone: after the last arrival, and after what the group had queued before.
    """
    queued = np.full(len(rows), np.iinfo(np.int64).min, dtype=np.int64)
    for _, group in rows.groupby(["trace", "group"], sort=False):
        reach = np.maximum.accumulate(group["end_ns"].to_numpy(np.int64))
        queued[group.index.to_numpy()[1:]] = reach[:-1]
    begin = np.maximum(rows["last_start_ns"].to_numpy(np.int64), queued)
    seconds = (rows["end_ns"].to_numpy(np.int64) - begin) / 1e9
    factor = bus_factor(rows["op"].to_numpy(str), rows["ranks"].to_numpy(np.float64))
    usable = rows["complete"].to_numpy(bool) & (seconds > 0) & (rows["bytes"].to_numpy() > 0)
    return np.where(usable, rows["bytes"].to_numpy() * factor / np.where(usable, seconds, 1), np.nan)


def bus_factor(op: npt.NDArray[np.str_], ranks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bytes that each link of a group of ``ranks`` has to carry, for each byte of payload, as nccl-tests define it."""
    ranks = np.maximum(ranks, 1)
    partial = np.isin(op, ["all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"])
    return np.select([op == "all_reduce", partial], [2 * (ranks - 1) / ranks, (ranks - 1) / ranks], 1.0)


def expose(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Add exposed_wait_ns and exposed_transfer_ns: what of each collective kept the step thread from working."""
    wait = np.zeros(len(rows))
    transfer = np.zeros(len(rows))
    start, waited = rows["start_ns"].to_numpy(np.int64), rows["wait_ns"].fillna(0).to_numpy(np.float64)
    pairs = rows["op"].isin(POINT_TO_POINT).to_numpy(bool)
    for claims in claimed(rows, traces):
        wait[claims.at] = claims.exposed(claims.begin, claims.split)
        transfer[claims.at] = claims.exposed(claims.split, claims.end)
        # A send lasts until somebody waits for it, and so claims what is waiting for a later receive in truth.
        own = pairs[claims.at]
        at, begin, end = claims.at[own], claims.begin[own], claims.end[own]
        partner = IntervalSet.union_of(start[at], start[at] + waited[at].astype(np.int64))
        partner = partner if claims.blocked is None else partner.intersect(claims.blocked)
        wait[at] = partner.covered_within(begin, end)
        transfer[at] = claims.exposed(begin, end) - wait[at]
    return rows.assign(exposed_wait_ns=wait, exposed_transfer_ns=transfer)


@dataclass(frozen=True, slots=True)
class Claims:
    """The time of one trace's collectives, each instant given to one of them; arrays of shape (collectives,).

    Collectives in flight together are counted once: time belongs to the one that was enqueued first.
    """

    trace: int
    at: npt.NDArray[np.intp]
    """Positions of the collectives in the rows."""
    begin: Times
    split: Times
    """Waiting before, transfer after."""
    end: Times
    blocked: IntervalSet | None

    def exposed(self, start: Times, end: Times) -> Times:
        """What of each interval [start, end) kept the step thread from working.

        Where OS calls were traced only the time that the step thread was blocked in them counts, so communication
        behind computation costs nothing; else all of it does, which is an upper bound.
        """
        return end - start if self.blocked is None else self.blocked.covered_within(start, end)


def claimed(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> Iterator[Claims]:
    """Claims of each trace that has collectives with an end; one without an end claims nothing."""
    for index, group in rows[rows["closed"].astype(bool)].groupby("trace", sort=True):
        start, at = group["start_ns"].to_numpy(np.int64), group.index.to_numpy(np.intp)
        begin, end = first_claims(start, group["end_ns"].to_numpy(np.int64))
        wait_end = start + group["wait_ns"].fillna(0).to_numpy().astype(np.int64)
        trace = int(str(index))
        yield Claims(trace, at, begin, np.clip(wait_end, begin, end), end, traces[trace].blocked)


COLLECTIVE_COLUMNS = [
    "op",
    "group",
    "axis",
    "axis_basis",
    "group_ranks",
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
    table = rows.assign(
        **{name: rows[source] / NS_PER_S for name, source in seconds.items()}, step=nullable_steps(rows["step"])
    )
    table = nccl.with_basis(table)
    # A kernel without a range of hpcmm does not tell its size, unless NCCL's own range does.
    table["bytes"] = (
        table["bytes"].astype("Int64").where(table["basis"].isin([nccl.BY_NAME, nccl.BY_KERNEL]) | (table["bytes"] > 0))
    )
    return table.sort_values(["instance", "rank"], ignore_index=True)[COLLECTIVE_COLUMNS]


BYTES_COLUMNS = [
    "step",
    "rank",
    "node",
    "axis",
    "group",
    "group_ranks",
    "op",
    "messages",
    "bytes",
    "bus_bytes",
    "warmup",
]


def bytes_table(table: pd.DataFrame, warmup: int | None) -> pd.DataFrame:
    """What each rank exchanges in each step, by group and operation (BYTES_COLUMNS); what tells no size is left out.

    ``table``: that of :func:`collectives_table`. ``warmup``: the number of the step that is no more than that.
    """
    inside = table[table["step"].notna() & table["bytes"].notna()]
    if inside.empty:
        return pd.DataFrame(columns=BYTES_COLUMNS)
    told = {ranks: len(ranks_in(ranks)) for ranks in inside["group_ranks"].unique()}
    size = inside["group_ranks"].map(told).where(inside["group_ranks"] != "", inside["ranks"])
    factor = bus_factor(inside["op"].to_numpy(str), size.to_numpy(np.float64))
    keys = ["step", "rank", "node", "axis", "group", "group_ranks", "op"]
    found = (
        inside.assign(bytes=inside["bytes"].astype(np.int64), bus_bytes=inside["bytes"].astype(np.float64) * factor)
        .groupby(keys, observed=True)
        .agg(messages=("bytes", "size"), bytes=("bytes", "sum"), bus_bytes=("bus_bytes", "sum"))
        .reset_index()
    )
    return found.assign(warmup=(found["step"] == warmup).fillna(False).astype(bool))[BYTES_COLUMNS]


SMALL_BYTES = 4096
"""Losses, norms and counters are smaller; a bucket of gradients or a layer's activations is not. Such messages show the
start-up time."""
MIN_SMALL = 5
LATENCY_SHARE, BANDWIDTH_SHARE = 0.6, 0.4
"""Latency bounds what spends this share of its time on starting up, bandwidth what spends less than the other."""
FEW_BYTES, MANY_BYTES = 64 << 10, 1 << 20
"""Without small messages to compare with: any network starts up longer than it moves few bytes, and shorter than it
moves many."""


def _messages(rows: pd.DataFrame) -> pd.DataFrame:
    """Each collective of known size once (a send or receive each for itself): its bytes, its shortest transfer, its
    exposed time."""
    usable = rows[rows["closed"].astype(bool) & ~nccl.without_size(rows)]
    found = usable.groupby("instance").agg(
        bytes=("bytes", "max"), transfer_ns=("transfer_ns", "min"), exposed_ns=("exposed_transfer_ns", "sum")
    )
    return found[found["transfer_ns"] > 0]


def start_up_s(rows: pd.DataFrame) -> float | None:
    """Median time of the small messages; None if there are hardly any."""
    messages = _messages(rows)
    small = messages[messages["bytes"] <= SMALL_BYTES]
    return float(small["transfer_ns"].median()) / NS_PER_S if len(small) >= MIN_SMALL else None


def bound_by(rows: pd.DataFrame, start_s: float | None) -> str:
    """``latency``, ``bandwidth``, or nothing if the data do not tell.

    A message takes a start-up time, ``start_s``, and a time for its bytes (the model of Hockney, 1994). The share of
    the one in all the time that the messages take says which of the two bounds them.
    """
    messages = _messages(rows)
    if messages.empty or not messages["exposed_ns"].sum():
        return ""
    if messages["bytes"].max() <= SMALL_BYTES:
        return "latency"
    if start_s is None:
        typical = float(np.average(messages["bytes"], weights=messages["exposed_ns"]))
        return "latency" if typical < FEW_BYTES else "bandwidth" if typical >= MANY_BYTES else ""
    starting = np.minimum(start_s * NS_PER_S / messages["transfer_ns"], 1.0)
    share = float(np.average(starting, weights=messages["exposed_ns"]))
    return "latency" if share >= LATENCY_SHARE else "bandwidth" if share <= BANDWIDTH_SHARE else ""


def in_words(rows: pd.DataFrame, count: int) -> str:
    """Messages, bytes, time and bandwidth; ``count`` is the number of steps times that of ranks."""
    each = _duration(float(rows["exposed_transfer_ns"].sum()) / NS_PER_S / max(len(rows), 1))
    often, per = f"{len(rows) / count:.3g} message{'s' if len(rows) != count else ''}", "a step and"
    often, per = (often, per) if len(rows) >= count else (f"a message every {count / len(rows):.3g} steps", "of a")
    if nccl.without_size(rows).all():
        return f"{often} {per} rank, whose size the report does not tell, {each} each"
    whole, typical = size_in_words(float(rows["bytes"].sum()) / count), size_in_words(float(rows["bytes"].median()))
    told = f"{whole} a step and rank in {often}, half of them of at least {typical}, {each} each"
    return told + (f", at a bus bandwidth of {size_in_words(rate)}/s" if (rate := bus_rate(rows)) > 0 else "")


def bus_rate(rows: pd.DataFrame) -> float:
    """Bus bandwidth of the large messages in ``rows`` together, in bytes a second; 0 if none tells it.

    Messages that are in flight together take their time from one another, so that only all bytes over all time tell
    what a link carries.
    """
    # A small message tells of the start-up time, and nothing of what the links carry.
    large = rows[rows["bytes"] >= max(float(rows["bytes"].quantile(0.5)), FEW_BYTES)]
    large = large[large["bus_bytes_per_s"] > 0]
    factor = bus_factor(large["op"].to_numpy(str), large["ranks"].to_numpy(np.float64))
    carried = large["bytes"].to_numpy(np.float64) * factor
    seconds = float((carried / large["bus_bytes_per_s"].to_numpy(np.float64)).sum())
    return float(carried.sum()) / seconds if seconds > 0 else 0.0


def size_in_words(value: float) -> str:
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= many:
            return f"{value / many:.3g} {unit}"
    return f"{value:.3g} B"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
