"""Which charges are a rank's or a node's fault: those that stand out of the noise of the run.

A fault is either sustained, then chance does not explain its sum; or it is a few events that are far beyond whatever
else happens in the run, on one or two ranks. The rules are explained in ``docs/bottlenecks.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import gpu_findings
from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import CAUSES, HIGH, MEDIUM, AnalysisContext, Finding, kind_of_part, phase_of_part
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.significance import chance_of_sum

FAULT_SHARE = 0.03
"""A rank is named from this share of a step on."""
MAX_CHANCE = 0.003
"""Probability by chance above which a sustained delay is nobody's."""
TRANSFER_SHARE = 0.1
"""... and from this share of the exposed transfer on, whose ends are not as sharp as work's."""
TIMES_PEERS = 2.0
"""A rank's delays must be so many times as long as those of its peers' median."""
ALIKE = 0.5
"""A node is at fault when its least late rank has more than this share of its latest one's delays ..."""
TIMES_OTHERS = 1.5
"""... and so many times as long ones as any rank elsewhere."""
EVENT_TIMES = 3.0
"""An event is so many times as long as the worst step of any other rank (with six or more, but one) ..."""
EVENT_SHARE = 0.3
"""... and lasts at least this share of a step."""
EVENT_S = 0.1
"""... and this long: on a busy machine a process waits some tens of milliseconds for its turn, and that is no fault."""
LIKE_TIMES = 1.5
"""Delays so many times as long as any other rank's of their kind are of one sort with a rank's events."""
STALL_STEPS = 0.1
"""Events in at most this share of the steps are a stall, and not how the rank does its work."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Fault:
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


def find_stragglers(context: AnalysisContext, transfer_s: float) -> tuple[list[Finding], Mask]:
    """Rows that name a rank or a node, and the mask (steps, traces, parts + 1) of the charges that they hold.

    ``transfer_s`` is the exposed transfer of a step.
    """
    least_s = max(FAULT_SHARE * context.steps.mean_s, TRANSFER_SHARE * transfer_s)
    blamed = np.zeros(context.losses.shape, dtype=bool)
    faults = []
    for search in (_sustained, _events):
        for fault, mask in search(context, np.where(blamed, 0.0, context.losses), least_s):
            blamed |= mask
            faults.append(fault)
    return [_finding(context, fault) for fault in _merged(faults)], blamed


def _columns(context: AnalysisContext) -> dict[str, list[int]]:
    """Parts of each kind."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(context.parts.names):
        found.setdefault(kind_of_part(name), []).append(index)
    return found


def _sustained(context: AnalysisContext, losses: Floats, least_s: float) -> Iterator[tuple[_Fault, Mask]]:
    """Nodes, then ranks, that are late more than chance would have it, the latest first."""
    for kind, columns in _columns(context).items():
        delays = losses[:, :, columns].sum(axis=2)
        left = list(range(delays.shape[1]))
        for units in (_slow_nodes(context, delays), [(index,) for index in left]):
            waiting = [unit for unit in units if set(unit) <= set(left)]
            while waiting:
                unit = max(waiting, key=lambda members: float(delays[:, members].sum()))
                standing = _judge(delays, unit, left, least_s)
                if standing is None:
                    break
                waiting.remove(unit)
                left = [index for index in left if index not in unit]
                mask = _mask(losses.shape, unit, columns)
                yield _Fault(kind, unit, (losses * mask).sum(axis=1), *standing), mask


def _slow_nodes(context: AnalysisContext, delays: Floats) -> list[tuple[int, ...]]:
    """Nodes all of whose ranks are late alike, and later than any rank elsewhere."""
    mean = delays.mean(axis=0)
    found = []
    for members in context.nodes().values():
        others = np.delete(mean, members)
        least, most = mean[members].min(), mean[members].max()
        if len(members) > 1 and len(others) and least > max(ALIKE * most, TIMES_OTHERS * others.max()):
            found.append(tuple(members))
    return found


def _judge(
    delays: Floats, unit: tuple[int, ...], left: Sequence[int], least_s: float
) -> tuple[float, int, float] | None:
    """Chance, no events, and dominance of ``unit`` against the other traces ``left``; None where it is not at fault."""
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
    if chance > MAX_CHANCE and not _unmistakable(own, peers, dominance):
        return None
    return chance, 0, dominance


def _unmistakable(own: Floats, peers: Floats, dominance: float) -> bool:
    """Few ranks or steps leave much to chance; but an equal delay in each step is none."""
    error = max(float(own.std()), float(peers.std(axis=0).max())) / np.sqrt(len(own))
    return len(own) >= 4 and dominance > 0.9 and float(own.mean() - peers.mean(axis=0).max()) > 6 * error


def _events(context: AnalysisContext, losses: Floats, least_s: float) -> Iterator[tuple[_Fault, Mask]]:
    """Single delays that are far beyond whatever else happens, where only one or two ranks have any."""
    whole = losses.sum(axis=2)
    floor = max(EVENT_SHARE * context.steps.median_s, EVENT_S)
    limits = np.array([max(EVENT_TIMES * _usual_worst(whole, index), floor) for index in range(whole.shape[1])])
    for kind, columns in _columns(context).items():
        delays = losses[:, :, columns].sum(axis=2)
        for index in range(whole.shape[1]):
            part = columns[int(losses[:, index, columns].max(axis=0).argmax())]
            there = _with_like(losses[:, :, part], index, delays[:, index] > limits[index])
            mask = _mask(losses.shape, (index,), columns) & there[:, None, None]
            charges = (losses * mask).sum(axis=1)
            if charges.sum() / len(charges) >= least_s:
                stall = kind != "checkpoint" and there.sum() <= max(1.0, STALL_STEPS * len(there))
                count = int(there.sum())
                yield _Fault("stall" if stall else kind, (index,), charges, 0.0, count, 1.0), mask


def _usual_worst(whole: Floats, index: int) -> float:
    """The worst step of any other trace, and what is usual for this one itself."""
    worst = np.sort(np.delete(whole.max(axis=0), index))
    # Another rank may have its own events; with a few ranks that would leave too little to compare with.
    usual = float(worst[-2 if len(worst) >= 5 else -1]) if len(worst) else np.inf
    return max(usual, float(np.quantile(whole[:, index], 0.7)))


def _with_like(delays: Floats, index: int, events: Mask) -> Mask:
    """``events`` of a trace with its lesser delays in the same part, as long as no other trace has the like there.

    Without any, the largest delays of all are events where they are so many that chance would not give them to one.
    """
    own, others = delays[:, index], np.delete(delays, index, axis=1)
    apart = own > LIKE_TIMES * float(others.max(initial=0.0))
    if events.any():
        return np.asarray(events | (apart & (own > EVENT_SHARE * float(np.median(own[events])))))
    by_chance = float(delays.shape[1]) ** (1 - int(apart.sum()))
    return apart if apart.any() and by_chance <= MAX_CHANCE else events


def _mask(shape: tuple[int, ...], members: Sequence[int], columns: Sequence[int]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    for index in members:
        mask[:, index, columns] = True
    return mask


def _merged(faults: Sequence[_Fault]) -> list[_Fault]:
    """Faults of one kind on the same ranks are one: a steady delay and its outliers, a stall that spans two phases."""
    groups: dict[tuple[str, tuple[int, ...]], list[_Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.kind, fault.members), []).append(fault)
    merged = []
    for members in groups.values():
        first = max(members, key=lambda fault: fault.lost_s)
        charges = np.sum([fault.charges for fault in members], axis=0)
        merged.append(
            replace(first, charges=charges, events=int((charges.sum(axis=1) > 0).sum()) if first.events else 0)
        )
    return merged


def _finding(context: AnalysisContext, fault: _Fault) -> Finding:
    by_part = fault.charges.sum(axis=0)
    names = (*context.parts.names, "")
    phase = phase_of_part(names[int(by_part.argmax())])
    first, alone = context.traces[fault.members[0]], len(fault.members) == 1
    ranks = context.ranks(fault.members)
    who = f"rank {ranks}: its {phase} takes" if alone else f"all ranks of {first.node} ({ranks}): their {phase} takes"
    told = f"others wait for {who} longer than the others', {_when(context, fault)}"
    function, function_s = _excess_function(context, fault.members[0], phase)
    if function and function_s > 0.3 * fault.lost_s:
        told += f"; {function_s:.3g} s a step more than its peers in {function}"
    on_gpu = gpu_findings.excess(context.gpu, first.rank) if alone else ""
    told += f"; {on_gpu}" if on_gpu else ""
    kinds: dict[str, float] = {}
    for name, cost in zip(names, by_part / len(fault.charges), strict=True):
        kinds[phase_of_part(name)] = kinds.get(phase_of_part(name), 0.0) + float(cost)
    split = {name: cost for name, cost in kinds.items() if cost > 0.1 * fault.lost_s}
    if len(split) > 1:
        told += "; by phase: " + ", ".join(f"{name} {cost:.3g} s" for name, cost in split.items())
    worst = context.worst_step(fault.charges[:, int(by_part.argmax())])
    whom = f"rank={ranks}" if alone else f"node={first.node}"
    return Finding(
        kind=fault.kind,
        cause=CAUSES[fault.kind] if alone else f"{CAUSES[fault.kind]} on a slow node",
        lost_s=fault.lost_s,
        rank=first.rank if alone else None,
        node=first.node,
        phase=phase,
        evidence=told,
        confidence=_confidence(fault, context.steps.mean_s),
        rows=f"delays: {whom} phase={names[int(by_part.argmax())]}" + ("" if worst is None else f" step={worst}"),
        worst_step=worst,
    )


def _when(context: AnalysisContext, fault: _Fault) -> str:
    """In which steps, in words."""
    by_step = fault.charges.sum(axis=1)
    numbers = context.steps.numbers
    if fault.events:
        steps = numbers[by_step > 0]
        listed = ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "")
        return f"in {len(steps)} of {len(numbers)} steps ({listed})"
    told = f"most of all in {fault.dominance:.0%} of steps"
    heavy = np.flatnonzero(by_step > 0.5 * np.quantile(by_step, 0.95))
    span = slice(int(heavy[0]), int(heavy[-1]) + 1) if len(heavy) else slice(0, len(numbers))
    if span.stop - span.start <= 0.7 * len(numbers) and by_step[span].sum() > 0.85 * by_step.sum():
        told += f", and only from step {numbers[span][0]} to {numbers[span][-1]}"
    elif fault.chance > 0:
        told += f" (by chance: {fault.chance:.0e})"
    return told


def _confidence(fault: _Fault, step_s: float) -> str:
    share = fault.lost_s / step_s
    sure = (
        fault.chance < MAX_CHANCE / 20
        if not fault.events
        else fault.lost_s * len(fault.charges) > fault.events * step_s / 2
    )
    return HIGH if share >= 2 * FAULT_SHARE and sure else MEDIUM


def _excess_function(context: AnalysisContext, trace: int, phase: str) -> tuple[str, float]:
    """The OS function in which the rank's step thread spends more time in ``phase`` than its peers; seconds a step."""
    per_rank = []
    for other in context.traces:
        calls = other.calls[(other.calls["phase"] == phase) & other.calls["step"].isin(context.steps.numbers)]
        per_rank.append(calls.groupby("function")["total_ns"].sum())
    table = pd.concat(per_rank, axis=1).fillna(0.0).to_numpy(np.float64)
    names = pd.concat(per_rank, axis=1).index
    if not len(names) or table.shape[1] < 2:
        return "", 0.0
    excess = table[:, trace] - np.median(np.delete(table, trace, axis=1), axis=1)
    most = int(excess.argmax())
    return str(names[most]), float(excess[most]) / NS_PER_S / len(context.steps.numbers)
