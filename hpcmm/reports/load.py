"""Read many captures, each in a worker process, so that all cores are used and one report cannot take the rest down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Generic, TypeVar, cast

import pandas as pd
import psutil

from hpcmm.errors import HpcmmError
from hpcmm.reports.convert import Converter, NewerReportError
from hpcmm.reports.events import read_report
from hpcmm.reports.find import ReportSource
from hpcmm.reports.report import TEXT_AS_PYTHON, Parts, Progress, Report
from hpcmm.text import printable

Task = TypeVar("Task")
Result = TypeVar("Result")

_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from hpcmm.reports.load import serve; serve(int(sys.argv[1]))"
_OOM_SCORE = "500"
"""Makes the kernel choose a worker before the parent, which holds what was read so far."""
BYTES_PER_FILE_BYTE = 4
WORKER_BYTES = 300 << 20


class WorkerDiedError(Exception):
    """A worker process ended in the middle of a task."""


def available_bytes() -> int:
    """What new processes can use without swapping, as the kernel estimates it."""
    available: int = psutil.virtual_memory().available
    return available


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_count(tasks: int, largest_file_bytes: int) -> int:
    """As many as there are cores and tasks, but not more than fit into free memory."""
    each = WORKER_BYTES + BYTES_PER_FILE_BYTE * largest_file_bytes
    return max(1, min(tasks, cores(), available_bytes() // each))


def map_in_workers(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result | WorkerDiedError]:
    """``work`` of each task, in order; ``work`` must be a module's function, and tasks and results picklable.

    Where a worker died the result is the WorkerDiedError. An exception of ``work`` itself is raised here.
    """
    with _Workers(work) as processes, ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(processes.run, task) for task in tasks]
        try:
            for future in futures:
                yield cast("Result | WorkerDiedError", future.result())
        except BaseException:  # an interrupt, or a caller that wants no more
            for future in futures:
                future.cancel()
            processes.kill()
            raise


@dataclass(slots=True)
class _Worker:
    """One child process and the parent's end of the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: Connection

    @classmethod
    def start(cls) -> _Worker:
        ours, theirs = Pipe()
        with closing(theirs):
            handle = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(handle), *sys.path], stdin=subprocess.DEVNULL, pass_fds=[handle]
            )
        return cls(process, ours)

    def stop(self) -> int:
        """End the process, and return how it ended."""
        self.pipe.close()
        return self.process.wait()


@dataclass(slots=True)
class _Workers:
    """A worker for each thread that runs tasks; a dead one is replaced."""

    work: Callable[..., object]
    _of_thread: local = field(default_factory=local)
    _all: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all:
            worker.stop()

    def kill(self) -> None:
        """End the workers in the middle of their tasks."""
        for worker in self._all:
            worker.process.kill()

    def run(self, task: object) -> object:
        worker: _Worker | None = getattr(self._of_thread, "worker", None)
        if worker is None:
            worker = self._of_thread.worker = _Worker.start()
            self._all.append(worker)
        try:
            worker.pipe.send((self.work, task))
            outcome, error = worker.pipe.recv()
        except (EOFError, OSError):
            self._of_thread.worker = None
            self._all.remove(worker)
            return WorkerDiedError(_how_it_died(worker.stop()))
        if error is not None:
            raise error
        return outcome


def _how_it_died(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return "it was killed, most likely because the memory ran out"
    return f"it died of {signal.Signals(-returncode).name}" if returncode < 0 else f"it ended with status {returncode}"


def serve(handle: int) -> None:
    """The life of a worker: tasks come and results go through the pipe ``handle``, until the parent closes it."""
    # The parent tells the user of an interrupt, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    with Connection(handle) as pipe, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            work, task = pipe.recv()
            answer: tuple[object, Exception | None]
            try:
                answer = (work(task), None)
            except Exception as error:  # which the parent raises
                answer = (None, error)
            pipe.send(answer)


_DAMAGE = (ValueError, TypeError, ArithmeticError, LookupError)
"""What values that no nsys would write can raise in the reader, UnicodeDecodeError and OverflowError among them."""

SMALL_BYTES = 16 << 20
"""Exports of this size in all are read in less time than it takes to start a worker."""
LEAST_BYTES = 2 << 20
"""A smaller export takes as long to read as one of this size."""

Reduced = TypeVar("Reduced")


@dataclass(frozen=True, slots=True)
class Reading(Generic[Reduced]):
    """A capture and what came of it: what its report was reduced to, or the reason why there is none."""

    source: ReportSource
    value: Reduced | None
    reason: str = ""
    is_of_a_newer_nsys: bool = False
    """Whether the reason is that nsys here is older than the one that wrote the report."""


def read_all(
    sources: Sequence[ReportSource],
    converter: Converter,
    reduce: Callable[[Report], Reduced],
    progress: Progress,
    *,
    keep_cache: bool,
    parts: Parts = Parts.ALL,
    every_range: bool = False,
) -> Iterator[Reading[Reduced]]:
    """Readings in the order of ``sources``. Only what ``reduce``, a module's function, makes of the ``parts`` of a
    report is kept. ``every_range``: see :func:`hpcmm.reports.events.read_report`.

    Exports hold the processes' whole environments; they are deleted once read unless ``keep_cache``.
    """
    read = partial(read_report, parts=parts, every_range=every_range)
    work = partial(_read, converter=converter, read=read, reduce=reduce, keep_cache=keep_cache)
    largest = max((source.size_bytes for source in sources), default=0)
    workers = worker_count(len(sources), largest)
    results = map(work, sources) if _small(sources) else map_in_workers(work, sources, workers)
    try:
        for done, (source, result) in enumerate(zip(sources, results, strict=True)):
            progress(f"reading {printable(source.name)}", done, len(sources))
            if isinstance(result, WorkerDiedError):
                if not keep_cache:
                    converter.discard(source)
                yield Reading(source, None, f"{source.path} could not be read: of the process that read it, {result}.")
            else:
                yield result
    finally:
        if not keep_cache:
            converter.clear()
    progress("reading reports", len(sources), len(sources))


def _small(sources: Sequence[ReportSource]) -> bool:
    """Whether to read in this process: one report has no other to save from it, and small exports take no time."""
    exports = all(source.path.suffix == ".sqlite" for source in sources)
    in_all = sum(max(source.size_bytes, LEAST_BYTES) for source in sources)
    return len(sources) < 2 or (exports and in_all < SMALL_BYTES)


def _read(
    source: ReportSource,
    *,
    converter: Converter,
    read: Callable[[Path, Path], Report],
    reduce: Callable[[Report], Reduced],
    keep_cache: bool,
) -> Reading[Reduced]:
    """One capture from its file to what is kept of it."""
    try:
        with pd.option_context(*TEXT_AS_PYTHON):
            return Reading(source, reduce(read(converter.to_sqlite(source), source.path)))
    except NewerReportError as error:
        return Reading(source, None, str(error), is_of_a_newer_nsys=True)
    except HpcmmError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{source.path} could not be read: {error.strerror}."
    except MemoryError:
        reason = f"{source.path} could not be read: it needs more memory than there is."
    except _DAMAGE as error:
        reason = f"{source.path} is damaged: {type(error).__name__}: {error}."
    finally:
        if not keep_cache:
            converter.discard(source)
    return Reading(source, None, reason)
