"""Communication that stood still for a while: a few steps in which all ranks wait for bytes far longer than usually.

A link that is cut for a second costs several, since TCP tries again at ever longer intervals.
"""

from __future__ import annotations

import numpy as np

from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import CAUSES, MEDIUM, Evidence, Finding
from hpcmm.analysis.osrt import NS_PER_S

TIMES_USUAL = 3.0
"""A step is interrupted when its exposed transfer is so many times the median step's ..."""
LEAST_S = 0.3
"""... and exceeds it by so much: below this TCP does not try again, and busy processors explain as much."""
MOST_STEPS = 0.2
"""... which happens in at most this share of the steps; else it is how the network is."""


def interrupted(evidence: Evidence, stopped_s: Floats) -> list[Finding]:
    """One finding, or none. ``stopped_s`` by step, a mean over ranks, is lost to processes that stood still."""
    rows, numbers = evidence.rows, evidence.steps.numbers
    unseen = evidence.expected_ranks > sum(len(trace.steps) > 0 for trace in evidence.traces)
    if rows.empty or unseen:
        return []
    inside = rows[rows["step"].isin(numbers)]
    total = inside.groupby("step")["exposed_transfer_ns"].sum().reindex(numbers).fillna(0.0).to_numpy(np.float64)
    transfer = np.maximum(total / NS_PER_S / len(evidence.traces) - stopped_s, 0.0)
    usual = float(np.median(transfer))
    hit = (transfer > TIMES_USUAL * usual) & (transfer > usual + LEAST_S)
    if not hit.any() or hit.sum() > max(1.0, MOST_STEPS * len(hit)):
        return []
    lost = np.where(hit, transfer - usual, 0.0)
    worst = evidence.worst_step(lost)
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
