"""Which reports belong together: windows of one process, and processes of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpcmm.analysis.extraction import ReportFacts
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.trace import RankTrace, joined


def other_window(
    fact: ReportFacts, trace: RankTrace, claims: dict[int, list[tuple[ReportFacts, RankTrace]]]
) -> int | None:
    """The rank that was given to an earlier or later window of the same process; None if there is none."""
    same = (rank for rank, own in claims.items() if all(_are_windows((fact, trace), claim) for claim in own))
    return next(same, None)


def _are_windows(one: tuple[ReportFacts, RankTrace], other: tuple[ReportFacts, RankTrace]) -> bool:
    """Whether two traces are of one process, at times that do not overlap, as far as both tell them."""
    (fact, trace), (fact2, trace2) = one, other
    process = (trace.pid, trace.device, fact.identity.node, fact.job_id)
    if process != (trace2.pid, trace2.device, fact2.identity.node, fact2.job_id):
        return False
    if fact.epoch_ns is None or fact2.epoch_ns is None:
        return False
    begin, begin2 = fact.epoch_ns + fact.first_ns, fact2.epoch_ns + fact2.first_ns
    return begin + fact.span_s * NS_PER_S <= begin2 or begin2 + fact2.span_s * NS_PER_S <= begin


def windows_of(
    best: tuple[ReportFacts, RankTrace], claimants: Sequence[tuple[ReportFacts, RankTrace]]
) -> list[tuple[ReportFacts, RankTrace]]:
    """``best`` and the other windows of its process, in the order of time."""
    chosen = [best]
    for claim in claimants:
        if claim is not best and all(_are_windows(claim, other) for other in chosen):
            chosen.append(claim)
    return sorted(chosen, key=lambda claim: (claim[0].epoch_ns or 0) + claim[0].first_ns)


def join_windows(windows: Sequence[tuple[ReportFacts, RankTrace]]) -> tuple[ReportFacts, RankTrace]:
    """All windows of a process as one trace, on the clock of the first's report."""
    fact, trace = windows[0]
    for other, later in windows[1:]:
        shift = (other.epoch_ns or 0) - (fact.epoch_ns or 0)
        trace = joined(trace, later.on_clock(lambda times, shift=shift: times + shift))  # type: ignore[misc]
    return fact, trace


@dataclass(eq=False, slots=True)
class Run:
    """Reports whose processes ran at once, or were captured again and again."""

    facts: list[ReportFacts]
    begin_ns: int
    end_ns: int
    processes: set[tuple[object, ...]]
    places: set[int | str]
    """The ranks of its processes, and the nodes of those whose rank nothing tells."""

    @property
    def merit(self) -> tuple[int, int, int]:
        """The run with the most processes is looked at, of those the one with the most steps, then the latest."""
        steps = sum(len(trace.steps) for fact in self.facts for trace in fact.traces)
        return len(self.processes), steps, self.begin_ns


def runs_of(facts: Iterable[ReportFacts]) -> list[Run]:
    """Reports by the run that they are of, as far as they tell their time."""
    each = [
        Run(
            [fact],
            fact.epoch_ns,
            fact.epoch_ns + fact.first_ns + round(fact.span_s * NS_PER_S),
            {(trace.pid, fact.identity.node) for trace in fact.traces},
            {trace.rank if trace.rank >= 0 else fact.identity.node or "" for trace in fact.traces} - {""},
        )
        for fact in facts
        if fact.epoch_ns is not None
    ]
    runs: list[Run] = []
    for run in sorted(each, key=lambda run: run.begin_ns):
        same = [other for other in runs if other.end_ns >= run.begin_ns or other.processes & run.processes]
        runs = [other for other in runs if other not in same] + [_merged([*same, run])]
    return runs


def _merged(parts: Sequence[Run]) -> Run:
    return Run(
        [fact for part in parts for fact in part.facts],
        min(part.begin_ns for part in parts),
        max(part.end_ns for part in parts),
        set().union(*(part.processes for part in parts)),
        set().union(*(part.places for part in parts)),
    )
