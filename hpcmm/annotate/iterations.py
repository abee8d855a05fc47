"""Which of a program's optimizers ends an iteration of its loop."""

from __future__ import annotations

from collections.abc import Callable

WEIGHTS = 0
"""Stands for an optimizer that is not seen but by what it does."""

_MOST_IN_ITERATION = 8
"""Steps of one optimizer: if it has more for one of another, that one steps now and then, and ends no iteration."""


class Iterations:
    """Which optimizer is the last of an iteration, and whether it has stepped.

    Several optimizers, as those of a generator and a discriminator, step in turn, some more often than others. The one
    that came last to its first step ends the iteration. If another one steps more than twice as often as in the last
    iteration, the loop has changed, and that one ends it. Steps of one optimizer without any work between are one: ZeRO
    calls it for each group of parameters.
    """

    def __init__(self, optimizers: Callable[[], int]) -> None:
        self._optimizers = optimizers
        self._last: int | None = None
        self._known: set[int] = set()
        self._is_settled = False
        """Whether the first iteration is over, so that all optimizers of the loop are known."""
        self._steps: dict[int, int] = {}
        """Steps of each optimizer."""
        self._steps_at: dict[int, dict[int, int]] = {}
        """The same when an optimizer that ended an iteration stepped last."""
        self._between: dict[int, dict[int, int]] = {}
        """Steps of each optimizer between the last two steps of one that ended an iteration."""
        self.since_work: dict[int, None] = {}
        """Optimizers that have stepped since the last work, in turn."""
        self.is_over = False

    @property
    def has_stepped(self) -> bool:
        return bool(self._steps)

    @property
    def is_of_weights(self) -> bool:
        """Whether only changes of weights told of updates so far."""
        return self._steps.keys() == {WEIGHTS}

    def is_possible(self) -> bool:
        """Whether anything could end an iteration."""
        return self._optimizers() > 0

    def step(self, optimizer: int) -> bool:
        """Note a step. Returns whether it is this optimizer's first."""
        if optimizer in self.since_work:
            return False
        self.since_work[optimizer] = None
        steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._last = optimizer
        self._is_settled = self._is_settled or steps > 1 or len(self._known) >= self._optimizers()
        if self._is_settled and self._has_changed(optimizer, steps):
            self._known, self._last = {optimizer}, optimizer
        if optimizer == self._last:
            before = self._steps_at.get(optimizer, {})
            so_far = dict(self._steps)  # other threads may step meanwhile
            self._between[optimizer] = between = {each: count - before.get(each, 0) for each, count in so_far.items()}
            self._steps_at[optimizer] = so_far
            self.is_over = self.is_over or self._is_settled
            most = max(between, key=between.__getitem__)
            if between[most] > _MOST_IN_ITERATION:
                self._last = most
        return steps == 1

    def _has_changed(self, optimizer: int, steps: int) -> bool:
        if self._last is None or optimizer == self._last:
            return False
        # Another thread may have made one the last that has not been noted yet.
        since_last = steps - self._steps_at.get(self._last, self._steps).get(optimizer, 0)
        return since_last > 2 * self._between.get(self._last, {}).get(optimizer, 0) + 1

    def work(self) -> None:
        """The work for another step begins."""
        self.since_work.clear()

    def begin(self) -> None:
        """Another iteration begins."""
        self.is_over = False
