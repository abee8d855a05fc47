"""Sections of the key ``train``: when training ends, and how fp16 scales the loss."""

from __future__ import annotations

from dataclasses import dataclass

from hpcmm.config.keys import key
from hpcmm.text import StrEnum


class Better(StrEnum):
    """Which values of a metric are the better ones."""

    min = "min"
    max = "max"


@dataclass
class UntilConfig:
    """When training ends before ``train.steps``: when its metric has settled."""

    metric: str | None = key(
        None, "``loss``, a part of the loss, or a score of train.evaluate_every; None: train.steps alone ends the run."
    )
    patience: int = key(100, "Steps without an improvement after which the metric has settled.", least=1)
    min_delta: float = key(0.0, "An improvement is a change by more than this since the last one.", least=0)
    mode: Better | None = key(
        None, "``min`` or ``max``: which is better. None: min for the loss and its parts, max for a score."
    )
    every: int = key(10, "Steps over which the loss is averaged before it is looked at.", least=1)


@dataclass
class LossScaleConfig:
    """The factor of the loss in fp16. An overflow halves it and skips the step."""

    initial_power: int = key(16, "It begins as 2 to this power.", least=0, most=32)
    window: int = key(1000, "Steps without an overflow after which it is doubled.", least=1)
    least: int = key(1, "The smallest factor; an overflow there ends the run.", least=1)
