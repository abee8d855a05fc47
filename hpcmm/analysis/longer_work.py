"""Work that takes longer on one rank or node in almost every step: by its own clock, whoever is seen to wait for it.

Between nodes whose clocks are uncertain, as behind a slow link, no arrival tells who was late. But how long a rank
works is measured by its own clock alone. Who works longer than its peers is in collectives for a shorter time than
they, since all have the same steps; by how much less is the most that the others can have waited for it. It is no more
than a bound: ranks also leave a slow collective one after the other, and who leaves first may work longer for nothing.
For the same reason the arrivals of two ranks of one node, which share a clock, tell nothing by themselves. Ranks leave
no farther apart than their transfer takes; of two ranks alone, one is named for work that is longer than that.

Kernels of sends and receives do not tell who waits for whom, either: of a pipeline's stages, or of the ranks that hold
experts, the one that works longest is named in the same way. Stages wait in the bubble as well, in which longer work
costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import gpu_findings, network, process_groups
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
from hpcmm.analysis.gpu_trace import counted
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.nccl import UNTOLD
from hpcmm.analysis.stragglers import (
    Mask,
    excess_function,
    late_alike,
    mask_of,
    parts_by_kind,
    slow_nodes,
    stands_apart,
)

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
    is_untold: bool
    """So it is because kernels of sends and receives do not tell it."""
    is_sure: bool
    own_s: float
    """How long it communicates itself in such kernels, with nothing beside them."""


class LongerWork(NamedTuple):
    findings: list[Finding]
    """Those that were there, and the new ones."""
    blamed: Mask
    """Of charges that rows hold, these among them."""
    uncharged_s: float
    """Seconds of the rows, as a mean over ranks and steps, that nobody was charged for want of a good clock."""
    in_sends_s: float
    """Seconds of waiting of the rows that nobody was charged, as kernels of sends and receives do not tell it."""


def find_longer_work(context: AnalysisContext, late: Sequence[Finding], blamed: Mask) -> LongerWork:
    """Rows of longer work beside those of ``late``, whose charges are the mask ``blamed`` (steps, traces, parts + 1).

    If the clocks are good enough, the row has what the rank was charged, and there is none for work that cost nothing.
    A rank of ``late`` that others also wait for in sends and receives has all of that in its row.
    """
    blamed = blamed.copy()
    found, uncharged_s, in_sends_s = list(late), 0.0, 0.0
    for longer in _longer_work(context):
        mask = mask_of(context.losses.shape, longer.members, parts_by_kind(context)[longer.kind])
        if not (blamed & mask).any():
            blamed |= mask
            found.append(_finding(context, longer))
            more_s = longer.lost_s - longer.charged_s
            uncharged_s += 0.0 if longer.is_untold else more_s
            in_sends_s += more_s * _waiting_share(context, longer) if longer.is_untold else 0.0
            continue
        rank = context.traces[longer.members[0]].rank
        at = [place for place, row in enumerate(found) if (row.kind, row.rank) == (longer.kind, rank)]
        if longer.is_untold and len(longer.members) == 1 and at and longer.lost_s > found[at[0]].lost_s:
            row = found[at[0]]
            told = f"{row.evidence}; {row.lost_s:.3g} s of it in collectives; in all {_in_sends(longer)}"
            found[at[0]] = replace(row, lost_s=longer.lost_s, evidence=told, confidence=MEDIUM)
            in_sends_s += (longer.lost_s - row.lost_s) * _waiting_share(context, longer)
    return LongerWork(found, blamed, uncharged_s, in_sends_s)


def _waiting_share(context: AnalysisContext, longer: _LongerWork) -> float:
    """What of a loss the others wait; the rest is the longer work itself."""
    return 1.0 - len(longer.members) / len(context.traces)


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
    waits, transfer = (_exposed(context, name, context.rows) for name in ("exposed_wait_ns", "exposed_transfer_ns"))
    communication, transfer_s = (waits + transfer)[:, :, None], float(transfer.mean())
    unseen_s, sends = withheld_s(context), _Sends.of(context)
    # Of a rank whose communication was not recorded nothing tells it from work.
    known = np.setdiff1d(np.arange(len(context.traces)), process_groups.silent_ranks(context.traces))
    for kind, columns in parts_by_kind(context).items():
        own = work[:, :, columns].sum(axis=2)
        excess = np.maximum(own - np.median(own, axis=1, keepdims=True), 0.0)
        ranks = ((index,) for index in range(own.shape[1]))
        for members in (*slow_nodes(context, excess), *late_alike(sends.stages, excess), *ranks):
            others = np.setdiff1d(known, members)
            if not set(members) <= set(known.tolist()):
                continue
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
            is_vague = error_s > longer_s or unseen_s > waiting_s
            in_sends_s = float(sends.exposed[:, others].mean())
            # What a bubble takes at best, ranks wait for nobody's longer work.
            beyond_s = in_sends_s + float(waits[:, others].mean()) - sends.bubble_s
            is_untold = not is_vague and min(in_sends_s, beyond_s - sends.moving_s, borne_s) >= BORNE * longer_s
            is_bound = is_vague or is_untold
            most_s = min(most_s, beyond_s) if is_untold else most_s
            lost_s = max(charged_s, min(longer_s, most_s)) if is_bound else charged_s
            own_s = float(sends.exposed[:, members].mean())
            sure_s = longer_s - (0.0 if sends.bubble_s else own_s) if is_untold else borne_s
            is_sure = not is_bound or sure_s >= BORNE * longer_s
            if longer_s >= least_s and (is_bound or charged_s >= least_s):
                yield _LongerWork(
                    kind, members, longer, lost_s, borne_s, charged_s, is_bound, is_untold, is_sure, own_s
                )


class _Sends(NamedTuple):
    """Exposed time in kernels that do not tell who waits for whom, in seconds by (step, trace)."""

    exposed: Floats
    stages: list[tuple[int, ...]]
    """Traces of each group that reduces something beside them; none if there are no such kernels."""
    bubble_s: float
    """What of it the bubble takes at best, if pairs of ranks are the stages of a pipeline; 0 if they are not."""
    moving_s: float
    """How long the bytes may take beside that."""

    @classmethod
    def of(cls, context: AnalysisContext) -> _Sends:
        rows = context.rows
        if rows.empty or not (own := rows[network.is_untold(rows)])["exposed_transfer_ns"].any():
            nothing = np.zeros((len(context.steps.numbers), len(context.traces)))
            return cls(nothing, [], 0.0, 0.0)
        sends = own["op"].isin(UNTOLD) & own["step"].isin(context.steps.numbers)
        count, times = process_groups.chain_of_pairs(own[sends])
        busy_s = float(np.median(context.work_by_step().sum(axis=2).mean(axis=0)))
        # Who comes last to an exchange waits for nobody.
        transfer_s = float(own.groupby("instance")["duration_ns"].min().median()) / NS_PER_S
        members = rows[rows["synchronising"].astype(bool)].groupby("group")["trace"].unique()
        stages = {tuple(sorted(each.tolist())) for each in members}
        stages -= {tuple(each) for each in context.nodes().values()}
        return cls(
            _exposed(context, "exposed_transfer_ns", own),
            sorted(each for each in stages if len(each) < len(context.traces)),
            # A micro-batch passes twice, and each stage waits until it has come from the others, and gone to them.
            (count - 1) * busy_s / (times / 2) if count else 0.0,
            (times + 2 * (count - 1)) * transfer_s if count else 0.0,
        )


def _exposed(context: AnalysisContext, column: str, rows: pd.DataFrame) -> Floats:
    """Seconds of exposed communication, of one ``column`` of ``rows``, by (step, trace)."""
    steps, traces = context.steps.numbers, range(len(context.traces))
    if rows.empty:
        return np.zeros((len(steps), len(traces)))
    sums = rows.groupby(["step", "trace"])[column].sum().unstack()
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
    is_node = not alone and list(longer.members) in context.nodes().values()
    several = f"all ranks of {first.node} ({ranks})" if is_node else f"ranks {ranks}"
    who = f"rank {ranks}: its {what} takes" if alone else f"{several}: their {what} takes"
    told = f"{who} {by_step.mean():.3g} s a step longer than the others', in {int((by_step > 0).sum())} of "
    told += f"{len(by_step)} steps, each by its own clock"
    if longer.is_untold:
        told += f"; {_in_sends(longer)}"
    elif longer.is_bound:
        error_s = float(context.rows["clock_error_ns"].max()) / NS_PER_S
        told += (
            f"; at most {longer.lost_s:.3g} s of it is lost, by which the others' communication takes longer: the "
            f"clocks agree within {error_s:.3g} s only, which does not tell who waits"
        )
    on_gpu, in_words = gpu_findings.excess(context.gpu, first.rank) if alone else ("", "")
    told += f"; {in_words}" if on_gpu else ""
    worst = context.worst_step(np.maximum(by_step, 0.0))
    cause = CAUSES[longer.kind] if alone else f"{CAUSES[longer.kind]} on a slow node"
    return Finding(
        # A stage may have more layers, a rank busier experts: its GPU need not be slow.
        kind="gpu_wait" if longer.is_untold and longer.kind == "compute" else longer.kind,
        cause=cause if alone or is_node else f"{CAUSES[longer.kind]} of ranks {ranks}",
        lost_s=longer.lost_s,
        rank=first.rank if alone else None,
        node=first.node if alone or is_node else "",
        phase=phase,
        evidence=told,
        confidence=MEDIUM if longer.is_sure else LOW,
        rows=f"phases: {f'node={first.node}' if is_node else f'rank={first.rank}'} phase={phase}",
        worst_step=worst,
        gpu_excess=on_gpu,
        several=not (alone or is_node),
        is_only_node=len(context.nodes()) == 1,
    )


def _in_sends(longer: _LongerWork) -> str:
    """What the others wait for in kernels that do not tell it, in words."""
    told = (
        f"at most {longer.lost_s:.3g} s of it is lost, by which the others communicate for longer with nothing beside "
        f"it: of sends and receives, or without a root, kernels do not tell who waits for whom"
    )
    if longer.is_sure:
        return told
    who = "it is" if len(longer.members) == 1 else "these ranks are"
    return (
        f"{told}; {who} in them for {longer.own_s:.3g} s as well, and if that is the bubble of a pipeline, longer work "
        "in it costs nothing"
    )


ALMOST_ALL = 0.9
"""A GPU computes longest in so many of the steps, or else by turns."""
LEAST_TIMES_BUBBLE, MOST_TIMES_BUBBLE = 0.5, 1.5
"""Sends and receives are taken for a bubble if they take so many times as long as one does at best."""


def explain_sends(context: AnalysisContext, findings: Sequence[Finding], held_s: float) -> list[Finding]:
    """``findings`` with what computation and pairs of ranks tell of communication that may be waiting.

    ``held_s`` of imbalance, and then of this communication, is in rows of :func:`find_longer_work`.
    """
    found, told = list(findings), _compared(context)
    for kind in ("imbalance", "gpu_comm"):
        for at, each in enumerate(found):
            if each.kind == kind:
                rest_s = max(0.0, each.lost_s - held_s)
                held_s -= each.lost_s - rest_s
                found[at] = replace(each, lost_s=rest_s)
    return [
        _as_bubble(context, replace(each, evidence=each.evidence + told)) if each.kind == "gpu_comm" else each
        for each in found
    ]


def _compared(context: AnalysisContext) -> str:
    """Whether the GPUs of some ranks compute longer than those of others, in words."""
    if context.gpu.empty:
        return ""
    wide = counted(context.gpu).pivot_table(index="step", columns="rank", values="compute_s", aggfunc="mean")
    compute = wide.reindex(context.steps.numbers).to_numpy(np.float64)
    if compute.shape[1] < 2 or not np.isfinite(compute).all():
        return ""
    ahead = compute.max(axis=1) - np.median(compute, axis=1)
    if float(ahead.mean()) < STRAGGLER_SHARE * context.steps.mean_s:
        apart = float((compute.max(axis=1) - compute.min(axis=1)).mean())
        return f"; all GPUs compute for {compute.mean():.3g} s a step, within {apart:.3g} s: none has more to do"
    longest, often = np.unique(compute.argmax(axis=1), return_counts=True)
    told = f"; in a step one GPU computes {ahead.mean():.3g} s longer than the median one"
    if often.max() < ALMOST_ALL * len(compute):
        return f"{told}, by turns on {len(longest)} ranks: the others may wait for it"
    return f"{told}, in {often.max()} of {len(compute)} steps that of rank {wide.columns[longest[often.argmax()]]}"


def _as_bubble(context: AnalysisContext, sends: Finding) -> Finding:
    """``sends`` as the bubble of a pipeline, if pairs of ranks are its stages and it takes as long as that."""
    inside = context.rows[context.rows["op"].isin(UNTOLD) & context.rows["step"].isin(context.steps.numbers)]
    stages, times = process_groups.chain_of_pairs(inside)
    if not stages:
        return sends
    # A send and a receive may be one kernel.
    least, most = ((stages - 1) / (batches + stages - 1) for batches in (times, times / 2))
    share = sends.lost_s / context.steps.mean_s
    told = (
        f"{sends.evidence}; ranks exchange in pairs that are chains of {stages}, as the stages of a pipeline are, "
        f"{times:.3g} times a step: {times / 2:.3g} to {times:.3g} micro-batches leave {least:.0%} to {most:.0%} of a "
        f"step idle at best, and {share:.0%} were measured"
    )
    if not LEAST_TIMES_BUBBLE * least <= share <= MOST_TIMES_BUBBLE * most:
        return replace(sends, evidence=told)
    return replace(sends, kind="bubble", cause="pipeline bubble", moves="", evidence=told)


SAME_LENGTH = 0.5
"""Steps of ranks that wait for one another differ by less than this share of what one of them works longer."""
_NOT_COMMUNICATION = ("data", "checkpoint", "subprocess")
"""Kinds of work in which a rank waits for no other: what takes long there is its own."""


def find_unseen_waiting(context: AnalysisContext) -> list[Finding]:
    """Ranks that are waited for though their communication was not recorded, as their steps take the others' time.

    Where one rank works longer in almost every step, and the others wait in the OS by as much longer than it does, they
    wait for it. Without OS calls only work is looked at in which a rank waits for no other, such as loading.
    """
    silent = process_groups.silent_ranks(context.traces) if len(context.rows) else range(len(context.traces))
    if not len(silent) or len(context.traces) < 2:
        return []
    context = _preceded(context)
    whole = context.work_by_step()
    length = whole.sum(axis=2)
    for name in ("exposed_wait_ns", "exposed_transfer_ns"):
        length = length + _exposed(context, name, context.rows)
    # Of ranks whose communication was recorded, what they wait is no part of their work.
    waits = None if len(context.rows) else _waiting(context)
    found = []
    for kind, columns in parts_by_kind(context).items():
        own = whole[:, :, columns].sum(axis=2)
        if kind not in _NOT_COMMUNICATION:
            if waits is None:
                continue
            own = own - waits[:, :, columns].sum(axis=2)
        for index in silent:
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
