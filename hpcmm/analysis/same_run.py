"""Which reports belong together: windows of one process, and processes of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import pandas as pd

from hpcmm.analysis.extraction import ReportFacts
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.trace import RankTrace, joined

Claim = tuple[ReportFacts, RankTrace]
"""A process that a report shows."""


def other_window(claim: Claim, claims: Mapping[int, Sequence[Claim]]) -> int | None:
    """The rank that was given to another window of the same process, or to a copy of its report; None if there is none.

    ``claims``: processes by their rank.
    """
    same = (
        rank
        for rank, own in claims.items()
        if all(
            _are_windows(claim, other) or (is_copy(claim[0], other[0]) and _is_one_process(claim, other))
            for other in own
        )
    )
    return next(same, None)


def is_copy(fact: ReportFacts, other: ReportFacts) -> bool:
    """Whether two reports are one, in two files."""
    mine, its = (
        (each.epoch_ns, each.first_ns, each.span_s, each.events, each.identity, len(each.traces))
        for each in (fact, other)
    )
    return fact.path != other.path and mine == its and all(map(_show_the_same, fact.traces, other.traces))


def _show_the_same(one: RankTrace, other: RankTrace) -> bool:
    tables = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(RankTrace)]
    same = [ours.equals(theirs) for ours, theirs in tables if isinstance(ours, pd.DataFrame)]
    return one.pid == other.pid and all(same)


def _is_one_process(one: Claim, other: Claim) -> bool:
    """Whether both may be of one process: it keeps its number, its environment and NCCL's communicators.

    In containers each run's processes have the same numbers.
    """
    (fact, trace), (fact2, trace2) = one, other
    process = (trace.pid, trace.device, fact.identity.node, fact.job_id)
    if process != (trace2.pid, trace2.device, fact2.identity.node, fact2.job_id):
        return False
    environments = [each.identity.environment for each in (fact, fact2) if each.identity.environment]
    if len(environments) == 2 and environments[0] != environments[1]:
        return False
    groups = [set(each.communicators) for each in (trace, trace2) if each.communicators]
    return len(groups) < 2 or bool(groups[0] & groups[1])


def _are_windows(one: Claim, other: Claim) -> bool:
    """Whether two traces are of one process, at times that do not overlap, as far as both tell them."""
    if not _is_one_process(one, other):
        return False
    times = sorted(time for fact, _ in (one, other) if (time := _time(fact)) is not None)
    return len(times) == 2 and times[0][1] <= times[1][0]


def _time(fact: ReportFacts) -> tuple[int, int] | None:
    """From its first event to its last, in nanoseconds of its node's clock; None if it does not tell."""
    if fact.epoch_ns is None:
        return None
    begin = fact.epoch_ns + fact.first_ns
    return begin, begin + round(fact.span_s * NS_PER_S)


def windows_of(best: Claim, claimants: Sequence[Claim]) -> list[Claim]:
    """``best`` and the other windows of its process, in the order of time."""
    chosen = [best]
    for claim in claimants:
        if claim is not best and all(_are_windows(claim, other) for other in chosen):
            chosen.append(claim)
    return sorted(chosen, key=lambda claim: _time(claim[0]) or (0, 0))


def join_windows(windows: Sequence[Claim]) -> Claim:
    """All windows of a process as one trace, on the clock of the first's report."""
    fact, trace = windows[0]
    for other, later in windows[1:]:
        shift = (other.epoch_ns or 0) - (fact.epoch_ns or 0)
        trace = joined(trace, later.on_clock(lambda times, shift=shift: times + shift))  # type: ignore[misc]
    return fact, trace


@dataclass(eq=False, slots=True)
class Run:
    """Reports whose processes ran at once, or were captured again and again. Each tells its time."""

    facts: list[ReportFacts]
    begin_ns: int
    end_ns: int

    @property
    def claims(self) -> list[Claim]:
        return [(fact, trace) for fact in self.facts for trace in fact.traces]

    @property
    def ranks(self) -> set[int]:
        """Those that are known."""
        return {trace.rank for _, trace in self.claims if trace.rank >= 0}

    @property
    def nodes(self) -> set[str]:
        return {fact.identity.node for fact in self.facts if fact.identity.node is not None}

    @property
    def nodes_of_unknown(self) -> set[str]:
        """The nodes of processes whose rank nothing tells."""
        told = {fact.identity.node for fact, trace in self.claims if trace.rank < 0}
        return {node for node in told if node is not None}

    @property
    def steps(self) -> int:
        return sum(len(trace.steps) for _, trace in self.claims)

    @property
    def processes(self) -> int:
        return len({(fact.identity.node, trace.pid) for fact, trace in self.claims})

    def is_apart_from(self, other: Run) -> bool:
        """Whether it has a rank that the other has, or either a process of unknown rank on a node of the other's."""
        return bool(
            self.ranks & other.ranks or self.nodes_of_unknown & other.nodes or other.nodes_of_unknown & self.nodes
        )


def runs_of(facts: Iterable[ReportFacts]) -> list[Run]:
    """Reports by the run that they are of; those that tell no time, or show no process, are of none.

    On one node the order of times is sure. If each node has as many runs as the others, the first of each is the first
    run, however far apart their clocks are. Otherwise the clocks tell which belong together.
    """
    each = [
        Run([fact], fact.epoch_ns, time[1])
        for fact in facts
        if fact.traces and fact.epoch_ns is not None and (time := _time(fact)) is not None
    ]
    working = [run for run in each if any(len(trace.steps) or len(trace.collectives) for _, trace in run.claims)]
    runs = _in_order(working or each)
    for run in each if working else ():
        within = [other for other in runs if other.begin_ns <= run.end_ns and run.begin_ns <= other.end_ns]
        if run not in working and len(within) == 1:  # one that lies in several, such as a launcher's, joins none
            within[0].facts.extend(run.facts)
    return runs


def _in_order(each: Sequence[Run]) -> list[Run]:
    by_node: dict[str | None, list[Run]] = {}
    for run in each:
        by_node.setdefault(run.facts[0].identity.node, []).append(run)
    nodes = [_at_once(reports) for reports in by_node.values()]
    if len({len(runs) for runs in nodes}) == 1 and len(nodes[0]) > 1:
        return [_merged(runs) for runs in zip(*nodes, strict=True)]
    return _at_once([run for runs in nodes for run in runs])


def _at_once(each: Iterable[Run]) -> list[Run]:
    """Those whose times have a part in common, or that have a process in common, as one; by their begin."""
    runs: list[Run] = []
    for run in sorted(each, key=lambda run: run.begin_ns):
        same = [other for other in runs if other.end_ns >= run.begin_ns or _have_one_process(other, run)]
        runs = [other for other in runs if other not in same] + [_merged([*same, run])]
    return sorted(runs, key=lambda run: run.begin_ns)


def _have_one_process(run: Run, other: Run) -> bool:
    return any(_is_one_process(one, two) for one in run.claims for two in other.claims)


def _merged(parts: Sequence[Run]) -> Run:
    facts = [fact for part in parts for fact in part.facts]
    return Run(facts, min(part.begin_ns for part in parts), max(part.end_ns for part in parts))
