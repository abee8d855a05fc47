"""What the verdicts are made of: the evidence that they rest on, and a finding before it is ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hpcmm.analysis.delay import BETWEEN_STEPS, Floats, WorkParts
from hpcmm.analysis.steps import StepTimes
from hpcmm.analysis.trace import RankTrace

HIGH, MEDIUM, LOW = "high", "medium", "low"

CAUSES = {
    "data": "data loading",
    "compute": "computation",
    "checkpoint": "checkpoint",
    "subprocess": "waiting for a child process",
    "stall": "stall",
    "between": "work between steps",
    "other": "work outside the phases",
    "transfer": "communication transfer",
    "imbalance": "imbalance without a culprit",
}


def kind_of_phase(phase: str) -> str:
    """The kind of finding that a long ``phase`` is."""
    kinds = {"data": "data", "checkpoint": "checkpoint", "other": "other", BETWEEN_STEPS: "between"}
    return kinds.get(phase, "compute")


@dataclass(frozen=True, slots=True)
class Finding:
    """A row before it is ranked. ``kind`` selects the suggestion."""

    kind: str
    cause: str
    lost_s: float
    rank: int | None
    node: str
    phase: str
    evidence: str
    confidence: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the findings rest on."""

    traces: Sequence[RankTrace]
    rows: pd.DataFrame
    """Matched collectives with exposed waits."""
    steps: StepTimes
    parts: WorkParts
    losses: Floats
    """Seconds by (step, trace, part), a mean over ranks."""
    expected_ranks: int
    """Ranks of the job, read or not."""
