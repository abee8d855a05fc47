"""Work that takes longer on one rank or node in almost every step: by its own clock, whoever is seen to wait for it.

Between nodes whose clocks are uncertain, as behind a slow link, no arrival tells who was late. But how long a rank
works is measured by its own clock alone. Who works longer than its peers is in collectives for a shorter time than
they, since all have the same steps; by how much less is the most that the others can have waited for it. It is no more
than a bound: ranks also leave a slow collective one after the other, and who leaves first may work longer for nothing.
For the same reason the arrivals of two ranks of one node, which share a clock, tell nothing by themselves. Ranks leave
no farther apart than their transfer takes; of two ranks alone, one is named for work that is longer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpcmm.analysis import gpu_findings
from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import (
    CAUSES,
    LOW,
    MEDIUM,
    STRAGGLER_SHARE,
    AnalysisContext,
    Finding,
    kind_of_part,
    phase_of_part,
    work_in_words,
)
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.stragglers import Mask, excess_function, mask_of, parts_by_kind, slow_nodes, stands_apart

BORNE = 0.5
"""The bound is medium sure if the communication of its peers takes longer by this share of the longer work."""

ERRORS = 2.0
"""Standard errors of the mean over the steps that the bound leaves room for."""


class _LongerWork(NamedTuple):
    kind: str
    members: tuple[int, ...]
    longer: Floats
    """Seconds by which the work takes longer than the median of the other ranks, shape (steps, parts)."""
    lost_s: float
    borne_s: float
    charged_s: float
    is_bound: bool
    """The clocks do not tell who waits: ``lost_s`` is the most that it can be."""


class LongerWork(NamedTuple):
    findings: list[Finding]
    blamed: Mask
    """Of charges that rows hold, these among them."""
    uncharged_s: float
    """Seconds of the rows, as a mean over ranks and steps, that nobody was charged for want of a good clock."""


def find_longer_work(context: AnalysisContext, blamed: Mask) -> LongerWork:
    """Rows of longer work that the mask ``blamed`` (steps, traces, parts + 1) does not hold.

    If the clocks are good enough, the row has what the rank was charged, and there is none for work that cost nothing.
    """
    blamed = blamed.copy()
    found, uncharged_s = [], 0.0
    for longer in _longer_work(context):
        mask = mask_of(context.losses.shape, longer.members, parts_by_kind(context)[longer.kind])
        if not (blamed & mask).any():
            blamed |= mask
            found.append(_finding(context, longer))
            uncharged_s += longer.lost_s - longer.charged_s
    return LongerWork(found, blamed, uncharged_s)


def withheld_s(context: AnalysisContext) -> float:
    """Exposed waiting a step, as a mean over ranks, that nobody is charged: the clocks do not tell who was late, or
    that the others waited for so long."""
    rows = context.rows
    if rows.empty:
        return 0.0
    waits = rows[rows["needs_all"].astype(bool) & rows["step"].isin(context.steps.numbers)]
    charged = (waits["last_start_ns"] - waits["start_ns"]).where(waits["blamable"].astype(bool), 0.0)
    count = len(context.steps.numbers) * len(context.traces)
    return float((waits["exposed_wait_ns"] - charged).clip(lower=0.0).sum()) / NS_PER_S / count


def _longer_work(context: AnalysisContext) -> Iterator[_LongerWork]:
    """Nodes before their ranks."""
    work = context.work_by_step()
    error_s = float(context.rows["clock_error_ns"].max()) / NS_PER_S if len(context.rows) else 0.0
    least_s = STRAGGLER_SHARE * context.steps.mean_s
    waits, transfer = (_exposed(context, name) for name in ("exposed_wait_ns", "exposed_transfer_ns"))
    communication, transfer_s = (waits + transfer)[:, :, None], float(transfer.mean())
    unseen_s = withheld_s(context)
    for kind, columns in parts_by_kind(context).items():
        own = work[:, :, columns].sum(axis=2)
        excess = np.maximum(own - np.median(own, axis=1, keepdims=True), 0.0)
        for members in (*slow_nodes(context, excess), *((index,) for index in range(own.shape[1]))):
            others = np.delete(np.arange(own.shape[1]), members)
            if not len(others) or not stands_apart(
                own[:, members].mean(axis=1), own[:, others], context.steps.period_s
            ):
                continue
            longer = _beyond(work[:, :, columns], members, others)
            longer_s = float(_beyond(own[:, :, None], members, others).mean())
            borne = -_beyond(communication, members, others)
            borne_s = float(borne.mean())
            if len(others) == 1 and (longer_s < transfer_s or borne_s < BORNE * longer_s):
                continue
            most_s = borne_s + ERRORS * float(borne.std()) / np.sqrt(len(borne))
            charged_s = float(context.losses[:, members][:, :, columns].sum(axis=(1, 2)).mean())
            waiting_s = BORNE * longer_s * len(others) / own.shape[1]
            is_bound = error_s > longer_s or unseen_s > waiting_s
            lost_s = max(charged_s, min(longer_s, most_s)) if is_bound else charged_s
            if longer_s >= least_s and (is_bound or charged_s >= least_s):
                yield _LongerWork(kind, members, longer, lost_s, borne_s, charged_s, is_bound)


def _exposed(context: AnalysisContext, column: str) -> Floats:
    """Seconds of exposed communication, of one ``column`` of the rows, by (step, trace)."""
    steps, traces = context.steps.numbers, range(len(context.traces))
    if context.rows.empty:
        return np.zeros((len(steps), len(traces)))
    sums = context.rows.groupby(["step", "trace"])[column].sum().unstack()
    found: Floats = sums.reindex(index=steps, columns=traces).fillna(0.0).to_numpy(np.float64) / NS_PER_S
    return found


def _beyond(work: Floats, members: tuple[int, ...], others: npt.NDArray[np.intp]) -> Floats:
    """By how much ``members`` work longer than the others' median: (steps, traces, parts) to (steps, parts)."""
    longer: Floats = work[:, members].mean(axis=1) - np.median(work[:, others], axis=1)
    return longer


def _finding(context: AnalysisContext, longer: _LongerWork) -> Finding:
    columns = parts_by_kind(context)[longer.kind]
    part = int(longer.longer.mean(axis=0).argmax())
    phase = phase_of_part(context.parts.names[columns[part]])
    first, alone = context.traces[longer.members[0]], len(longer.members) == 1
    ranks = context.ranks(longer.members)
    what = work_in_words(phase)
    by_step = longer.longer.sum(axis=1)
    who = f"rank {ranks}: its {what} takes" if alone else f"all ranks of {first.node} ({ranks}): their {what} takes"
    told = f"{who} {by_step.mean():.3g} s a step longer than the others', in {int((by_step > 0).sum())} of "
    told += f"{len(by_step)} steps, each by its own clock"
    if longer.is_bound:
        error_s = float(context.rows["clock_error_ns"].max()) / NS_PER_S
        told += (
            f"; at most {longer.lost_s:.3g} s of it is lost, by which the others' communication takes longer: the "
            f"clocks agree within {error_s:.3g} s only, which does not tell who waits"
        )
    on_gpu, in_words = gpu_findings.excess(context.gpu, first.rank) if alone else ("", "")
    told += f"; {in_words}" if on_gpu else ""
    sure = not longer.is_bound or longer.borne_s >= BORNE * float(by_step.mean())
    worst = context.worst_step(np.maximum(by_step, 0.0))
    return Finding(
        kind=longer.kind,
        cause=CAUSES[longer.kind] if alone else f"{CAUSES[longer.kind]} on a slow node",
        lost_s=longer.lost_s,
        rank=first.rank if alone else None,
        node=first.node,
        phase=phase,
        evidence=told,
        confidence=MEDIUM if sure else LOW,
        rows=f"phases: {f'rank={ranks}' if alone else f'node={first.node}'} phase={phase}",
        worst_step=worst,
        gpu_excess=on_gpu,
        is_only_node=len(context.nodes()) == 1,
    )


SAME_LENGTH = 0.5
"""Steps of ranks that wait for one another differ by less than this share of what one of them works longer."""
_NOT_COMMUNICATION = ("data", "checkpoint", "subprocess")
"""Kinds of work in which a rank waits for no other: what takes long there is its own."""


def find_unseen_waiting(context: AnalysisContext) -> list[Finding]:
    """Who is waited for in a run none of whose communication was recorded, but whose steps take the same time.

    Where one rank works longer in almost every step, and the others wait in the OS by as much longer than it does, they
    wait for it. Without OS calls only work is looked at in which a rank waits for no other, such as loading.
    """
    if len(context.rows) or len(context.traces) < 2:
        return []
    context = _preceded(context)
    whole = context.work_by_step()
    length = whole.sum(axis=2)
    waits = _waiting(context)
    found = []
    for kind, columns in parts_by_kind(context).items():
        own = whole[:, :, columns].sum(axis=2)
        if kind not in _NOT_COMMUNICATION:
            if waits is None:
                continue
            own = own - waits[:, :, columns].sum(axis=2)
        for index in range(own.shape[1]):
            others = np.delete(np.arange(own.shape[1]), index)
            longer = own[:, index] - np.median(own[:, others], axis=1)
            longer_s = float(longer.mean())
            if longer_s < STRAGGLER_SHARE * context.steps.mean_s:
                continue
            if not stands_apart(own[:, index], own[:, others], context.steps.period_s):
                continue
            if float(np.median(length.max(axis=1) - length.min(axis=1))) > SAME_LENGTH * longer_s:
                continue
            rest = waits.sum(axis=2) if waits is not None else length - own
            waited_s = float((rest[:, others].mean(axis=1) - rest[:, index]).mean())
            if waited_s >= BORNE * longer_s:
                found.append(_unseen(context, whole, (kind, index), longer, min(longer_s, waited_s)))
    return found


def _preceded(context: AnalysisContext) -> AnalysisContext:
    """``context`` with those steps alone whose time since the one before is known, if there are any.

    The first step of a window lacks what came before it, such as its loading.
    """
    known = np.ones(len(context.steps.numbers), dtype=np.bool_)
    for trace in context.traces:
        known &= np.isin(context.steps.numbers, trace.steps["step"].to_numpy(np.int64)[1:][trace.follows])
    if context.steps.adjoin or not known.any():
        return context
    return replace(context, steps=replace(context.steps, numbers=context.steps.numbers[known]))


def _waiting(context: AnalysisContext) -> Floats | None:
    """Seconds that each rank is blocked in the OS, by (step, trace, part), outside of work that is its own; None if OS
    calls were not traced of all ranks."""
    blocked = [trace.blocked for trace in context.traces]
    if any(each is None for each in blocked):
        return None
    sets = tuple(
        tuple(
            part.intersect(waits) if waits is not None and kind_of_part(name) not in _NOT_COMMUNICATION else _NEVER
            for name, part in zip(context.parts.names, own, strict=True)
        )
        for own, waits in zip(context.parts.sets, blocked, strict=True)
    )
    return replace(context, parts=replace(context.parts, sets=sets)).work_by_step()


_NEVER = IntervalSet.empty()


def _unseen(context: AnalysisContext, whole: Floats, of: tuple[str, int], longer: Floats, lost_s: float) -> Finding:
    """The row of a kind of work of one trace, ``of``; ``whole`` is all work by (step, trace, part)."""
    kind, index = of
    trace = context.traces[index]
    columns = parts_by_kind(context)[kind]
    work = whole[:, :, columns]
    part = int((work[:, index] - np.median(work, axis=1)).mean(axis=0).argmax())
    phase = phase_of_part(context.parts.names[columns[part]])
    told = (
        f"its {work_in_words(phase)} takes {longer.mean():.3g} s a step longer than the "
        f"others', in {int((longer > 0).sum())} of {len(longer)} steps, and all steps take the same time: the others "
        f"wait {lost_s:.3g} s longer in the rest of them, for communication that was not recorded"
    )
    function, in_words = excess_function(context, index, phase, lost_s)
    told += in_words
    where = f"phases: rank={trace.rank} phase={phase}"
    worst = context.worst_step(np.maximum(longer, 0.0))
    found = Finding(kind, CAUSES[kind], lost_s, trace.rank, trace.node, phase, told, MEDIUM, where, worst)
    return replace(found, function=function, is_only_node=len(context.nodes()) == 1)
