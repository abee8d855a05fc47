"""A delay that was itself caused by waiting passes back to its own cause, through any number of groups.

Ranks of one group (tensor, pipeline, expert or data parallel) may be late because they waited in another. For each
late arrival the waiting in other groups since the group's last synchronisation, as far as it exceeds the median over
the group's ranks, competes with the parts of the rank's own work; its share of the charge goes to those who were waited
for there, in proportion, and on to what had kept them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import (
    Charges,
    Floats,
    GroupArrivals,
    Singles,
    WorkParts,
    attribute_wait,
    awaited,
    excess_work,
    fractions,
    group_arrivals,
    window_starts,
)
from hpcmm.analysis.intervals import first_claims

Cause = tuple[int, int]
"""Trace, and part of its work (the last for what no part explains)."""
NEGLIGIBLE = 1e-3
"""Shares of a charge below this are not followed further."""
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss that each rank's parts cause in each step: shape (steps, traces, parts + 1), ns, mean over all ranks."""

    total: Floats
    own: Floats
    """What of ``total`` is the late rank's own work; the rest is waiting of others."""


def losses_by_step(
    groups: Sequence[ChargedGroup], traces: int, parts: WorkParts, steps: npt.NDArray[np.int64]
) -> Losses:
    """Charge all waiting, and the excess work behind it. A delay counts in the step in which the late rank arrived.

    Collectives outside ``steps`` are left out. What of a rank's excess time it waited itself is charged to whom it
    waited for, as waiting, and not once more.
    """
    total = np.zeros((len(steps), traces, len(parts.names) + 1))
    own_work = np.zeros_like(total)
    if not len(steps):
        return Losses(total, own_work)
    all_charges = [attribute_wait(group.arrivals) for group in groups]
    all_excess = _own_once(groups, all_charges, traces, parts)
    if len(groups) > 1:
        chain = WaitChain(groups)
        all_excess = chain.without_repeats(all_excess, all_charges, parts)
    for index, (group, charges, excess) in enumerate(zip(groups, all_charges, all_excess, strict=True)):
        arrivals, cost = group.arrivals, charges.caused
        place = np.searchsorted(steps, arrivals.step)
        known = np.append(steps, np.iinfo(np.int64).min)[place] == arrivals.step
        # Of each charge the part that the late rank waited itself goes on to whom it had waited for.
        passed = chain.passed_on(index) if len(groups) > 1 else np.zeros_like(cost)
        kept = (1.0 - passed) * known
        for column, trace in enumerate(arrivals.members):
            at = np.minimum(place[:, column], len(steps) - 1).astype(np.intp)
            share = kept[:, column, None] * group.fractions[:, column]
            np.add.at(total[:, int(trace)], at, cost[:, column, None] * share)
            np.add.at(own_work[:, int(trace)], at, excess[:, column, None] * share)
        for instance, column in np.argwhere((passed > 0) & known & (cost > 0)):
            for (trace, part), share in chain.waiting_cause(index, int(instance), int(column)).items():
                total[place[instance, column], trace, part] += cost[instance, column] * passed[instance, column] * share
    return Losses((total + own_work) / max(traces, 1), own_work / max(traces, 1))


def _own_once(
    groups: Sequence[ChargedGroup], charges: Sequence[Charges], traces: int, parts: WorkParts
) -> list[Floats]:
    """Own excess work behind each late arrival of each group, shapes (instances, members), ns.

    A moment of work counts once, in the group for which it is the first to be late, and only work counts.
    """
    found = [np.zeros_like(of_group.own) for of_group in charges]
    for trace in range(traces):
        of_trace = [(index, group.column[trace]) for index, group in enumerate(groups) if trace in group.column]
        if not of_trace:
            continue
        begin = np.concatenate([charges[index].late_from[:, column] for index, column in of_trace])
        end = np.concatenate([groups[index].arrivals.start[:, column] for index, column in of_trace])
        order = np.argsort(begin, kind="stable")
        pieces = first_claims(begin[order].astype(np.int64), np.maximum(begin, end)[order].astype(np.int64))
        work = np.empty_like(begin)
        work[order] = parts.between(trace, *(piece.astype(np.float64) for piece in pieces)).sum(axis=1)
        place = 0
        for index, column in of_trace:
            count = len(found[index])
            found[index][:, column] = work[place : place + count] * charges[index].scale[:, column]
            place += count
    return found


def _late_work(group: ChargedGroup, charges: Charges, parts: WorkParts) -> Floats:
    """What each member worked between the usual arrival and its own, as far as that counts; (instances, members)."""
    work = np.empty_like(charges.own)
    for trace, column in group.column.items():
        begin, end = charges.late_from[:, column], group.arrivals.start[:, column]
        work[:, column] = parts.between(trace, begin, np.maximum(begin, end)).sum(axis=1)
    return work * charges.scale


def _sums_before(values: Floats) -> Floats:
    """Sums of ``values`` (instances, members) before each instance, and of all of them: one row more."""
    return np.concatenate((np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)))


def charged_groups(rows: pd.DataFrame, parts: WorkParts) -> list[ChargedGroup]:
    """All groups of the matched collectives ``rows``, ordered as :func:`~hpcmm.analysis.delay_costs.group_arrivals`."""
    found = []
    for arrivals in group_arrivals(rows):
        begin = window_starts(arrivals, awaited(arrivals, parts))
        found.append(ChargedGroup(arrivals, excess_work(arrivals, parts, begin), begin))
    return found


class ChargedGroup:
    """One group's arrivals, and which part of its own work made each of them late."""

    def __init__(self, arrivals: GroupArrivals, excess: Singles, begin: Floats) -> None:
        self.arrivals = arrivals
        self.excess_ns = excess.sum(axis=2, dtype=np.float64)
        self.fractions = fractions(excess)
        self.begin = begin
        self.column = {int(trace): column for column, trace in enumerate(arrivals.members)}
        self.waited_before = _sums_before(np.where(arrivals.blamable[:, None], arrivals.exposed, 0.0))
        """Exposed waiting of each member before each instance."""

    def instances_within(
        self, column: int, begin: Floats, end: Floats
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """First and one past the last instance at which the member arrived within each window."""
        starts = np.maximum.accumulate(self.arrivals.start[:, column])
        return np.searchsorted(starts, begin, side="left"), np.searchsorted(starts, end, side="left")

    def late(self, instance: int, column: int) -> list[tuple[int, float]]:
        """Columns of the members that this one waited for, and their shares of its waiting."""
        start = self.arrivals.start[instance]
        order = np.argsort(start, kind="stable")
        position = int(np.flatnonzero(order == column)[0])
        # Each gap between two later arrivals is shared by all who were still missing then.
        gaps = np.diff(start[order])[position:]
        if not len(gaps) or gaps.sum() <= 0:
            return []
        share = np.cumsum(gaps / np.arange(len(gaps), 0, -1)) / gaps.sum()
        return [(int(late), float(part)) for late, part in zip(order[position + 1 :], share, strict=True)]


class WaitChain:
    """Causes of waiting across groups, each found once."""

    def __init__(self, groups: Sequence[ChargedGroup]) -> None:
        self._groups = groups
        self._of_trace: dict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            for trace in group.column:
                self._of_trace[trace].append(index)
        self._passed: list[Floats] = [self._share_of_waiting(index) for index in range(len(groups))]
        self._known: dict[tuple[int, int, int], dict[Cause, float]] = {}

    def passed_on(self, index: int) -> Floats:
        """Share of each arrival's lateness that is due to waiting in other groups, shape (instances, members)."""
        return self._passed[index]

    def without_repeats(self, own: Sequence[Floats], charges: Sequence[Charges], parts: WorkParts) -> list[Floats]:
        """``own`` excess work without what had counted in another group already; shapes (instances, members), ns.

        A rank that is late in its tensor group is as late in its data group, although it works no longer than its
        peers between the two. What it worked too long since the data group's last synchronisation, and the usual
        arrival (the lower median) had not, nor waited for, is behind its lateness there, too.
        """
        waited = [group.waited_before for group in self._groups]
        counted = [np.zeros_like(sums) for sums in waited]
        found = [np.zeros_like(each) for each in own]
        # Groups that synchronise often come first: they are the nearest to the work.
        often_first = sorted(range(len(own)), key=lambda index: -len(own[index]))
        late = [_late_work(group, of_group, parts) for group, of_group in zip(self._groups, charges, strict=True)]
        lacked = [np.minimum(self._beyond_usual(index, waited), 0.0) for index in range(len(own))]
        for index in [*often_first, *often_first]:
            known = np.maximum(self._beyond_usual(index, counted) + lacked[index], 0.0)
            found[index] = np.minimum(own[index], np.maximum(late[index] - known, 0.0))
            counted[index] = _sums_before(found[index] * (1.0 - self._passed[index]))
        return found

    def _beyond_usual(self, index: int, before: Sequence[Floats]) -> Floats:
        """By how much :meth:`_in_others` is more than that of each instance's lower median arrival."""
        start = self._groups[index].arrivals.start
        usual = np.argsort(start, axis=1, kind="stable")[:, [(start.shape[1] - 1) // 2]]
        values = self._in_others(index, before)
        beyond: Floats = values - np.take_along_axis(values, usual, axis=1)
        return beyond

    def _in_others(self, index: int, before: Sequence[Floats]) -> Floats:
        """What other groups hold of each member since the last synchronisation before each arrival, shape (instances,
        members); ``before`` are the sums before each of their instances, shapes (instances + 1, members)."""
        group = self._groups[index]
        found = np.zeros_like(group.arrivals.start)
        begin, end = np.nan_to_num(group.begin, nan=np.inf), group.arrivals.start
        for trace, column in group.column.items():
            for other in self._of_trace[trace]:
                if other != index:
                    theirs = self._groups[other]
                    own = theirs.column[trace]
                    first, last = theirs.instances_within(own, begin[:, column], end[:, column])
                    sums = before[other][:, own]
                    found[:, column] += sums[np.maximum(first, last)] - sums[first]
        return found

    def _share_of_waiting(self, index: int) -> Floats:
        group = self._groups[index]
        waited = self._in_others(index, [each.waited_before for each in self._groups])
        # Waiting that all members had alike delays none of them against the others.
        excess = np.maximum(waited - np.median(waited, axis=1, keepdims=True), 0.0)
        whole = excess + group.excess_ns
        share = np.divide(excess, whole, out=np.zeros_like(excess), where=whole > 0)
        return np.where(share > NEGLIGIBLE, share, 0.0)

    def cause(self, index: int, instance: int, column: int, depth: int = 0) -> dict[Cause, float]:
        """What made a member late at an instance; shares that add up to 1."""
        key = (index, instance, column)
        if key not in self._known:
            group = self._groups[index]
            trace = int(group.arrivals.members[column])
            passed = float(self._passed[index][instance, column]) if depth < MAX_DEPTH else 0.0
            found: dict[Cause, float] = defaultdict(float)
            for part in np.flatnonzero(group.fractions[instance, column] > 0):
                found[trace, int(part)] += (1.0 - passed) * float(group.fractions[instance, column, part])
            if passed:
                for cause, share in self.waiting_cause(index, instance, column, depth).items():
                    found[cause] += passed * share
            self._known[key] = dict(found)
        return self._known[key]

    def waiting_cause(self, index: int, instance: int, column: int, depth: int = 0) -> dict[Cause, float]:
        """What a member had waited for in other groups before it arrived; shares that add up to 1."""
        group = self._groups[index]
        trace = int(group.arrivals.members[column])
        window = group.begin[[instance], column], group.arrivals.start[[instance], column]
        found: dict[Cause, float] = defaultdict(float)
        for other in self._of_trace[trace]:
            if other == index:
                continue
            theirs = self._groups[other]
            own = theirs.column[trace]
            first, last = (int(bound[0]) for bound in theirs.instances_within(own, *window))
            waits = np.diff(theirs.waited_before[first : last + 1, own])
            for place in np.flatnonzero(waits > NEGLIGIBLE * max(float(waits.sum()), 1.0)):
                for late, share in theirs.late(first + int(place), own):
                    for cause, part in self.cause(other, first + int(place), late, depth + 1).items():
                        found[cause] += float(waits[place]) * share * part
        whole = sum(found.values())
        if whole <= 0:
            return {(trace, group.fractions.shape[2] - 1): 1.0}
        return {cause: share / whole for cause, share in found.items() if share > NEGLIGIBLE * whole}
