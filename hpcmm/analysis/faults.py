"""Which charges are a rank's or a node's fault: those that stand out of the noise of the run.

The rules are explained in ``docs/bottlenecks.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay import SUBPROCESS, Floats
from hpcmm.analysis.findings import CAUSES, HIGH, MEDIUM, Evidence, Finding, kind_of_phase
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.steps import MAD_TO_SIGMA

FAULT_SHARE = 0.03
"""A rank is named from this share of a step on."""
FAULT_Z = 4.0
"""Standard errors by which a rank's charge must exceed its peers'."""
FAULT_DOMINANCE = 0.5
"""Share of the steps in which the rank must be the first of all in its part, unless its loss comes in bursts."""
ALIKE = 0.3
"""A node is at fault when its least charged rank has more than this share of its most charged one's."""
BURST_SIGMAS = 8.0
BURST_SHARE = 0.6
"""A loss of which this share falls into steps beyond BURST_SIGMAS of the typical one comes in bursts."""


@dataclass(frozen=True, slots=True)
class _Standing:
    """How one rank's charges in one part stand out."""

    mean_s: float
    z: float
    dominance: float
    burst: bool
    burst_steps: int


def _standing(own: Floats, peers: Floats, totals: Floats) -> _Standing:
    """``own`` is a suspect's charge by step in one part, ``peers`` (steps, others) the others'; ``totals`` is all."""
    count = len(own)
    mean = float(own.mean())
    peer_means = peers.mean(axis=0) if peers.shape[1] else np.zeros(1)
    typical = float(np.median(peer_means))
    spread = MAD_TO_SIGMA * float(np.median(np.abs(peer_means - typical)))
    error = float(own.std()) / np.sqrt(max(count, 1))
    noise = float(np.hypot(error, spread))
    dominance = float((own > peers.max(axis=1, initial=0.0)).mean()) if count else 0.0
    limit = np.median(totals) + BURST_SIGMAS * MAD_TO_SIGMA * np.median(np.abs(totals - np.median(totals)))
    heavy = own > limit
    burst = mean > 0 and own[heavy].sum() / own.sum() > BURST_SHARE
    z = (mean - typical) / noise if noise > 0 else np.inf if mean > typical else 0.0
    return _Standing(mean, z, dominance, bool(burst), int(heavy.sum()))


def find_faults(evidence: Evidence) -> tuple[list[Finding], npt.NDArray[np.bool_]]:
    """Rows that name a rank or a node, and the mask (traces, parts + 1) of the charges that they hold."""
    losses, step_s = evidence.losses, evidence.steps.mean_s
    blamed = np.zeros(losses.shape[1:], dtype=bool)
    found: list[Finding] = []
    totals = losses.sum(axis=(1, 2))
    for part in range(len(evidence.parts.names)):
        for members in _suspects(evidence, losses[:, :, part]):
            others = np.array([trace for trace in range(losses.shape[1]) if trace not in members], dtype=np.intp)
            own = losses[:, members, part].sum(axis=1)
            # A node of several ranks is compared with as many ranks' worth of every other one.
            standing = _standing(own, losses[:, others, part] * len(members), totals)
            confidence = _confidence(standing, step_s)
            if confidence is not None and not blamed[members, part].any():
                blamed[members, part] = True
                found.append(_fault(evidence, members, part, standing, confidence))
    return _merge_phases(found), blamed


def _suspects(evidence: Evidence, losses: Floats) -> list[list[int]]:
    """Traces that may be at fault together: first whole nodes whose ranks are all late alike, then each rank."""
    by_node: dict[str, list[int]] = {}
    for index, trace in enumerate(evidence.traces):
        by_node.setdefault(trace.node, []).append(index)
    mean = losses.mean(axis=0)
    alike = [
        members
        for members in by_node.values()
        if 1 < len(members) < len(mean) and mean[members].min() > ALIKE * mean[members].max()
    ]
    return [*alike, *([index] for index in range(len(mean)))]


def _confidence(standing: _Standing, step_s: float) -> str | None:
    """How sure it is that the rank is at fault; None where it is not."""
    share = standing.mean_s / step_s
    if share < FAULT_SHARE:
        return None
    if standing.burst:
        return HIGH if share >= 2 * FAULT_SHARE else MEDIUM
    if standing.z < FAULT_Z or standing.dominance < FAULT_DOMINANCE:
        return None
    return HIGH if share >= 2 * FAULT_SHARE and standing.dominance >= 0.75 else MEDIUM


def _fault(evidence: Evidence, members: list[int], part: int, standing: _Standing, confidence: str) -> Finding:
    first = evidence.traces[members[0]]
    name = evidence.parts.names[part]
    phase = name.removeprefix(SUBPROCESS)
    one_off = standing.burst and phase != "checkpoint" and standing.burst_steps <= 0.1 * len(evidence.losses)
    kind = "stall" if one_off else "subprocess" if name.startswith(SUBPROCESS) else kind_of_phase(phase)
    alone = len(members) == 1
    ranks = ", ".join(str(evidence.traces[index].rank) for index in members)
    who = f"rank {ranks}: its {phase} takes" if alone else f"all ranks of {first.node} ({ranks}): their {phase} takes"
    if standing.burst:
        told = (
            f"others wait for {who} longer than the others', in {standing.burst_steps} of {len(evidence.losses)} steps"
        )
    else:
        told = f"others wait for {who} longer than the others', most of all in {standing.dominance:.0%} of steps"
    function, function_s = _excess_function(evidence, members[0], phase)
    if function and function_s > 0.3 * standing.mean_s:
        told += f"; {function_s:.3g} s a step more than its peers in {function}"
    if np.isfinite(standing.z) and not standing.burst:
        told += f" (z = {standing.z:.0f})"
    cause = CAUSES[kind] if alone else f"{CAUSES[kind]} on a slow node"
    return Finding(kind, cause, standing.mean_s, first.rank if alone else None, first.node, phase, told, confidence)


def _excess_function(evidence: Evidence, trace: int, phase: str) -> tuple[str, float]:
    """The OS function in which the rank's step thread spends more time in ``phase`` than its peers; seconds a step."""
    per_rank = []
    for other in evidence.traces:
        calls = other.calls[(other.calls["phase"] == phase) & other.calls["step"].isin(evidence.steps.numbers)]
        per_rank.append(calls.groupby("function")["total_ns"].sum())
    table = pd.concat(per_rank, axis=1).fillna(0.0).to_numpy(np.float64)
    names = pd.concat(per_rank, axis=1).index
    if not len(names) or table.shape[1] < 2:
        return "", 0.0
    excess = table[:, trace] - np.median(np.delete(table, trace, axis=1), axis=1)
    most = int(excess.argmax())
    return str(names[most]), float(excess[most]) / NS_PER_S / len(evidence.steps.numbers)


def _merge_phases(found: list[Finding]) -> list[Finding]:
    """Faults of one kind on one rank or node are one fault, in the phase that holds most of it."""
    groups: dict[tuple[int | None, str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.rank, finding.node, finding.kind), []).append(finding)
    merged = []
    for members in groups.values():
        most = max(members, key=lambda member: member.lost_s)
        lost = sum(member.lost_s for member in members)
        split = ", ".join(f"{member.phase} {member.lost_s:.3g} s" for member in members)
        told = most.evidence if len(members) == 1 else f"{most.evidence}; by phase: {split}"
        merged.append(replace(most, lost_s=lost, evidence=told))
    return merged
