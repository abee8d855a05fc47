"""The ``step`` range, the phase ranges within it and the capture window around some steps, on the calling thread."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import count
from typing import Any, Protocol, TypeVar

from hpcmm.annotate import schema

_INJECTION = "NVTX_INJECTION64_PATH"
"""Set by every profiler that listens to NVTX, before the program starts."""

_RANK_KEYS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""What launchers tell a process its rank by; the first goes first, as a worker's own."""

_NOTHING: AbstractContextManager[None] = nullcontext()


def _nvtx() -> Any:
    """The package, if this process can record ranges."""
    if _INJECTION not in os.environ:
        return None
    try:
        return import_module("nvtx")
    except ImportError as error:  # the program itself does not need it
        print(
            f"hpcmm: no range is recorded, for {sys.executable} cannot import nvtx ({error}): "
            "install nvtx there (nvtx==0.2.11 goes with every nsys).",
            file=sys.stderr,
        )
        return None


nvtx = _nvtx()


def profiler_attached() -> bool:
    """Whether this process was started under a profiler that records NVTX ranges, and can give it some."""
    return _ATTACHED


_ATTACHED = nvtx is not None
_begun: int | None = None


class Range:
    """A pushed and popped range. Ends also when its block raises."""

    __slots__ = ("name", "payload")

    def __init__(self, name: str, payload: int | None = None) -> None:
        self.name = name
        self.payload = payload

    def __enter__(self) -> None:
        if self.name == schema.STEP and self.payload is not None:
            before_step(self.payload)
        if _automatic is None:
            push(self)
        else:
            _automatic.begin(self)

    def __exit__(self, *_exception: object) -> None:
        if _automatic is None:
            pop()
        else:
            _automatic.end(self)


def push(opened: Range) -> None:
    """Begin a range on this thread, within those that are open."""
    nvtx.push_range(opened.name, domain=schema.DOMAIN, payload=opened.payload)


def pop() -> None:
    """End the range of this thread that began last."""
    nvtx.pop_range(domain=schema.DOMAIN)


class RangeStack:
    """The ranges that are open on the thread that trains, outermost first."""

    def __init__(self) -> None:
        self._open: list[Range] = []

    def push(self, opened: Range) -> None:
        push(opened)
        self._open.append(opened)

    def remove(self, closed: Range) -> None:
        """End a range; those within it end too and begin anew, for NVTX ends the innermost one only."""
        if self._open and self._open[-1] is closed:
            del self._open[-1]
            pop()
            return
        within = self.within(closed)
        if within is None:
            return
        del self._open[len(self._open) - len(within) - 1 :]
        for _ in range(len(within) + 1):
            pop()
        for each in within:
            each.payload = None if each.name != schema.STEP else each.payload  # a batch is counted once
            self.push(each)

    def within(self, outer: Range) -> list[Range] | None:
        """The ranges within ``outer``; None if it is not open."""
        at = next((at for at, each in enumerate(self._open) if each is outer), None)
        return None if at is None else self._open[at + 1 :]


class Automatic(Protocol):
    """Ranges that nobody asked for, which give way to those of the program."""

    def begin(self, asked: Range) -> None:
        """Push a range of the program's own."""

    def end(self, asked: Range) -> None:
        """Pop it."""

    def receive_begins(self) -> None:
        """A message of another rank is received."""


_automatic: Automatic | None = None


def give_way(automatic: Automatic | None) -> None:
    """From now on ``automatic`` pushes and pops also the program's own ranges, so that both kinds nest."""
    global _automatic  # noqa: PLW0603 -- one for the process, as NVTX's stack is
    _automatic = automatic


def receive_begins() -> None:
    """Note that a message of another rank is received: so begins the work of a pipeline's later stages."""
    if _automatic is not None:
        _automatic.receive_begins()


def step(number: int) -> AbstractContextManager[None]:
    """One training step. ``number`` counts from 0 over the whole training, resumed runs included."""
    note_step(number)
    if not _ATTACHED:
        return _NOTHING
    tell_rank()
    return Range(schema.STEP, number)


def note_step(number: int) -> None:
    """Remember the step that begins, for :func:`step_begun`."""
    global _begun  # noqa: PLW0603 -- a store is all that a step may cost
    _begun = number


_told: int | None = None


def tell_rank(*, again: bool = False) -> None:
    """Mark which rank this process is, unless that has been told: a capture may hold a launcher and all its workers.

    The process group knows it best. A launcher's own variables reach its workers too, so they count only without one.
    ``again``: a capture begins, which holds no mark of before.
    """
    global _told  # noqa: PLW0603 -- a property of the process
    rank = _rank_of_process() if _ATTACHED else None
    if rank is not None and (again or rank != _told):
        _told = rank
        nvtx.mark(schema.format_rank(rank), domain=schema.DOMAIN)


def _rank_of_process() -> int | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    told = next((os.environ[key] for key in _RANK_KEYS if os.environ.get(key, "").isdecimal()), None)
    return None if told is None else int(told)


def step_begun() -> int | None:
    """The number of the last step that began in this process; None before the first."""
    return _begun


def phase(name: str, batch: Any = None) -> AbstractContextManager[None]:
    """A part of a step; the usual ones are ``names.PHASES``, any other name is a phase of its own.

    With ``batch``, what the phase computes on, its size is recorded, so that a rank that is slow can be told from one
    whose batches are larger.
    """
    if not _ATTACHED:
        return _NOTHING
    return Range(name, None if batch is None else batch_size(batch))


def batch_size(batch: Any) -> int:
    """Elements of all tensors and characters of all texts in nested dicts, lists and tuples."""
    if isinstance(batch, str):
        return len(batch)
    if isinstance(batch, Mapping):
        return sum(map(batch_size, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(batch_size, batch))
    elements = getattr(batch, "numel", None)
    return int(elements()) if callable(elements) else 0


Batch = TypeVar("Batch")


def steps(batches: Iterable[Batch], first: int = 0) -> Iterator[Batch]:
    """Iterate over ``batches``, each iteration a step.

    >>> for batch in annotate.steps(loader):
    ...     loss = model(batch)

    A step is the loop's body and then, as phase ``data``, the fetching of the next batch; it ends too when the body
    leaves the loop. ``first`` is the number of the first step: a loop over several epochs goes on counting with
    ``first=epoch * len(loader)``.
    """
    iterator = iter(batches)
    try:
        batch = next(iterator)
        for number in count(first):
            with step(number):
                yield batch
                with phase("data"):
                    batch = next(iterator)
    except StopIteration:
        return


_told_at_capture: list[Callable[[], None]] = []


def at_capture(tell: Callable[[], None]) -> None:
    """Call ``tell`` when a capture begins: it holds no mark of before."""
    _told_at_capture.append(tell)


class CaptureWindow:
    """The range that a profiler records within, and nothing else.

    Opens before the window's first step that this attempt does, and closes after its last, or when training ends.
    """

    def __init__(self, steps: range) -> None:
        self._steps = steps
        self._is_open = False
        self.is_over = False

    def before(self, step: int) -> None:
        """Call between the steps, with the one that comes."""
        if self._is_open and step not in self._steps:
            self.close()
        elif not self._is_open and not self.is_over and step in self._steps:
            nvtx.push_range(schema.CAPTURE_RANGE, domain=schema.CAPTURE_DOMAIN)
            self._is_open = True
            tell_rank(again=True)
            for tell in _told_at_capture:
                tell()

    def close(self) -> None:
        """End the range if it has begun, for good."""
        if self._is_open:
            nvtx.pop_range(domain=schema.CAPTURE_DOMAIN)
            self._is_open, self.is_over = False, True


def _window_of_process() -> CaptureWindow | None:
    asked = os.environ.get(schema.CAPTURE_STEPS)
    if not asked or not _ATTACHED:
        return None
    first, end = map(int, asked.split(":"))
    atexit.register(_end_window, asked)
    return CaptureWindow(range(first, end))


def before_step(number: int) -> None:
    """Open or close the window of the process, if it has one, before its step ``number``."""
    if _window is not None:
        _window.before(number)


def close_window() -> None:
    """Close the window of the process: its training is over."""
    if _window is not None:
        _window.close()


def _end_window(asked: str) -> None:
    close_window()
    if _window is not None and not _window.is_over and _begun is not None:
        print(
            f"hpcmm: no step was recorded: profile.steps is {asked}, and this process' last step was {_begun}.",
            file=sys.stderr,
        )


_window = _window_of_process()
