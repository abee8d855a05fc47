"""Steps of a Hugging Face ``Trainer``: ``Trainer(..., callbacks=[StepAnnotation()])``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from transformers import TrainerCallback

from hpcmm.annotate.ranges import phase, step


class StepAnnotation(TrainerCallback):  # type: ignore[misc]
    """A range for each optimizer step, from its first micro-batch to its last, and phases for what the Trainer tells.

    ``forward_backward`` is from a micro-batch's start to the optimizer, which the Trainer runs as one; ``optimizer`` is
    the optimizer's own step. Fetching a batch lies before the step's begin, so it is not within the range.
    """

    def __init__(self) -> None:
        self._step: AbstractContextManager[None] | None = None
        self._phase: AbstractContextManager[None] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._end()
        self._step = step(state.global_step)
        self._step.__enter__()
        self._enter_phase("forward_backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._enter_phase("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._end_phase()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._end()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._end()

    def _enter_phase(self, name: str) -> None:
        self._end_phase()
        self._phase = phase(name)
        self._phase.__enter__()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _end(self) -> None:
        self._end_phase()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
