"""Which node is behind a slow link, from how its ranks' data trickle in.

A receiver on a fast link finds much to read whenever it looks; on a link that is full it reads a packet's worth at a
time, so that it calls ``recv`` many times more often for the same bytes. Where ranks pass data on to their neighbours
(a ring, as Gloo's and NCCL's larger collectives do), the two hops over a slow node's link stand out, one on each side
of it: the node that both have in common is behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hpcmm.analysis.osrt import STEP_THREAD
from hpcmm.analysis.trace import RankTrace
from hpcmm.analysis.waitpid import WORKER

RECEIVING = frozenset({"recv", "recvfrom", "recvmsg", "readv"})
TRICKLE = 3.0
"""A rank's data trickle in when it receives so many times as often as the lower quartile of ranks."""
MIN_CALLS = 20


def slow_node(traces: Sequence[RankTrace]) -> tuple[str, str]:
    """The node behind a slow link and what shows it, in words; both empty where nothing does."""
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
