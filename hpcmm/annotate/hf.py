"""Steps of a Hugging Face ``Trainer``: ``Trainer(..., callbacks=[StepAnnotation()])``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hpcmm.annotate.callbacks import OpenRanges


class StepAnnotation(TrainerCallback):  # type: ignore[misc]
    """A range for each optimizer step, from its first micro-batch to its last, and phases for what the Trainer tells.

    ``forward_backward`` is from a micro-batch's start to the optimizer, which the Trainer runs as one; ``optimizer`` is
    the optimizer's own step. Fetching a batch lies before the step's begin, so it is not within the range.
    """

    def __init__(self) -> None:
        self._open = OpenRanges()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._open.begin_step(state.global_step)
        self._open.begin_phase("forward_backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._open.begin_phase("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._open.end_phase()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._open.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._open.end()
