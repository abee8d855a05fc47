"""Stalls: a process that stood still, communication that did; and what is none.

A process that is stopped (SIGSTOP, a debugger, a freezer, a machine that swaps) while it is in a collective looks like
a slow transfer to all others. But no thread of it enters or leaves any OS call meanwhile, though some do so all the
time: that tells the two apart.

A rank that evaluates, logs or saves for all others keeps them waiting in a few steps, as a stall does. But it does so
at intervals, or often and for about as long each time, or in a phase that no other rank has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import BETWEEN_STEPS, Floats, exposed_communication
from hpcmm.analysis.findings import (
    CAUSES,
    HIGH,
    MEDIUM,
    STRAGGLER_SHARE,
    AnalysisContext,
    Finding,
    phase_of_part,
)
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.phases import OTHERS, StepTimes
from hpcmm.analysis.process_groups import unseen_ranks
from hpcmm.analysis.range_names import communicates
from hpcmm.analysis.trace import OTHER, OUTSIDE, RankTrace
from hpcmm.annotate.schema import PHASES

Mask = npt.NDArray[np.bool_]


def find_process_stalls(
    traces: Sequence[RankTrace], steps: StepTimes, collectives: pd.DataFrame
) -> list[tuple[int, Floats]]:
    """Traces whose process stood still within a collective, and the seconds that each such step lost by it.

    The loss, shape (steps,), is a mean over ranks: what of the stall the ranks spent in exposed transfer.
    """
    found: list[tuple[int, Floats]] = []
    if not any(trace.stalled is not None and len(trace.stalled) for trace in traces):
        return found
    exposed = [exposed_communication(trace) for trace in traces]
    for index, trace in enumerate(traces):
        if trace.stalled is None or not len(trace.stalled):
            continue
        own = collectives[(collectives["trace"] == index) & collectives["closed"].astype(bool)]
        inside = _began_within(trace.stalled, own)
        if not len(inside):
            continue
        shared = sum(
            (_by_step(inside.intersect(mine), trace.steps, steps) for mine in exposed), np.zeros(len(steps.numbers))
        )
        lost = np.asarray(shared / len(traces), dtype=np.float64)
        if lost.any():
            found.append((index, lost))
    return found


def _began_within(stalled: IntervalSet, collectives: pd.DataFrame) -> IntervalSet:
    """The stalls that began while a collective of the process was in flight, each cut to that collective's end."""
    start, end = collectives["start_ns"].to_numpy(np.int64), collectives["end_ns"].to_numpy(np.int64)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order]) if len(end) else end
    index = np.searchsorted(start, stalled.start_ns, side="right") - 1
    # Collectives overlap: whether one is in flight tells the latest end of all that began before.
    within = (index >= 0) & (np.append(reach, 0)[index] > stalled.start_ns)
    bound = np.append(reach, 0)[index]
    return IntervalSet(stalled.start_ns[within], np.minimum(stalled.end_ns, bound)[within])


def _by_step(intervals: IntervalSet, own_steps: pd.DataFrame, steps: StepTimes) -> Floats:
    bounds = own_steps.set_index("step")[["start_ns", "end_ns"]].reindex(steps.numbers).to_numpy(np.float64)
    there = np.isfinite(bounds).all(axis=1)
    found = np.zeros(len(steps.numbers))
    found[there] = (
        intervals.covered_within(bounds[there, 0].astype(np.int64), bounds[there, 1].astype(np.int64)) / NS_PER_S
    )
    return found


TIMES_USUAL = 3.0
"""A step is interrupted when its exposed transfer is so many times the median step's ..."""
LEAST_S = 0.3
"""... and exceeds it by so much: below this TCP does not try again, and busy processors explain as much."""
MOST_STEPS = 0.2
"""... which happens in at most this share of the steps; else it is how the network is."""


def find_network_stalls(context: AnalysisContext, stopped_s: Floats) -> list[Finding]:
    """One finding, or none. ``stopped_s`` by step, a mean over ranks, is lost to processes that stood still."""
    rows, numbers = context.rows, context.steps.numbers
    stepping = [trace for trace in context.traces if len(trace.steps)]
    if rows.empty or unseen_ranks(rows, stepping, context.expected_ranks).missing > 0:
        return []
    inside = rows[rows["step"].isin(numbers)]
    inside = inside[_usual(inside["phase"], inside["step"], len(numbers))]
    total = inside.groupby("step")["exposed_transfer_ns"].sum().reindex(numbers).fillna(0.0).to_numpy(np.float64)
    transfer = np.maximum(total / NS_PER_S / len(context.traces) - stopped_s, 0.0)
    usual = float(np.median(transfer))
    hit = (transfer > TIMES_USUAL * usual) & (transfer > usual + LEAST_S)
    if not hit.any() or hit.sum() > max(1.0, MOST_STEPS * len(hit)):
        return []
    lost = np.where(hit, transfer - usual, 0.0)
    worst = context.worst_step(lost)
    there = inside[inside["step"] == worst]
    longest = there.iloc[int(there["exposed_transfer_ns"].to_numpy(np.float64).argmax())]
    steps = ", ".join(map(str, numbers[hit][:5]))
    told = (
        f"all ranks wait for bytes in {int(hit.sum())} of {len(hit)} steps ({steps}), up to {float(lost.max()):.3g} s "
        f"longer than in the usual step; most of it in one {longest['op']}: a link or a network card failed for a while"
    )
    pointer = f"collectives: step={worst} op={longest['op']} group={longest['group']} sequence={longest['sequence']}"
    phase = str(longest["phase"])
    mean = float(lost.mean())
    return [Finding("interruption", CAUSES["interruption"], mean, None, "", phase, told, MEDIUM, pointer, worst)]


def _usual(phase: pd.Series, step: pd.Series, steps: int) -> pd.Series:
    """Which rows lie in a phase that at least half of the steps have.

    A step with a checkpoint or an evaluation has no usual step to compare what is exchanged there with.
    """
    return step.groupby(phase).transform("nunique") >= steps / 2


SOLO_TIMES = 2.0
"""Work of one rank alone is so many times as long as what else that rank has beyond its peers ..."""
SOLO_SHARE = 0.2
"""... and lasts at least this share of a step."""
ALIKE_TIMES = 2.0
"""The longest of irregular work is at most so many times the shortest: stalls last as long as they happen to."""
MIN_REGULAR, MIN_IRREGULAR = 3, 4
"""Two delays lie at an interval whatever they are, three hardly by chance."""
LIKE_TWO = 1.5
"""... and of two alone."""
CANDIDATES, ANCHORS = 64, 3
"""Longest steps whose distances are tried as periods, and how many of them are taken for one of the interval's own."""
SAME_STEPS = 0.8
"""Ranks do it together if they have this share of the steps in common."""
EXTRA_RANGES = 1.5
"""A phase is entered for something of the rank's own if that happens so many times as often as on its peers."""


@dataclass(frozen=True, slots=True)
class SoloWork:
    """What some ranks do now and then, and the others never: evaluation, logging, a checkpoint."""

    members: tuple[int, ...]
    """Traces."""
    at: npt.NDArray[np.intp]
    """Positions of the steps that it lies in, or before, if it lies between steps."""
    period: int
    """Steps from one to the next; 0 if they are irregular."""
    name: str
    """Of the phase that no other rank has; empty if no range tells."""
    part: str
    """Where most of it lies, of the parts of the ranks' work."""
    length_s: float
    """Median of one."""


def find_solo_work(context: AnalysisContext) -> list[SoloWork]:
    """Work of single ranks at intervals; empty if every rank does as its peers do, or only more slowly.

    It shows in the ranks' own work, not in who waits: the step in which it is done may end before anybody waits.
    """
    work = context.work_by_step()
    total = work.sum(axis=2)
    count = total.shape[1]
    if count < 2 or len(total) < MIN_REGULAR:
        return []
    # At most half of the ranks do it: the lower median of all is what the others take.
    excess = np.maximum(total - np.sort(total, axis=1)[:, [(count - 1) // 2]], 0.0)
    least_s = SOLO_SHARE * context.steps.median_s
    patterns = {trace: _pattern(excess, trace, context.steps.numbers, least_s) for trace in range(count)}
    found = _named(context)
    for trace, pattern in patterns.items():
        if pattern is None or any(trace in solo.members for solo in found):
            continue
        at, period = pattern
        alike = [other for other, its in patterns.items() if its is not None and _overlap(its[0], at) >= SAME_STEPS]
        where = _own_part(context, work, alike, at)
        if where is not None and len(alike) <= count // 2:
            length = float(np.median(excess[at][:, alike]))
            found.append(SoloWork(tuple(alike), at, period, *where, length))
    return found


def _named(context: AnalysisContext) -> list[SoloWork]:
    """What a range names that at most half of the ranks have: no pattern is needed to tell what it is."""
    numbers, traces, work = context.steps.numbers, context.traces, context.work_by_step()
    found = []
    names = {str(name) for trace in traces for name in trace.segments["phase"].unique()}
    for name in sorted(names - {OTHER, OTHERS, "", *PHASES[:-1]}):
        steps = [np.unique(_steps_of(trace, trace.segments[trace.segments["phase"] == name])) for trace in traces]
        members = tuple(index for index, of_trace in enumerate(steps) if len(of_trace))
        at = np.flatnonzero(np.isin(numbers, np.concatenate(steps)))
        if not len(at) or len(members) > len(traces) // 2:
            continue
        gaps = np.diff(numbers[at])
        period = int(gaps[0]) if len(at) > 1 and (gaps == gaps[0]).all() else 0
        length = work[:, :, context.parts.names.index(name)][at][:, list(members)]
        found.append(SoloWork(members, at, period, name, name, float(np.median(length))))
    return found


def _steps_of(trace: RankTrace, segments: pd.DataFrame) -> npt.NDArray[np.int64]:
    """The step that each of ``segments`` lies in, or before."""
    step, starts = segments["step"].to_numpy(np.int64), trace.steps["start_ns"].to_numpy(np.int64)
    following = np.searchsorted(starts, segments["start_ns"].to_numpy(np.int64))
    after = np.append(trace.steps["step"].to_numpy(np.int64), OUTSIDE)[following]
    return np.where(step == OUTSIDE, after, step)


def _overlap(left: npt.NDArray[np.intp], right: npt.NDArray[np.intp]) -> float:
    return len(np.intersect1d(left, right)) / max(len(left), len(right))


def _pattern(
    excess: Floats, trace: int, numbers: npt.NDArray[np.int64], least_s: float
) -> tuple[npt.NDArray[np.intp], int] | None:
    """Positions of the steps in which ``trace`` alone works on, and their period (0: none); None if it does not."""
    own = excess[:, trace]
    best: tuple[npt.NDArray[np.intp], int] | None = None
    gain = 0.0
    for first, period in _intervals(own, numbers) if own.max() > least_s else ():
        on = (numbers - first) % period == 0
        if on[-1] and not _stands_out(own, on, least_s):
            on[-1] = False  # what follows the last optimizer step lies behind the last step
        if not _stands_out(own, on, least_s):
            continue
        # With two of them only the round numbers of a loop's counter tell an interval from chance.
        if on.sum() < MIN_REGULAR and not (first % period in {0, period - 1} and _alike(own[on], LIKE_TWO)):
            continue
        longer = float((own[on] - np.median(own[~on])).sum())
        if longer > gain:
            best, gain = (np.flatnonzero(on), period), longer
    return best or _irregular(excess, trace, least_s)


def _intervals(own: Floats, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """A step and a period of each interval that the longest steps could follow."""
    longest = numbers[np.argsort(-own, kind="stable")[: min(len(own) // 2, CANDIDATES)]]
    for first in longest[:ANCHORS].tolist():
        gaps = np.abs(longest - first)
        several = [int(np.gcd.reduce(gaps[:count])) for count in range(MIN_REGULAR, len(gaps) + 1)]
        for period in sorted({*gaps.tolist(), *several} - {0, 1}):
            yield first, period


def _stands_out(own: Floats, on: npt.NDArray[np.bool_], least_s: float) -> bool:
    """Whether the steps ``on`` are longer than all others, but for a few pauses of the others."""
    if on.sum() < MIN_REGULAR - 1 or on.all():
        return False
    least, rest = float(own[on].min()), own[~on]
    return (
        least > least_s
        and least > SOLO_TIMES * float(np.quantile(rest, 0.9))
        and (rest > least).sum() <= (0.25 * on.sum())
    )


def _irregular(excess: Floats, trace: int, least_s: float) -> tuple[npt.NDArray[np.intp], int] | None:
    own = np.sort(excess[:, trace])[::-1]
    others = float(np.delete(excess, trace, axis=1).max(initial=0.0))
    for count in range(MIN_IRREGULAR, len(own) // 2 + 1):
        apart = own[count - 1] > SOLO_TIMES * max(float(own[count]), others)
        if apart and own[count - 1] > least_s and _alike(own[:count], ALIKE_TIMES):
            return np.flatnonzero(excess[:, trace] >= own[count - 1]), 0
    return None


def _alike(lengths: Floats, times: float) -> bool:
    return float(lengths.max()) <= times * float(lengths.min())


def _own_part(
    context: AnalysisContext, work: Floats, members: Sequence[int], at: npt.NDArray[np.intp]
) -> tuple[str, str] | None:
    """Name and part of what ``members`` alone do in the steps ``at``; None if it is what all ranks do, but longer.

    It is their own if no phase tells what it is, if the others do not have its phase in these steps, or enter it far
    less often: an evaluation calls the model over and over, and one forward pass that takes longer is computation. And
    it must be more than they themselves do in the other steps: else their peers have worked less than usual here.
    """
    others = [index for index in range(work.shape[1]) if index not in members]
    inside, elsewhere = work[at][:, members], np.delete(work, at, axis=0)[:, members]
    more = np.maximum(inside.mean(axis=(0, 1)) - np.median(elsewhere, axis=0).mean(axis=0), 0.0)
    inside = work[at]
    longer = np.maximum(inside[:, members].mean(axis=(0, 1)) - np.median(inside[:, others], axis=1).mean(axis=0), 0.0)
    entered = _entered(context, at)
    own: dict[str, float] = {}
    for part, cost in zip(context.parts.names, np.minimum(longer, more), strict=True):
        phase = phase_of_part(part)
        times = entered.get(phase, np.zeros(work.shape[1]))
        extra = times[members].mean() > EXTRA_RANGES * max(float(np.median(times[others])), 0.0)
        if part in {OTHER, BETWEEN_STEPS} or (extra and phase != OTHER):
            own[part] = float(cost)
    if not own or sum(own.values()) < 0.5 * float(longer.sum()):
        return None
    part = max(own, key=lambda name: own[name])
    times = entered.get(phase_of_part(part), np.zeros(work.shape[1]))
    alone = part not in {OTHER, BETWEEN_STEPS} and not times[others].any()
    return phase_of_part(part) if alone else "", phase_of_part(part)


def _entered(context: AnalysisContext, at: npt.NDArray[np.intp]) -> dict[str, Floats]:
    """How often each trace entered each phase in the steps ``at``, shape (traces,)."""
    found: dict[str, Floats] = {}
    numbers = context.steps.numbers[at]
    for index, trace in enumerate(context.traces):
        there = trace.segments[trace.segments["step"].isin(numbers)]
        for phase, times in there["phase"].value_counts().items():
            found.setdefault(str(phase), np.zeros(len(context.traces)))[index] = times
    return found


LIKE_SHARE = 0.3
"""A step after solo work is charged to it from this share of what the work usually costs."""
MAX_LISTED = 5
"""Steps that are listed."""


def solo_findings(context: AnalysisContext, least_s: float) -> tuple[list[Finding], Mask]:
    """Rows of solo work that costs ``least_s`` a step, and the mask (steps, traces, parts + 1) of their charges."""
    blamed = np.zeros(context.losses.shape, dtype=bool)
    found = []
    for solo in find_solo_work(context):
        mask = _charges_of_solo_work(context, solo) & ~blamed
        if float((context.losses * mask).sum()) / len(context.steps.numbers) >= least_s:
            blamed |= mask
            charges = (context.losses * mask).sum(axis=1)
            part = (*context.parts.names, "")[int(charges.sum(axis=0).argmax())]
            found.append(_finding_of_solo_work(context, solo, charges.sum(axis=1), part))
    return found, blamed


WAITED, WAITED_ERRORS = 0.5, 3.0
"""Ranks have waited for work of others if their steps take longer by this share of it, beyond so many standard errors
of what one step differs from the next."""


def unseen_solo_findings(context: AnalysisContext, least_s: float) -> list[Finding]:
    """The same of a run none of whose communication was recorded, for what a range of a rank's own names.

    The others wait for it if their steps take as much longer than those without it.
    """
    if len(context.rows) or len(context.traces) < 2:
        return []
    found = []
    for solo in find_solo_work(context):
        if not solo.name or communicates(solo.name):
            continue
        waited_s, later_s = _waited_for(context, solo)
        by_step = np.zeros(len(context.steps.numbers))
        by_step[solo.at] = min(solo.length_s, waited_s)
        if waited_s >= WAITED * solo.length_s and by_step.mean() >= least_s:
            told = "of these steps all are as much longer"
            if later_s > WAITED * waited_s:
                told = "the others' steps after these are as much longer"
            row = _finding_of_solo_work(context, solo, by_step, solo.part)
            evidence = f"{row.evidence}; {told}, for communication that was not recorded"
            found.append(replace(row, confidence=MEDIUM, evidence=evidence))
    return found


def _waited_for(context: AnalysisContext, solo: SoloWork) -> tuple[float, float]:
    """Seconds by which the others' steps are longer each time, and what of them lies in the steps after its own.

    Work at the end of a step keeps the others waiting only in the next one, so that both count. What takes longer in
    its ranks as well, such as an evaluation on all of them, is no waiting for it.
    """
    work, members = context.work_by_step(), list(solo.members)
    length = work.sum(axis=2)
    its_own = length[:, members] - work[:, members, context.parts.names.index(solo.part)]
    longer = np.delete(length, members, axis=1).mean(axis=1) - its_own.mean(axis=1)
    after = np.setdiff1d(np.minimum(solo.at + 1, len(longer) - 1), solo.at)
    rest = np.delete(longer, [*solo.at, *after])
    if not len(rest):
        return 0.0, 0.0
    usual_s, times = float(np.median(rest)), len(solo.at)
    later_s = float((longer[after] - usual_s).sum()) / times
    waited_s = float((longer[solo.at] - usual_s).sum()) / times + later_s
    error_s = float(rest.std()) * np.sqrt(times + len(after)) / times
    return (waited_s, later_s) if waited_s > WAITED_ERRORS * error_s else (0.0, 0.0)


def _charges_of_solo_work(context: AnalysisContext, solo: SoloWork) -> Mask:
    """Charges of its ranks in its steps, and in the steps after them if the others wait only then."""
    mask = np.zeros(context.losses.shape, dtype=bool)
    cost = context.losses[:, list(solo.members)].sum(axis=(1, 2))
    after = np.minimum(solo.at + 1, len(cost) - 1)
    usual = LIKE_SHARE * float(np.median(np.maximum(cost[solo.at], cost[after])))
    near = np.unique(np.concatenate((solo.at, after)))
    for member in solo.members:
        mask[near[cost[near] > usual], member, :] = True
    return mask


def _finding_of_solo_work(context: AnalysisContext, solo: SoloWork, by_step: Floats, part: str) -> Finding:
    """The row of ``solo``, which costs ``by_step`` seconds (steps,), most of it in ``part``."""
    numbers = context.steps.numbers[solo.at]
    listed = ", ".join(map(str, numbers[:MAX_LISTED])) + (", ..." if len(numbers) > MAX_LISTED else "")
    first, who = context.traces[solo.members[0]], context.who(solo.members)
    alone = len(solo.members) == 1
    between = solo.part == BETWEEN_STEPS
    steps = f"step{'s' if len(numbers) > 1 else ''} {listed}"
    if len(numbers) == len(context.steps.numbers):
        steps = "every step"
    when = f"before {steps}" if between else f"in {steps}"
    told = f"only {who} {'does' if alone else 'do'} it, {solo.length_s:.3g} s each time, while the others wait"
    if solo.period > 1:
        told += f"; {len(numbers)} times in {len(context.steps.numbers)} steps, every {solo.period} steps"
    elif len(numbers) < len(context.steps.numbers):
        told += f"; {len(numbers)} times in {len(context.steps.numbers)} steps, at no fixed interval"
    if not solo.name:
        told += "; annotate.phase(...) around it would tell what it is"
    worst = context.worst_step(by_step)
    share = float(by_step.mean()) / context.steps.mean_s
    return Finding(
        kind="solo",
        cause=f"{solo.name or 'work'} of {who} alone {when}",
        lost_s=float(by_step.mean()),
        rank=first.rank if alone else None,
        node=first.node if alone else "",
        phase=solo.part,
        evidence=told,
        confidence=HIGH if share >= 2 * STRAGGLER_SHARE and (solo.name or solo.period) else MEDIUM,
        rows=f"delays: rank={first.rank} phase={part}" + ("" if worst is None else f" step={worst}"),
        worst_step=worst,
        several=not alone,
    )
