"""What rank 0 says while it trains: a bar where a person watches, and a line an interval in the log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import Progress as Bar

from hpcmm.config.schema import RunConfig

log = logging.getLogger("hpcmm.train")


class Progress:
    """Shown by one rank only; the others' does nothing."""

    def __init__(self, config: RunConfig, *, first: int, shown: bool) -> None:
        """``first``: the step that this attempt begins with."""
        self._steps = config.train.steps
        self._batch = config.global_batch_size
        self._every = config.train.log_every
        self._first = first
        self._shown = shown
        self._bar = Bar(disable=not (shown and sys.stderr.isatty()))
        self._task = self._bar.add_task("training", total=self._steps, completed=first)
        self._interval_began = time.perf_counter()
        self._interval_steps = 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._interval_began = time.perf_counter()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, loss: float, step_s: float) -> None:
        """After each step, with this rank's loss."""
        self._interval_steps += 1
        self._bar.advance(self._task)
        if not self._shown or ((step + 1) % self._every and step not in (self._first, self._steps - 1)):
            return
        now = time.perf_counter()
        elapsed_s, done = now - self._interval_began, self._interval_steps
        self._interval_began, self._interval_steps = now, 0
        log.info(
            "step %d/%d: loss %.4f on this rank, %.1f samples/s, %.3f s a step, the last %.3f s",
            step + 1,
            self._steps,
            loss,
            done * self._batch / elapsed_s,
            elapsed_s / done,
            step_s,
        )
