"""The network against what it can do: the node behind a slow link, and whether transfer is far below the links' rate.

Before that: what each kind of transfer costs, and whether what seems transfer is any.

Where data trickle in tells which hop is slow. Which end of it is at fault tell the links' own counters, which the first
rank of each node noted, or that a node has slow hops to several others.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import collectives, nccl, parallelism, process_groups
from hpcmm.analysis.collectives import FROM_ROOT, bus_rate, size_in_words
from hpcmm.analysis.findings import CAUSES, HIGH, LOW, MEDIUM, AnalysisContext, Finding
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.osrt import STEP_THREAD
from hpcmm.analysis.parallelism import Stages
from hpcmm.analysis.process_groups import Unseen
from hpcmm.analysis.trace import NO_PEER, WORKER, RankTrace
from hpcmm.runs.links import LinkUse, Network

RECEIVING = frozenset({"recv", "recvfrom", "recvmsg", "readv"})
TRICKLE = 3.0
"""A rank's data trickle in when it receives so many times as often as the lower quartile of ranks ..."""
CONFIRMS = 2.0
"""... and so many times already if a link's own counters say the same."""
MIN_CALLS = 20
SLOWER_LINK = 0.5
"""A node's link is slow if it runs at most at this share of the other nodes' median rate."""
MOST_OTHERS = 0.1
"""A node's own queue holds its packets back if any other node's does so at most this share as often ..."""
LEAST_HELD_BACK = 100
"""... and it does so this often."""
NEAR = 0.5
"""Transfer uses the network well from this share of what that can do on."""
BELOW_MEASURED = 0.5
"""It is far below it under this share of what the check of the nodes measured, in the same way as the ranks ..."""
BELOW_RATE = 0.1
"""... or of the rate of the links, of which TCP on few cores and small messages leave only a part."""
BITS = 8


class SlowLink(NamedTuple):
    """What is known of it; both empty if nothing shows one."""

    node: str
    about: str


class Standing(NamedTuple):
    """Achieved bandwidth against what the network can do."""

    is_slow: bool
    about: str
    """In words; empty if that is not known, or the ranks share a node."""


def slow_link(
    traces: Sequence[RankTrace], network: Network, *, is_ring: bool, is_bound_by_bandwidth: bool = True
) -> SlowLink:
    """The node behind a slow link, or else the hops that are slow.

    ``is_ring``: most bytes go through gloo's ring of all ranks, in which each receives from the next one.
    """
    trickling = _trickling(traces, TRICKLE)
    between = _between_two(traces, trickling)
    if between.node:
        return between
    ring = _ring(traces, trickling) if is_ring else []
    hops = {(hop.source, hop.target) for hop in ring if hop.is_slow}
    about = ""
    if hops:
        ranks = ", ".join(str(trace.rank) for trace, slow in zip(traces, trickling, strict=True) if slow)
        ways = ", ".join(f"from {source} to {target}" for source, target in sorted(hops))
        about = f"data trickle in at rank{'s' if ' ' in ranks else ''} {ranks}: slow {ways}"
    odd = _odd_link({node: use for node, use in network.links.items() if node in {trace.node for trace in traces}})
    if (
        odd.node
        and is_bound_by_bandwidth
        and (not is_ring or _may_be(odd.node, _ring(traces, _trickling(traces, CONFIRMS))))
    ):
        return SlowLink(odd.node, "; ".join(filter(None, [about, odd.about])))
    ends = Counter(node for hop in hops for node in hop)
    shared = [node for node, count in ends.items() if count == len(hops)]
    neighbours = {node for hop in hops for node in hop} - set(shared)
    if len(hops) > 1 and len(shared) == 1 and len(neighbours) > 1:
        return SlowLink(shared[0], f"{about}; {shared[0]} is an end of each")
    return SlowLink("", about)


class _Hop(NamedTuple):
    source: str
    target: str
    is_slow: bool


def _may_be(node: str, ring: Sequence[_Hop]) -> bool:
    """Whether ``node`` is an end of a slow hop of ``ring``, or none could be seen to be slow.

    That is so if each hop is between it and another node, so that all are alike, or if none is known.
    """
    slow = [hop for hop in ring if hop.is_slow]
    if slow:
        return any(node in hop[:2] for hop in slow)
    return all(hop.source != hop.target and node in hop[:2] for hop in ring)


def _trickling(traces: Sequence[RankTrace], times: float) -> npt.NDArray[np.bool_]:
    calls = np.array([_receives(trace) for trace in traces], dtype=np.float64)
    usual = float(np.quantile(calls, 0.25)) if len(calls) else 0.0
    return calls > times * usual if usual >= MIN_CALLS else np.zeros(len(calls), dtype=bool)


def _receives(trace: RankTrace) -> int:
    """How often the process's own threads, other than the one that trains, have received."""
    table = trace.osrt
    if table.empty:
        return 0
    mine = (table["process_role"] == WORKER) & (table["thread_role"] != STEP_THREAD) & table["function"].isin(RECEIVING)
    return int(table.loc[mine, "calls"].sum())


def _between_two(traces: Sequence[RankTrace], trickling: npt.NDArray[np.bool_]) -> SlowLink:
    """A node on both sides of which data trickle in at both ends of the hop."""
    order = np.argsort([trace.rank for trace in traces], kind="stable")
    slow_hops = {
        (traces[here].node, traces[there].node)
        for here, there in zip(order, np.roll(order, -1), strict=True)
        if trickling[here] and trickling[there] and traces[here].node != traces[there].node
    }
    hops = Counter(node for pair in slow_hops for node in set(pair))
    most = [node for node, count in hops.items() if count == max(hops.values()) and count > 1]
    if len(most) != 1:
        return SlowLink("", "")
    neighbours = sorted({node for pair in slow_hops if most[0] in pair for node in pair} - {most[0]})
    if len(neighbours) < 2:
        return SlowLink("", "")
    calls = np.array([_receives(trace) for trace in traces], dtype=np.float64)
    usual = float(np.quantile(calls, 0.25))
    ranks = ", ".join(str(trace.rank) for trace, slow in zip(traces, trickling, strict=True) if slow)
    return SlowLink(
        most[0],
        f"data trickle in at ranks {ranks}, which receive {TRICKLE:.0f} to {float(calls.max()) / usual:.0f} times as "
        f"often as others: the hops between {most[0]} and its neighbours {' and '.join(neighbours)} are slow",
    )


def _ring(traces: Sequence[RankTrace], trickling: npt.NDArray[np.bool_]) -> list[_Hop]:
    """The hops of a ring in which each rank receives from the next, slow if data trickle in from another node; none if
    too few receives were seen to tell."""
    if np.quantile([_receives(trace) for trace in traces], 0.25) < MIN_CALLS:
        return []
    order = np.argsort([trace.rank for trace in traces], kind="stable")
    hops = [(traces[sender].node, receiver) for receiver, sender in zip(order, np.roll(order, -1), strict=True)]
    return [
        _Hop(source, traces[receiver].node, bool(trickling[receiver]) and source != traces[receiver].node)
        for source, receiver in hops
    ]


def _odd_link(links: Mapping[str, LinkUse]) -> SlowLink:
    """The one node whose link is slower than the others' by its own word, or whose queue holds packets back."""
    if len(links) < 2:
        return SlowLink("", "")
    for node, use in links.items():
        others = [other for name, other in links.items() if name != node]
        rates = [other.mbit_per_s for other in others if other.mbit_per_s]
        if 0 < use.mbit_per_s <= SLOWER_LINK * (statistics.median(rates) if len(rates) == len(others) else 0.0):
            told = f"{use.name} of {node} runs at {use.mbit_per_s} Mbit/s, the others' at {statistics.median(rates):g}"
            return SlowLink(node, told)
    for node, use in links.items():
        most = max(other.held_back for name, other in links.items() if name != node)
        if use.held_back >= LEAST_HELD_BACK and most <= MOST_OTHERS * use.held_back:
            told = f"{use.name} of {node} held packets back {use.held_back} times for the shaper on it ({use.queue})"
            return SlowLink(node, f"{told}, and no other node's link did" if not most else told)
    return SlowLink("", "")


def standing(rows: pd.DataFrame, network: Network, traces: Sequence[RankTrace]) -> Standing:
    """How the bandwidth of ``rows``, one row a rank and collective, stands to what the network can do.

    What the check before the run measured goes before the rate of the links, and nothing is judged without either.
    """
    nodes = {trace.node for trace in traces}
    spread = rows.groupby("group")["node"].nunique()
    rows = rows[rows["group"].map(spread) > 1]
    rate = bus_rate(rows) if len(rows) else 0.0
    if rate <= 0:
        return Standing(False, "")
    # Groups side by side share the link of their node.
    share = int(rows.groupby("node")["group"].nunique().max())
    used, each = rate * share, f", of each of {share} groups that share a link" if share > 1 else ""
    measured = [network.measured_bytes_per_s[node] for node in nodes if node in network.measured_bytes_per_s]
    links = [network.links[node].mbit_per_s for node in nodes if node in network.links]
    if len(measured) == len(nodes):
        can, below = statistics.median(measured), BELOW_MEASURED
        against = f"the {size_in_words(can)}/s that the check before the run measured"
    elif len(links) == len(nodes) and all(links):
        can, below = min(links) * 1e6 / BITS, BELOW_RATE
        against = f"the {size_in_words(can)}/s of the slowest link"
    else:
        return Standing(False, "")
    told = f"that is {used / can:.0%} of {against}{each}"
    if used < below * can:
        return Standing(True, f"{told}: the network is slow, or others use it")
    return Standing(False, told + (": the network is used well" if used >= NEAR * can else ""))


_MATCHED = 0.9
"""From this share of the operations on, what is left of them is transfer."""
_MOSTLY = 0.5
"""Up to this share nothing tells transfer from waiting."""
_SURE = 0.1
"""Up to this share of it may be waiting, and what is left is still transfer for sure."""


def unseen(context: AnalysisContext) -> Unseen:
    """The ranks that others may wait for, although no report shows them."""
    stepping = [trace for trace in context.traces if len(trace.steps)]
    return process_groups.unseen_ranks(context.rows, stepping, context.expected_ranks)


def transfer_or_waiting(context: AnalysisContext, inside: pd.DataFrame) -> tuple[str, str, str]:
    """Cause, confidence and evidence: whether what seems transfer can be waiting for a rank that was not seen."""
    absent = unseen(context)
    matched = float((inside["complete"].astype(bool) & (inside["ranks"] > 1)).mean()) if len(inside) else 0.0
    if absent.missing > 0:
        told = absent.in_words(with_steps=True)
        return CAUSES["unseen"], LOW, f"{told}, and part of this may be waiting for them"
    untold = float(is_untold(inside).mean()) if len(inside) else 0.0
    if untold > 1.0 - _MATCHED:
        why = (
            f"{untold:.0%} of the operations are sends and receives, of several kinds, or from a root that is not known"
        )
        return CAUSES["gpu_comm"], LOW, f"{why}, which do not tell who waits for whom: part of this may be waiting"
    if matched > _MATCHED:
        told = "all ranks are there, the transfer itself takes the time"
        unsure, error_s = _unsure(inside)
        if unsure > _SURE:
            told = f"up to {unsure:.0%} of it may be waiting: the clocks of the ranks agree within {error_s:.3g} s only"
        return CAUSES["transfer"], HIGH if unsure <= _SURE else MEDIUM if unsure <= 0.5 else LOW, told
    why = withdrawn(inside) or f"only {matched:.0%} of the operations were seen on several ranks and all of their group"
    told = f"{why}: part of this may be waiting"
    if matched <= _MOSTLY and len(context.traces) > 1:
        return CAUSES["gpu_comm"], LOW, told
    return CAUSES["transfer"], MEDIUM if matched > _MOSTLY else LOW, told


def withdrawn(rows: pd.DataFrame) -> str:
    """That the matches of most of ``rows``, collectives, were withdrawn, and why; empty if they were not."""
    share = float((rows["basis"] == nccl.UNCONFIRMED).mean()) if len(rows) else 0.0
    if share <= _MOSTLY:
        return ""
    return (
        f"{share:.0%} of the operations could not be matched between ranks: the order of their kernels does not fit "
        "their times, as if captures began at different iterations"
    )


def is_untold(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which collectives do not tell who waits for whom: kernels of NCCL alone do not name a root or a receiver."""
    from_unknown = rows["op"].isin(FROM_ROOT) & (rows["peer"] == NO_PEER)
    return rows["op"].isin(nccl.UNTOLD) | from_unknown


def _unsure(inside: pd.DataFrame) -> tuple[float, float]:
    """The share of the transfer that may be waiting for all that the clocks tell, and their error in seconds."""
    exposed = inside["exposed_transfer_ns"]
    unsure = float(np.minimum(exposed, inside["unsure_ns"]).sum()) / max(float(exposed.sum()), 1.0)
    return unsure, float(inside["clock_error_ns"].max()) / NS_PER_S


def what_measures(nodes: int) -> str:
    """What tells the bandwidth between so many nodes."""
    tools = f"python -m hpcmm.doctor cluster=... --nodes {nodes}, iperf3 or all_reduce_perf of nccl-tests measure it"
    return f"{tools}, though of two nodes nothing tells which one is slow" if nodes == 2 else tools


_PHASE_SHARE = 0.1
"""A phase is named for communication that spreads over several when it holds this share of it."""
_MOST_SINGLE = 1.5
"""Up to so many messages a step, most steps have one."""


def transfer(context: AnalysisContext, explained_s: float, stages: Stages) -> list[Finding]:
    """Exposed communication that neither a late rank explains nor one that stood still (``explained_s``).

    One row for each thing that moves, since each has its own advice; a slow link, or what may be
    waiting for ranks without a report, has one row for all of them.
    """
    rows = context.rows
    inside = rows[rows["step"].isin(context.steps.numbers)] if len(rows) else rows
    inside = parallelism.without_bubble(inside, stages) if len(inside) else inside
    if inside.empty:
        return []
    count = rank_steps(context)
    exposed_s = float(inside["exposed_transfer_ns"].sum()) / NS_PER_S / count
    left = max(0.0, exposed_s - explained_s) / exposed_s if exposed_s > 0 else 0.0
    bytes_of = inside.groupby("group")["bytes"].sum()
    widest = inside.loc[inside["group"] == bytes_of.idxmax(), "trace"].nunique() == len(context.traces)
    start_s = collectives.start_up_s(inside)
    link = slow_link(
        context.traces,
        context.network,
        is_ring=widest and context.gpu.empty,
        is_bound_by_bandwidth=collectives.bound_by(inside, start_s) == "bandwidth",
    )
    moves = parallelism.what_moves(inside, stages)
    largest = inside.groupby(moves)["exposed_transfer_ns"].sum().idxmax()
    kinds = (
        {str(largest): np.ones(len(inside), dtype=bool)}
        if link.node or unseen(context).missing > 0
        else {str(each): moves == each for each in dict.fromkeys(moves)}
    )
    return [_transfer_of(context, inside[chosen], left, str(kind), link, start_s) for kind, chosen in kinds.items()]


def without_waiting(findings: Sequence[Finding], waited_s: float) -> list[Finding]:
    """``findings`` without the waiting for ranks without a report that is in other rows."""
    if not waited_s:
        return list(findings)
    told = f"; {waited_s:.3g} s a step of it is in rows of who is waited for"
    return [
        replace(each, lost_s=max(0.0, each.lost_s - waited_s), evidence=each.evidence + told)
        if each.kind == "unseen"
        else each
        for each in findings
    ]


def rank_steps(context: AnalysisContext) -> int:
    """What a mean over ranks and steps of their communication is over: steps that a rank did not record, and ranks
    whose communication nobody recorded, are not steps in which nothing was exchanged."""
    numbers = context.steps.numbers
    each = [int(trace.steps["step"].isin(numbers).sum()) for trace in context.traces if len(trace.collectives)]
    return max(sum(each), 1)


def _transfer_of(
    context: AnalysisContext, rows: pd.DataFrame, left: float, moves: str, link: SlowLink, start_s: float | None
) -> Finding:
    """The row of what ``rows`` carry; ``left`` is the share of their time that nothing else explains."""
    count = rank_steps(context)
    lost = left * float(rows["exposed_transfer_ns"].sum()) / NS_PER_S / count
    by_phase = rows.groupby("phase")["exposed_transfer_ns"].sum()
    shares = (by_phase / max(float(by_phase.sum()), 1.0)).sort_values(ascending=False)
    phase = ", ".join(str(name) for name in shares[shares >= _PHASE_SHARE].index)
    cause, confidence, why = transfer_or_waiting(context, rows)
    bound = collectives.bound_by(rows, start_s) if cause != CAUSES["gpu_comm"] else ""
    told = f"{collectives.in_words(rows, count)}; {why}"
    # Of whom a group is, only its members tell.
    name = "" if cause == CAUSES["unseen"] else parallelism.group_name(rows, moves, context.traces)
    told += f"; {name}" if name else ""
    against = standing(rows, context.network, context.traces) if bound != "latency" else Standing(False, "")
    told += f"; {against.about}" if against.about else ""
    if bound == "bandwidth" and not (link.about or against.about or name.endswith("within a node")):
        told += f"; what the network can do is not known: {what_measures(len(context.nodes()))}"
    if cause == CAUSES["transfer"]:
        of = f" of {moves}" if moves else ""
        bounds = ", far below what the network can do" if against.is_slow else f", bound by {bound}" if bound else ""
        cause += of + bounds
    by_step = rows.groupby("step")["exposed_transfer_ns"].sum().reindex(context.steps.numbers).fillna(0.0)
    worst = context.worst_step(by_step.to_numpy(np.float64))
    most = rows.iloc[int(rows["exposed_transfer_ns"].to_numpy(np.float64).argmax())]
    where = f"collectives: step={most['step']} op={most['op']} group={most['group']} sequence={most['sequence']}"
    node, about = link
    if about:
        told += f"; {about}"
        confidence = MEDIUM if node and confidence == HIGH else confidence
    kinds = {CAUSES[kind]: kind for kind in ("gpu_comm", "unseen")}
    kind = "transfer" if node else kinds.get(cause, "transfer")
    found = Finding(kind, cause, lost, None, node, phase, told, confidence, where, worst)
    is_single = bound == "latency" and len(rows) <= _MOST_SINGLE * count
    bytes_of_it = float(rows["bytes"].sum()) / count
    is_in_node = name.endswith("within a node")
    found = replace(found, moves=moves, bound=bound, is_single=is_single, is_in_node=is_in_node, step_bytes=bytes_of_it)
    return replace(found, is_slow=against.is_slow or (bound == "bandwidth" and link.about != ""))
