"""Whether a run's metric has settled: a function of the values that were seen, the same on all ranks."""

from __future__ import annotations

import math
from typing import Any

from hpcmm.config.train_sections import Better, UntilConfig


class Settling:
    """Says when ``train.until`` is met. Plain numbers in, and out into a checkpoint."""

    def __init__(self, until: UntilConfig, state: dict[str, Any] | None = None) -> None:
        """``state``: what :attr:`state` was, for a run that goes on."""
        self._until = until
        known = state or {}
        self._best: float | None = known.get("best")
        self._best_at = int(known.get("best_at", 0))
        self._sum = float(known.get("sum", 0.0))
        self._count = int(known.get("count", 0))
        self.reason: str | None = known.get("reason")
        """Why the run has settled, as the rest of a sentence; None as long as it has not."""

    @property
    def state(self) -> dict[str, Any]:
        """All that is known, for a checkpoint."""
        return {
            "best": self._best,
            "best_at": self._best_at,
            "sum": self._sum,
            "count": self._count,
            "reason": self.reason,
        }

    def see_step(self, steps_done: int, value: float) -> None:
        """The metric's value in a step, the mean over all ranks. Each ``until.every`` steps their mean is looked at."""
        self._sum += value
        self._count += 1
        if steps_done % self._until.every == 0:
            mean, self._sum, self._count = self._sum / self._count, 0.0, 0
            self._look(steps_done, mean, self._until.mode or Better.min)

    def see_score(self, steps_done: int, value: float) -> None:
        """The metric as a score on held-out data."""
        self._look(steps_done, value, self._until.mode or Better.max)

    def _look(self, steps_done: int, value: float, mode: Better) -> None:
        if self.reason is not None or not math.isfinite(value):
            return  # a loss that overflowed says nothing of where it goes
        best, falls = self._best, mode is Better.min
        gain = 0.0 if best is None else best - value if falls else value - best
        if best is None or gain > self._until.min_delta:
            self._best, self._best_at = value, steps_done
        elif steps_done - self._best_at >= self._until.patience:
            by = f" by {self._until.min_delta:g}" if self._until.min_delta else ""
            verb = "fallen" if falls else "risen"
            self.reason = f"{self._until.metric} has not {verb}{by} in {steps_done - self._best_at} steps"
