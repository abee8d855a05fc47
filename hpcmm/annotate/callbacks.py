"""Steps and phases by name in Lightning, Fabric and accelerate; :mod:`hpcmm.annotate.hf` has those of a ``Trainer``.

>>> lightning.Trainer(callbacks=[LightningSteps()])          # lightning or pytorch_lightning, whichever is there
>>> lightning.Fabric(callbacks=[FabricSteps()])
>>> for batch in accelerate_steps(accelerator, loader): ...

In a run of hpcmm's that is profiled, steps are found without them. They are for nsys called by hand, and for steps that
begin and end exactly where the framework says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from itertools import count
from typing import Any, TypeVar

from hpcmm.annotate.ranges import phase, step


class OpenRanges:
    """A step and a phase within it, which a framework's calls begin and end."""

    def __init__(self) -> None:
        self._step: AbstractContextManager[None] | None = None
        self._phase: AbstractContextManager[None] | None = None

    @property
    def is_in_step(self) -> bool:
        return self._step is not None

    def begin_step(self, number: int) -> None:
        """End what is open, and begin a step."""
        self.end()
        self._step = step(number)
        self._step.__enter__()

    def begin_phase(self, name: str) -> None:
        """End the phase that is open, and begin another one."""
        self.end_phase()
        self._phase = phase(name)
        self._phase.__enter__()

    def end_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def end(self) -> None:
        """End the phase and the step."""
        self.end_phase()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


class _LightningHooks:
    """A range for each optimizer step, from its first micro-batch to its last, and three phases.

    Of several optimizers in manual optimization each batch is a step. Fetching a batch lies before the step.
    """

    def __init__(self) -> None:
        self._open = OpenRanges()
        self._steps_before = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not self._open.is_in_step:
            self._steps_before = trainer.global_step
            self._open.begin_step(trainer.global_step)
        self._open.begin_phase("forward")

    def on_before_backward(self, *_: Any) -> None:
        self._open.begin_phase("backward")

    def on_after_backward(self, *_: Any) -> None:
        self._open.end_phase()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._open.begin_phase("optimizer")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._open.end_phase()
        if trainer.global_step != self._steps_before:
            self._open.end()

    def on_train_end(self, *_: Any) -> None:
        self._open.end()


class FabricSteps:
    """A range for each step of Fabric's optimizers, from the end of the one before.

    ``optimizers``: how many step in an iteration; the last of them ends it.
    """

    def __init__(self, optimizers: int = 1) -> None:
        self._optimizers = optimizers
        self._calls = count(1)
        self._numbers = count()
        self._open = OpenRanges()

    def on_after_setup(self, *_: Any, **__: Any) -> None:
        if not self._open.is_in_step:
            self._open.begin_step(next(self._numbers))

    def on_after_optimizer_step(self, *_: Any, **__: Any) -> None:
        if next(self._calls) % self._optimizers == 0:
            self._open.begin_step(next(self._numbers))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """For ``fabric.call("on_train_end")`` behind the loop; else the last step lasts until the program ends."""
        self._open.end()


Batch = TypeVar("Batch")


def accelerate_steps(accelerator: Any, batches: Iterable[Batch], first: int = 0) -> Iterator[Batch]:
    """Iterate over ``batches``, with a step for each update of the weights: several batches under ``accumulate``.

    ``first`` is the number of the first step.
    """
    open_ranges, numbers = OpenRanges(), count(first)
    iterator = iter(batches)
    try:
        batch = next(iterator)
        while True:
            if not open_ranges.is_in_step:
                open_ranges.begin_step(next(numbers))
            yield batch
            is_over = accelerator.sync_gradients
            with phase("data"):
                batch = next(iterator)
            if is_over:
                open_ranges.end()
    except StopIteration:
        return
    finally:
        open_ranges.end()


def __getattr__(name: str) -> Any:
    if name == "LightningSteps":
        return _lightning_steps()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _lightning_steps() -> type:
    """Made of the ``Callback`` of the package that the program uses."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    used = next((name for name in packages if name in sys.modules), None)
    for name in [used] if used else packages:
        try:
            base = import_module(name).Callback
        except ModuleNotFoundError:
            continue
        return type("LightningSteps", (_LightningHooks, base), {"__doc__": _LightningHooks.__doc__})
    raise ModuleNotFoundError("LightningSteps needs lightning or pytorch_lightning: install one of them.")
