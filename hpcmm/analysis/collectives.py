"""Collectives matched over the ranks: who arrived when, who waited how long, and how fast the transfer was.

An instance is matched on (group, op, sequence), never on time. With start s_r and end e_r of rank r on the common
clock, d_r = e_r - s_r:

- estimator A, which needs no clock: transfer = min_r d_r, wait_r = d_r - transfer;
- estimator B: wait_r = clip(max_q s_q - s_r, 0, d_r), Scalasca's "wait at NxN".

Both hold only where every rank needs all others: not for rooted or point-to-point operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import first_claims
from hpcmm.analysis.trace import RankTrace

SYNCHRONISING = frozenset({"all_reduce", "all_gather", "reduce_scatter", "barrier"})
POINT_TO_POINT = frozenset({"send", "recv"})

KEY = ["group", "op", "sequence", "occurrence"]


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
            columns=[*columns, "trace", "rank", "node", "instance", "ranks", "complete", "synchronising"]
        )
    rows["instance"] = rows.groupby(KEY, sort=False).ngroup()
    collective = ~rows["op"].isin(POINT_TO_POINT)
    members = rows[collective].groupby("group")["trace"].nunique()
    closed = rows["closed"].groupby(rows["instance"]).sum()
    rows["ranks"] = rows["group"].map(members).fillna(0).astype(np.int64)
    rows["complete"] = collective & (rows["instance"].map(closed) == rows["ranks"])
    rows["synchronising"] = rows["complete"] & rows["op"].isin(SYNCHRONISING) & (rows["ranks"] > 1)
    return rows.sort_values(["trace", "start_ns"], kind="stable", ignore_index=True)


def estimate_waits(rows: pd.DataFrame, clock_error_ns: float) -> pd.DataFrame:
    """Add wait_a_ns, wait_b_ns, wait_ns, transfer_ns, late_rank, lateness_ns and blamable to matched rows.

    ``wait_ns`` is estimator B where the clock's error is below the instance's longest wait by A, else A, which needs no
    clock. The late arriver is named only where the longest wait by B exceeds the clock's error. Operations that do not
    synchronise their ranks have NaN waits.
    """
    duration: pd.Series[float] = (rows["end_ns"] - rows["start_ns"]).astype(np.float64)
    by_instance = rows["instance"]
    applies = rows["synchronising"].to_numpy(bool)
    last = rows.groupby("instance")["start_ns"].transform("max")
    wait_a = duration - duration.groupby(by_instance).transform("min")
    wait_b = (last - rows["start_ns"]).astype(np.float64).clip(upper=duration)
    clock_tells = wait_a.groupby(by_instance).transform("max") > clock_error_ns
    longest = wait_b.groupby(by_instance).transform("max")
    blamable = applies & clock_tells.to_numpy() & (longest.to_numpy() > clock_error_ns)
    wait = np.where(clock_tells, wait_b, wait_a)
    late_rank, lateness = _late_arrivers(rows)
    return rows.assign(
        duration_ns=duration,
        wait_a_ns=wait_a.where(applies),
        wait_b_ns=wait_b.where(applies),
        wait_ns=np.where(applies, wait, np.nan),
        transfer_ns=np.where(applies, duration - wait, duration),
        blamable=blamable,
        late_rank=pd.Series(late_rank, dtype="Int64").where(pd.Series(blamable)),
        lateness_ns=np.where(blamable, lateness, np.nan),
        last_start_ns=last,
    )


def _late_arrivers(rows: pd.DataFrame) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """For each row, its instance's last arriver and how long after the second-last that came."""
    order = np.lexsort((rows["start_ns"].to_numpy(), rows["instance"].to_numpy()))
    instance = rows["instance"].to_numpy()[order]
    is_last = np.append(instance[1:] != instance[:-1], True)[: len(instance)]
    at = np.flatnonzero(is_last)
    start = rows["start_ns"].to_numpy(np.int64)[order]
    has_second = (at > 0) & (instance[at - 1] == instance[at])
    gap = np.where(has_second, start[at] - start[at - 1], 0).astype(np.float64)
    rank = rows["rank"].to_numpy(np.int64)[order][at]
    position = np.searchsorted(instance[at], rows["instance"].to_numpy())
    return rank[position], gap[position]


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
    ranks = np.maximum(rows["ranks"].to_numpy(np.float64), 1)
    op = rows["op"].to_numpy(str)
    partial = np.isin(op, ["all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"])
    factor = np.select([op == "all_reduce", partial], [2 * (ranks - 1) / ranks, (ranks - 1) / ranks], 1.0)
    usable = rows["complete"].to_numpy(bool) & (seconds > 0) & (rows["bytes"].to_numpy() > 0)
    return np.where(usable, rows["bytes"].to_numpy() * factor / np.where(usable, seconds, 1), np.nan)


def expose(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Add exposed_wait_ns and exposed_transfer_ns: what of each collective kept the step thread from working.

    Collectives in flight together are counted once: time belongs to the one that was enqueued first. Where OS calls
    were traced only the time that the step thread was blocked in them counts, so communication behind computation
    costs nothing; else all of it does, which is an upper bound. A collective without an end counts for nothing.
    """
    wait = np.zeros(len(rows))
    transfer = np.zeros(len(rows))
    for index, group in rows[rows["closed"].astype(bool)].groupby("trace", sort=False):
        at = group.index.to_numpy()
        begin, end = first_claims(group["start_ns"].to_numpy(np.int64), group["end_ns"].to_numpy(np.int64))
        wait_end = group["start_ns"].to_numpy(np.int64) + group["wait_ns"].fillna(0).to_numpy().astype(np.int64)
        split = np.clip(wait_end, begin, end)
        blocked = traces[int(str(index))].blocked
        if blocked is None:
            wait[at], transfer[at] = split - begin, end - split
        else:
            wait[at], transfer[at] = blocked.covered_within(begin, split), blocked.covered_within(split, end)
    return rows.assign(exposed_wait_ns=wait, exposed_transfer_ns=transfer)
