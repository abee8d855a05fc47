"""Work in processes of their own: one that dies costs its task, not the analysis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import local
from types import TracebackType
from typing import TypeVar, cast

import psutil

Task = TypeVar("Task")
Result = TypeVar("Result")

_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from hpcmm.reports.worker_pool import serve; serve(int(sys.argv[1]))"
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
