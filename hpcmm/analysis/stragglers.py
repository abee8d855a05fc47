"""Stragglers: ranks and nodes whose delays stand out of the noise of the run, and whether their batches explain it.

A straggler is either late all the time, then chance does not explain the sum of its delays; or it has a few events that
are far beyond whatever else happens in the run, on one or two ranks. The rules are in ``docs/bottlenecks.md``.

Computation that follows the batch is not the rank's doing but the sampler's. The size of each batch is known if the
training code gave it to :func:`hpcmm.annotate.phase`. Without sizes, forward and backward that are long together, on
ranks that change from step to step, tell of unequal batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import gpu_findings
from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import (
    CAUSES,
    FEW_STEPS,
    HIGH,
    MEDIUM,
    STRAGGLER_SHARE,
    AnalysisContext,
    Finding,
    in_percent,
    kind_of_part,
    phase_of_part,
    work_in_words,
)
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.range_names import part_of_a_step
from hpcmm.analysis.statistics import chance_of_sum

MAX_CHANCE = 0.003
"""Probability by chance above which a sustained delay is nobody's."""
TRANSFER_SHARE = 0.1
"""... and from this share of the exposed transfer on, whose ends are not as sharp as work's."""
TIMES_PEERS = 2.0
"""A rank's delays must be so many times as long as those of its peers' median."""
ALIKE = 0.5
"""A node is a straggler when its least late rank has more than this share of its latest one's delays ..."""
TIMES_OTHERS = 1.5
"""... and so many times as long ones as any rank elsewhere."""
EVENT_TIMES = 3.0
"""An event is so many times as long as the worst step of any other rank (with six or more, but one) ..."""
EVENT_SHARE = 0.3
"""... and lasts at least this share of a step."""
EVENT_S = 0.1
"""... and this long: on a busy machine a process waits some tens of milliseconds for its turn anyway."""
FEW_SHARE = 0.1
"""... or, in a capture of very few steps, so much of each."""
LIKE_TIMES = 1.5
"""Delays so many times as long as any other rank's of their kind are of one sort with a rank's events."""
MIN_REGULAR = 3
"""So many events at one distance are how a rank does its work, and no stall."""
STALL_STEPS = 0.1
"""Events in at most this share of the steps are a stall, and not how the rank does its work."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Straggler:
    """Charges of some traces in the parts of one kind, in some steps."""

    kind: str
    members: tuple[int, ...]
    charges: Floats
    """Seconds by (step, part); 0 in parts of another kind."""
    chance: float
    """Probability of a sustained delay by chance; 0 for events."""
    events: int
    """Steps with an event; 0 for a sustained delay."""
    dominance: float
    """Share of the steps in which it was the largest delay of its kind."""

    @property
    def lost_s(self) -> float:
        return float(self.charges.sum(axis=1).mean())


def least_loss_s(context: AnalysisContext, transfer_s: float) -> float:
    """What a rank must cost a step to be named; ``transfer_s`` is the exposed transfer of a step."""
    return max(STRAGGLER_SHARE * context.steps.mean_s, TRANSFER_SHARE * transfer_s)


def find_stragglers(context: AnalysisContext, least_s: float, explained: Mask) -> tuple[list[Finding], Mask]:
    """Rows that name a rank or a node, and the mask (steps, traces, parts + 1) of the charges that rows hold.

    ``explained`` are those of rows that are there already.
    """
    blamed = explained.copy()
    stragglers = []
    for search in (_sustained, _events):
        for straggler, mask in search(context, np.where(blamed, 0.0, context.losses), least_s):
            blamed |= mask
            stragglers.append(straggler)
    return [_finding(context, straggler) for straggler in _merged(stragglers)], blamed


def parts_by_kind(context: AnalysisContext) -> dict[str, list[int]]:
    """Parts of each kind."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(context.parts.names):
        found.setdefault(kind_of_part(name), []).append(index)
    return found


def _sustained(context: AnalysisContext, losses: Floats, least_s: float) -> Iterator[tuple[_Straggler, Mask]]:
    """Nodes, then ranks, that are late more than chance would have it, the latest first."""
    for kind, columns in parts_by_kind(context).items():
        delays = losses[:, :, columns].sum(axis=2)
        left = list(range(delays.shape[1]))
        for units in (slow_nodes(context, delays), [(index,) for index in left]):
            waiting = [unit for unit in units if set(unit) <= set(left)]
            while waiting:
                unit = max(waiting, key=lambda members: float(delays[:, members].sum()))
                standing = _judge(delays, unit, left, least_s, context.steps.period_s)
                if standing is None:
                    break
                waiting.remove(unit)
                left = [index for index in left if index not in unit]
                mask = mask_of(losses.shape, unit, columns)
                yield _Straggler(kind, unit, (losses * mask).sum(axis=1), *standing), mask


def slow_nodes(context: AnalysisContext, delays: Floats) -> list[tuple[int, ...]]:
    """Nodes all of whose ranks are late alike, and later than any rank elsewhere."""
    return late_alike(context.nodes().values(), delays)


def late_alike(units: Iterable[Sequence[int]], delays: Floats) -> list[tuple[int, ...]]:
    """Those of ``units`` all of whose members are late alike, and later than any other rank."""
    mean = delays.mean(axis=0)
    found = []
    for members in units:
        others = np.delete(mean, list(members))
        least, most = mean[list(members)].min(), mean[list(members)].max()
        if len(members) > 1 and len(others) and least > max(ALIKE * most, TIMES_OTHERS * others.max()):
            found.append(tuple(members))
    return found


def _judge(
    delays: Floats, unit: tuple[int, ...], left: Sequence[int], least_s: float, period_s: float
) -> tuple[float, int, float] | None:
    """Chance, no events, and dominance of ``unit`` against the other traces ``left``; None if it is no straggler."""
    own = delays[:, unit].sum(axis=1)
    others = [index for index in left if index not in unit]
    mean = float(own.mean())
    if not others or mean < least_s:
        return None
    # A node is compared with as many ranks' worth of the others.
    peers = delays[:, others] * len(unit)
    if mean < TIMES_PEERS * float(np.median(peers.mean(axis=0))):
        return None
    chance = chance_of_sum(np.column_stack((own, peers)), 0)
    dominance = float((own > peers.max(axis=1)).mean())
    if chance > MAX_CHANCE and not _unmistakable(own, peers, dominance, period_s):
        return None
    return chance, 0, dominance


def stands_apart(own: Floats, peers: Floats, period_s: float) -> bool:
    """Whether ``own`` (steps,) is the longest in almost every step, and beyond its noise, of all ``peers``, (steps,
    ranks). From one step to the next it takes ``period_s``."""
    return _unmistakable(own, peers, float((own > peers.max(axis=1)).mean()), period_s)


def _unmistakable(own: Floats, peers: Floats, dominance: float, period_s: float) -> bool:
    """Few ranks or steps leave much to chance; but an equal delay in each step is none.

    In fewer than four steps, of which nobody says that others are alike, it must be a large part of each of them.
    """
    if len(own) < FEW_STEPS:
        apart_s = float(own.min() - peers.max())
        return apart_s > max(FEW_SHARE * period_s, EVENT_TIMES * max(float(np.ptp(own)), float(np.ptp(peers))))
    error = max(float(own.std()), float(peers.std(axis=0).max())) / np.sqrt(len(own))
    return dominance > 0.9 and float(own.mean() - peers.mean(axis=0).max()) > 6 * error


def _events(context: AnalysisContext, losses: Floats, least_s: float) -> Iterator[tuple[_Straggler, Mask]]:
    """Single delays that are far beyond whatever else happens, where only one or two ranks have any."""
    whole = losses.sum(axis=2)
    floor = max(EVENT_SHARE * context.steps.median_s, EVENT_S)
    limits = np.array([max(EVENT_TIMES * _usual_worst(whole, index), floor) for index in range(whole.shape[1])])
    for kind, columns in parts_by_kind(context).items():
        delays = losses[:, :, columns].sum(axis=2)
        for index in range(whole.shape[1]):
            part = columns[int(losses[:, index, columns].max(axis=0).argmax())]
            there = _with_like(losses[:, :, part], index, delays[:, index] > limits[index])
            mask = mask_of(losses.shape, (index,), columns) & there[:, None, None]
            charges = (losses * mask).sum(axis=1)
            if charges.sum() / len(charges) >= least_s:
                few = there.sum() <= max(1.0, STALL_STEPS * len(there))
                stall = kind != "checkpoint" and few and not _at_an_interval(context.steps.numbers[there])
                count = int(there.sum())
                yield _Straggler("stall" if stall else kind, (index,), charges, 0.0, count, 1.0), mask


def _at_an_interval(steps: npt.NDArray[np.int64]) -> bool:
    """Three or more at one distance are how the rank does its work, however few they are."""
    gaps = np.diff(steps)
    return len(steps) >= MIN_REGULAR and bool((gaps == gaps[0]).all())


def _usual_worst(whole: Floats, index: int) -> float:
    """The worst step of any other trace, and what is usual for this one itself."""
    worst = np.sort(np.delete(whole.max(axis=0), index))
    # Another rank may have its own events; with a few ranks that would leave too little to compare with.
    usual = float(worst[-2 if len(worst) >= 5 else -1]) if len(worst) else np.inf
    return max(usual, float(np.quantile(whole[:, index], 0.7)))


def _with_like(delays: Floats, index: int, events: Mask) -> Mask:
    """``events`` of a trace with its lesser delays in the same part, as long as no other trace has the like there.

    Without any, the largest delays of all are events if they are so many that chance would not give them to one.
    """
    own, others = delays[:, index], np.delete(delays, index, axis=1)
    apart = own > LIKE_TIMES * float(others.max(initial=0.0))
    if events.any():
        return np.asarray(events | (apart & (own > EVENT_SHARE * float(np.median(own[events])))))
    by_chance = float(delays.shape[1]) ** (1 - int(apart.sum()))
    return apart if apart.any() and by_chance <= MAX_CHANCE else events


def mask_of(shape: tuple[int, ...], members: Sequence[int], columns: Sequence[int]) -> Mask:
    """Shape (steps, traces, parts + 1): ``members`` in ``columns``."""
    mask = np.zeros(shape, dtype=bool)
    for index in members:
        mask[:, index, columns] = True
    return mask


def _merged(stragglers: Sequence[_Straggler]) -> list[_Straggler]:
    """Those of one kind on the same ranks are one: a steady delay and its outliers, a stall that spans two phases."""
    groups: dict[tuple[str, tuple[int, ...]], list[_Straggler]] = {}
    for straggler in stragglers:
        groups.setdefault((straggler.kind, straggler.members), []).append(straggler)
    merged = []
    for members in groups.values():
        first = max(members, key=lambda straggler: straggler.lost_s)
        charges = np.sum([straggler.charges for straggler in members], axis=0)
        merged.append(
            replace(first, charges=charges, events=int((charges.sum(axis=1) > 0).sum()) if first.events else 0)
        )
    return merged


def _finding(context: AnalysisContext, straggler: _Straggler) -> Finding:
    by_part = straggler.charges.sum(axis=0)
    names = (*context.parts.names, "")
    phase = phase_of_part(names[int(by_part.argmax())])
    first, alone = context.traces[straggler.members[0]], len(straggler.members) == 1
    ranks = context.ranks(straggler.members)
    what = work_in_words(phase)
    who = f"{first.name}: its {what} takes" if alone else f"all ranks of {first.node} ({ranks}): their {what} takes"
    told = f"others wait for {who} longer than the others', {_when(context, straggler)}"
    function, in_words = excess_function(context, straggler.members[0], phase, straggler.lost_s)
    told += in_words
    on_gpu, in_words = gpu_findings.excess(context.gpu, first.rank) if alone else ("", "")
    told += f"; {in_words}" if on_gpu else ""
    kinds: dict[str, float] = {}
    for name, cost in zip(names, by_part / len(straggler.charges), strict=True):
        kinds[phase_of_part(name)] = kinds.get(phase_of_part(name), 0.0) + float(cost)
    split = {name: cost for name, cost in kinds.items() if cost > 0.1 * straggler.lost_s}
    if len(split) > 1:
        told += "; by phase: " + ", ".join(f"{name} {cost:.3g} s" for name, cost in split.items())
    worst = context.worst_step(straggler.charges[:, int(by_part.argmax())])
    whom = f"rank={first.rank}" if alone else f"node={first.node}"
    return Finding(
        kind=straggler.kind,
        cause=CAUSES[straggler.kind] if alone else f"{CAUSES[straggler.kind]} on a slow node",
        lost_s=straggler.lost_s,
        rank=first.rank if alone else None,
        node=first.node,
        phase=phase,
        evidence=told,
        confidence=_confidence(straggler, context.steps.mean_s),
        rows=f"delays: {whom} phase={names[int(by_part.argmax())]}" + ("" if worst is None else f" step={worst}"),
        worst_step=worst,
        function=function,
        gpu_excess=on_gpu,
        is_only_node=len(context.nodes()) == 1,
    )


def _when(context: AnalysisContext, straggler: _Straggler) -> str:
    """In which steps, in words."""
    by_step = straggler.charges.sum(axis=1)
    numbers = context.steps.numbers
    if straggler.events:
        steps = numbers[by_step > 0]
        listed = ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "")
        return f"in {len(steps)} of {len(numbers)} steps ({listed})"
    told = f"most of all in {in_percent(straggler.dominance)} of steps"
    heavy = np.flatnonzero(by_step > 0.5 * np.quantile(by_step, 0.95))
    span = slice(int(heavy[0]), int(heavy[-1]) + 1) if len(heavy) else slice(0, len(numbers))
    if span.stop - span.start <= 0.7 * len(numbers) and by_step[span].sum() > 0.85 * by_step.sum():
        told += f", and only from step {numbers[span][0]} to {numbers[span][-1]}"
    elif 0 < straggler.chance <= MAX_CHANCE:
        told += f" (by chance: {straggler.chance:.0e})"
    return told


def _confidence(straggler: _Straggler, step_s: float) -> str:
    share = straggler.lost_s / step_s
    sure = (
        straggler.chance < MAX_CHANCE / 20
        if not straggler.events
        else straggler.lost_s * len(straggler.charges) > straggler.events * step_s / 2
    )
    return HIGH if share >= 2 * STRAGGLER_SHARE and sure else MEDIUM


def excess_function(context: AnalysisContext, trace: int, phase: str, lost_s: float) -> tuple[str, str]:
    """The OS function in which a rank's step thread is for longer than its peers in ``phase``; by how much, in words.

    Both are empty if that is no large part of ``lost_s``, seconds a step.
    """
    per_rank = []
    for other in context.traces:
        calls = other.calls[(other.calls["phase"] == phase) & other.calls["step"].isin(context.steps.numbers)]
        per_rank.append(calls.groupby("function")["total_ns"].sum())
    table = pd.concat(per_rank, axis=1).fillna(0.0).to_numpy(np.float64)
    names = pd.concat(per_rank, axis=1).index
    if not len(names) or table.shape[1] < 2:
        return "", ""
    excess = table[:, trace] - np.median(np.delete(table, trace, axis=1), axis=1)
    most = int(excess.argmax())
    excess_s = float(excess[most]) / NS_PER_S / len(context.steps.numbers)
    if excess_s <= OF_THE_LOSS * lost_s:
        return "", ""
    return str(names[most]), f"; {excess_s:.3g} s a step more than its peers in {names[most]}"


OF_THE_LOSS = 0.3
"""An OS function is named for this share of what a rank costs."""
LONGER = 1.1
"""A rank's batches are longer from so many times its peers' on."""
VARIED = 0.05
"""Batches differ from this standard deviation on, as a share of their mean."""
FOLLOWS = 0.5
"""Correlation of size and computation from which the one is taken for the other's cause."""
TOGETHER = 0.7
"""Correlation of forward and backward that stands for unequal batches if no sizes are known."""
MIN_CELLS = 16


def explain_by_batches(context: AnalysisContext, straggler: Finding) -> Finding:
    """``straggler`` as one of its batches, where those are so much longer than its peers'; else as it is."""
    sizes = _sizes(context)
    if straggler.kind != "compute" or sizes is None:
        return straggler
    mean = np.nanmean(sizes, axis=0)
    mine = np.array(
        [
            trace.rank == straggler.rank if straggler.rank is not None else trace.node == straggler.node
            for trace in context.traces
        ]
    )
    if mine.all() or not mine.any():
        return straggler
    times = float(mean[mine].mean() / np.median(mean[~mine]))
    if not times > LONGER:
        return straggler
    told = f"{straggler.evidence}; its batches are {times:.3g} times as large as its peers'"
    on_node = "" if straggler.rank is not None else " on a node"
    return replace(straggler, kind="batch", cause=CAUSES["batch"] + on_node, evidence=told)


def find_batch_imbalance(context: AnalysisContext, losses: Floats, among: npt.NDArray[np.bool_]) -> Finding | None:
    """The loss in computation that comes of unequal batches; None if they are equal, or do not explain it.

    ``losses`` (steps, traces, parts + 1) are those of no straggler; ``among`` (traces,) says who is not blamed.
    """
    forward, backward = (
        context.time_in([name for name in context.parts.names if part_of_a_step(name) == part])[:, among]
        for part in ("forward", "backward")
    )
    if forward.shape[1] < 2 or forward.size < MIN_CELLS:
        return None
    sizes = _sizes(context)
    if sizes is not None:
        sizes = sizes[:, among]
    if sizes is not None and np.isfinite(sizes).all():
        if sizes.std() < VARIED * sizes.mean():
            return None
        strength = _correlation(_within_steps(sizes), _within_steps(forward + backward))
        if strength < FOLLOWS:
            return None
        told = (
            f"batches differ by {sizes.std() / sizes.mean():.0%} (standard deviation over mean) and computation "
            f"follows them (correlation {strength:.2f})"
        )
        confidence = HIGH if strength > 0.8 else MEDIUM
    else:
        # A rank that is always slow is not meant, so its own mean goes, too.
        here, there = (values - values.mean(axis=0) for values in (_within_steps(forward), _within_steps(backward)))
        strength = _correlation(here, there)
        if strength < TOGETHER or here.std() < 2 * VARIED * forward.mean():
            return None
        told = f"forward and backward are long together (correlation {strength:.2f}), by turns on any rank"
        confidence = MEDIUM
    compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
    by_part = losses[:, :, compute].sum(axis=(0, 1))
    by_step = losses[:, :, compute].sum(axis=(1, 2))
    phase = context.parts.names[compute[int(by_part.argmax())]]
    worst = context.worst_step(losses[:, :, compute[int(by_part.argmax())]].sum(axis=1))
    rows = f"delays: phase={phase}" + ("" if worst is None else f" step={worst}")
    return Finding("uneven", CAUSES["uneven"], float(by_step.mean()), None, "", phase, told, confidence, rows, worst)


def _sizes(context: AnalysisContext) -> Floats | None:
    """Size of each rank's batch in each step, shape (steps, traces); None if any rank has none."""
    columns = []
    for trace in context.traces:
        if trace.batches is None or trace.batches.empty:
            return None
        by_step = trace.batches.groupby("step")["size"].sum().reindex(context.steps.numbers)
        columns.append(by_step.to_numpy(np.float64))
    sizes = np.column_stack(columns)
    return sizes if np.isfinite(sizes).any(axis=0).all() else None


def _within_steps(values: Floats) -> Floats:
    """Deviation of each rank from the mean of its step."""
    deviation: Floats = values - values.mean(axis=1, keepdims=True)
    return deviation


def _correlation(left: Floats, right: Floats) -> float:
    spread = float(left.std() * right.std())
    return float((left * right).mean() / spread) if spread > 0 else 0.0
