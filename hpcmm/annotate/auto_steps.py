"""Steps and phases of a program that names none: what its optimizers, backward passes, modules and loaders tell.

A step ends when the optimizer that ends an iteration has stepped and the work of the next iteration begins: when a
batch has been fetched, or else with a forward or backward pass, or with a message that a pipeline stage receives. So
the micro-batches of one update are one step, and what a loop does behind its optimizer (a scheduler, an evaluation now
and then, fetching the next batch) belongs to the step before. When the loader of the training has no more batches, the
step ends. As long as no optimizer has stepped, weights that have changed since the last backward pass tell of an update
all the same.

Fetching counts only from a loader whose batches lead to a backward pass, and a forward pass only if it records
gradients and its module is in the mode (``train`` or ``eval``) in which it is trained. So evaluation makes no steps and
no phases.

The program's own ranges go first. Its first ``annotate.step`` ends the automatic steps for good, and within its phases
no automatic one is shown. This module knows nothing of PyTorch; :mod:`hpcmm.annotate.auto_instrument` calls it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any, Protocol, TypeVar, cast

from hpcmm.annotate import schema
from hpcmm.annotate.iterations import WEIGHTS, Iterations
from hpcmm.annotate.ranges import Range, RangeStack, before_step, note_step, pop, push, tell_rank


class Modules(Protocol):
    """The modules whose forward passes are told to :class:`AutomaticRanges`."""

    def find(self) -> Iterable[Any]:
        """Watch the outermost modules that train, and return those that are watched newly."""

    def weights(self) -> int:
        """A number that grows when weights of those that are watched change."""

    def descend(self) -> Iterable[Any]:
        """Watch the parts of those that are watched, which are not called themselves. Returns the parts."""

    def size_of(self, batch: Any) -> int | None:
        """How much a forward pass is given; None if that cannot be told."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _harmless(method: Method) -> Method:
    """A method that calls of the program's pass through: an error of its own ends the automatic ranges alone."""

    @functools.wraps(method)
    def call(self: AutomaticRanges, *arguments: Any, **keywords: Any) -> Any:
        if self.has_given_up:
            self.close()
            return False
        try:
            return method(self, *arguments, **keywords)
        except Exception as error:
            self.give_up(error)
            return False

    return cast("Method", call)


class AutomaticRanges:
    """The automatic ranges of one process, on the thread that trains, and their place among the program's own."""

    def __init__(self, optimizers: Callable[[], int], modules: Modules) -> None:
        """``optimizers``: how many optimizers the program has."""
        self._iterations = Iterations(optimizers)
        self._modules = modules
        self._thread = get_ident()
        self._stack = RangeStack()
        self._phases: list[Range] = []
        """Automatic phases that run, outermost first; they are not on the stack while the program has its own."""
        self._asked: list[Range] = []
        """The program's own phases that are open."""
        self._step: Range | None = None
        self._number = 0
        self._has_begun = False
        self._has_own_steps = False
        self._forwards: list[int] = []
        """Modules whose forward passes run, outermost first."""
        self._forwarded: dict[int, bool] = {}
        """Modules whose forward passes recorded gradients since the last backward pass, and their mode."""
        self._is_forward_shown = False
        """Whether one of these was taken for training."""
        self._is_called = False
        """Whether a watched module was called in this step."""
        self._modes: dict[int, bool] = {}
        """The mode in which each module trains."""
        self._trained: Callable[[], Any] = lambda: None
        """The module that trained last."""
        self._fetched: set[int] = set()
        self._loaders: set[int] = set()
        """Loaders that batches of the training come from."""
        self._backwards = 0
        self._updates = 0
        """Calls of optimizers that run, one within the other."""
        self._closures: list[int] = []
        """Optimizers that call for their gradients."""
        self._has_worked = False
        self._passes = 0
        """Outermost backward passes, counted until an update is seen."""
        self._weights: int | None = None
        """What the modules told at the last one; None if nobody looks, for optimizers tell of updates."""
        self._is_to_look = False
        """Whether an optimizer is new, whose modules are not looked for yet."""
        self.has_given_up = False

    # The program's own ranges.

    def begin(self, asked: Range) -> None:
        """Push a range of the program's own."""
        is_step = asked.name == schema.STEP
        self._has_own_steps |= is_step
        if not self._is_own_thread():
            push(asked)
            return
        self._hide()
        if is_step:
            self._end_step()
        else:
            self._asked.append(asked)
        self._stack.push(asked)
        self._show()

    def end(self, asked: Range) -> None:
        """Pop a range of the program's own."""
        if not self._is_own_thread():
            pop()
            return
        self._hide()
        within = self._stack.within(asked)
        if within is None or self._step in within:
            self._end_step()
        if within is None:  # it began before this object did
            pop()
        self._stack.remove(asked)
        self._asked = [each for each in self._asked if each is not asked]
        self._show()

    def give_up(self, error: Exception) -> None:
        """The program goes on without automatic ranges."""
        self.has_given_up = True
        print(f"hpcmm: automatic steps and phases end here ({type(error).__name__}: {error}).", file=sys.stderr)
        self.close()

    def close(self) -> None:
        """End what is open. Ranges belong to a thread: on another one nothing happens."""
        if (self._phases or self._step is not None) and self._is_own_thread():
            self._hide()
            self._phases.clear()
            self._end_step()

    # What the program does. Each returns quickly on threads that do not train.

    @_harmless
    def fetch_begins(self, loader: int, *, grad: bool) -> bool:
        """``loader`` is asked for a batch. Returns whether that is a phase."""
        if not self._is_own_thread():
            return False
        self._forwards.clear()
        self._end("forward")  # which has ended by an exception
        self._fetched.add(loader)
        trained = self._trained()
        is_evaluating = trained is not None and _mode(trained) != self._modes.get(id(trained))
        if not grad or is_evaluating or loader not in self._loaders:
            return False
        self._begin("data")
        return True

    @_harmless
    def fetch_ends(self, loader: int, *, is_phase: bool, exhausted: bool) -> None:
        """``loader`` has brought a batch, or has no more."""
        if exhausted and self._is_own_thread():
            self._fetched.discard(loader)
        if not is_phase:
            return
        self._end("data")
        if not exhausted:
            self._begin_work()
        elif self._iterations.is_over:
            self._iterations.begin()
            self._end_step()

    @_harmless
    def receive_begins(self) -> None:
        """A message of another rank is received: behind an optimizer, the first work of the next iteration."""
        if self._is_own_thread() and self._iterations.is_over and not (self._backwards or self._updates):
            self._begin_work()

    @_harmless
    def forward_begins(self, module: Any, *, grad: bool, batch: Any = None) -> None:
        """A watched module is called on ``batch``."""
        if not self._is_own_thread() or self._backwards:
            return
        if not grad:
            self._fetched.clear()
            return
        key, mode = id(module), _mode(module)
        self._is_called = True
        self._forwarded[key] = mode
        if self._modes.get(key, mode) != mode:
            return
        if key in self._forwards:  # its last call ended by an exception
            del self._forwards[self._forwards.index(key) :]
        if not self._forwards:
            self._end("forward")
            self._begin_work()
            self._begin("forward", self._modules.size_of(batch))
        self._forwards.append(key)
        self._is_forward_shown = True
        self._trained = weakref.ref(module)

    @_harmless
    def forward_ends(self, module: Any) -> None:
        """It has returned."""
        key = id(module)
        if self._is_own_thread() and key in self._forwards:
            del self._forwards[self._forwards.index(key) :]
            if not self._forwards:
                self._end("forward")

    @_harmless
    def backward_begins(self, *, accumulates: bool = True) -> bool:
        """Returns whether this is a pass of its own, which ends with :meth:`backward_ends`, and not within another.

        ``accumulates``: gradients of weights, as ``backward`` does. Others may be those of an attack on its inputs.
        """
        if not self._is_own_thread(adopt=True):
            return False
        self._backwards += 1
        if self._backwards > 1:
            return True
        if not self._is_forward_shown and accumulates:
            self._modes.update(self._forwarded)
        for module, mode in self._forwarded.items():
            self._modes.setdefault(module, mode)
        self._loaders |= self._fetched
        self._fetched.clear()
        self._forwarded.clear()
        self._is_forward_shown = False
        self._begin_work(may_be_first=True)
        self._look_at_weights()
        self._begin("backward")
        return True

    def _look_at_weights(self) -> None:
        """Begin to look at the weights if nothing has stepped before this backward pass, the second at the latest."""
        if self._iterations.has_stepped or self._closures:  # an optimizer tells of its update itself
            return
        self._passes += 1
        if self._passes == 1 + self._iterations.is_possible():
            self._train(self._modules.find())
            self._weights = self._modules.weights()

    def _note_changed_weights(self) -> None:
        if self._weights is None:
            return
        if self._iterations.has_stepped and not self._iterations.is_of_weights:
            self._weights = None
            return
        weights = self._modules.weights()
        if weights != self._weights:
            self._weights = weights
            self._iterations.step(WEIGHTS)

    @_harmless
    def exchange_begins(self) -> bool:
        """Gradients are exchanged behind a backward pass. Returns whether that is part of it, as above."""
        return not self._updates and self.backward_begins()

    @_harmless
    def backward_ends(self) -> None:
        self._backwards -= 1
        if self._backwards:
            return
        self._end("backward")

    @_harmless
    def update_begins(self, optimizer: int, *, closure: bool = False) -> None:
        """An optimizer begins its step, maybe within what calls it. With a ``closure`` it calls for gradients first."""
        if not self._is_own_thread() or self._backwards:
            return
        if not self._has_worked and optimizer in self._iterations.since_work:  # nothing else tells of a new iteration
            self._begin_work(may_be_first=True)
            self._has_worked = False
        self._forwards.clear()
        self._end("forward")
        if closure and optimizer in self._closures:  # its last step ended by an exception
            self._closures, self._updates = [], 0
            self._end("optimizer")
        self._updates += 1
        if closure:
            self._closures.append(optimizer)
        else:
            self._begin("optimizer")

    @_harmless
    def closure_ends(self) -> None:
        """An optimizer has its gradients, and goes on."""
        if self._closures and self._is_own_thread():
            self._begin("optimizer")

    @_harmless
    def update_ends(self, optimizer: int | None, *, closure: bool = False) -> None:
        """``optimizer`` has changed the weights; None if none has."""
        self._is_to_look |= optimizer is not None and self._iterations.step(optimizer)
        if not self._is_own_thread() or self._backwards:
            return
        if closure and self._closures:
            self._closures.pop()
        self._updates = max(0, self._updates - 1)
        if not self._updates:
            self._end("optimizer")
        self._look()

    @_harmless
    def skipped(self, optimizer: int) -> None:
        """An overflow kept ``optimizer`` from its step, so the iteration is over without."""
        self._is_to_look |= self._iterations.step(optimizer)

    def stepped(self) -> list[int]:
        """The optimizers that have stepped since the last forward or backward pass, in turn."""
        return list(self._iterations.since_work)

    # The steps.

    def _begin_work(self, *, may_be_first: bool = False) -> None:
        """``may_be_first``: a backward pass, which begins the first step."""
        self._has_worked = True
        self._look()
        self._note_changed_weights()
        if self._updates and not self._closures:  # that update ended by an exception
            self._updates = 0
            self._end("optimizer")
        self._iterations.work()
        if self._has_own_steps:
            self._end_step()
        elif self._iterations.is_over:
            if self._step is None and not self._number:
                self._number = 1  # an iteration is over whose begin was not seen
            self._end_step()
            self._iterations.begin()
            self._begin_step()
            if not self._is_called:
                self._train(self._modules.descend())
            self._is_called = False
        elif self._step is None and (self._number or (may_be_first and self._iterations.is_possible())):
            self._begin_step()

    def _look(self) -> None:
        if self._is_to_look:
            self._is_to_look = False
            self._is_called = True  # as far as can be known of this step
            self._train(self._modules.find())

    def _train(self, modules: Iterable[Any]) -> None:
        """Note that the modules are now in the mode in which they train."""
        self._modes.update({id(module): _mode(module) for module in modules})

    def _begin_step(self) -> None:
        self._hide()
        self._step = Range(schema.AUTOMATIC_STEP, self._number)
        note_step(self._number)
        before_step(self._number)
        if not self._has_begun:
            self._has_begun = True
            tell_rank()
        self._number += 1
        self._stack.push(self._step)
        self._show()

    def _end_step(self) -> None:
        if self._step is not None:
            self._stack.remove(self._step)
            self._step = None

    # The phases.

    def _begin(self, name: str, payload: int | None = None) -> None:
        if name == "optimizer" and any(each.name == name for each in self._phases):
            return
        begun = Range(name, payload)
        self._phases.append(begun)
        if not self._asked:
            self._stack.push(begun)

    def _end(self, name: str) -> None:
        """End the last phase of this name; what is within it has ended by an exception."""
        if not self._phases or not any(each.name == name for each in self._phases):
            return
        while True:
            ended = self._phases.pop()
            self._stack.remove(ended)
            if ended.name == name:
                return

    def _hide(self) -> None:
        for each in reversed(self._phases):
            if self._stack.within(each) is not None:
                self._stack.remove(each)
                each.payload = None  # a batch is counted once

    def _show(self) -> None:
        for each in self._phases if not self._asked else ():
            self._stack.push(each)

    def _is_own_thread(self, *, adopt: bool = False) -> bool:
        """``adopt``: a program may train on another thread than the one that imported PyTorch."""
        current = get_ident()
        if adopt and current != self._thread and not self._number and not self._phases and not self._asked:
            self._thread = current
        return current == self._thread


def _mode(module: Any) -> bool:
    """Whether ``module`` is in mode ``train``; of one that wraps another, the other's mode, which it may not share."""
    inner = vars(module).get("_modules", {}).get("module")
    return bool((module if inner is None else inner).training)
