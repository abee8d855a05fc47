"""What all users of a page share: requests gathered into batches for the model, and a log without their contents."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from hpcmm.errors import HpcmmError
from hpcmm.serve.options import ServeOptions

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
_PREPARED_AT_ONCE = 4
"""Uploads that are decoded at once: each may take a few hundred megabytes."""


class BusyError(HpcmmError):
    """More requests wait than are let wait."""


class Batcher(Generic[Asked, Answer]):
    """Calls ``run`` with up to ``most`` requests, of which the first waits at most ``wait_s`` for the others.

    It waits only until as many are there as were in the batch before, so that who is alone does not wait.
    A batch that fails is run once more one by one, so that nobody pays for another's request. Close it at the end.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Asked]], Sequence[Answer]],
        *,
        most: int,
        wait_s: float,
        waiting: int,
    ) -> None:
        self._run = run
        self._most = most
        self._wait_s = wait_s
        self._waiting: queue.Queue[tuple[Asked, Future[Answer]]] = queue.Queue(waiting)
        self._last = 1
        self._closed = threading.Event()
        # Held to put a request in and to close, so that none slips in behind those that closing lets go.
        self._door = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked) -> Future[Answer]:
        """Put the request into the queue. Raises BusyError if that is full, or closed."""
        future: Future[Answer] = Future()
        with self._door:
            if self._closed.is_set():
                raise BusyError("The server is ending: your request was not taken.")
            try:
                self._waiting.put_nowait((asked, future))
            except queue.Full as error:
                raise BusyError(
                    f"The model is busy: {self._waiting.maxsize} requests wait already. Try again in a moment."
                ) from error
        return future

    def close(self) -> None:
        """End the thread; requests that still wait are cancelled."""
        with self._door:
            self._closed.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(queue.Empty):  # a thread that is slow to end may take from it too
            while True:
                self._waiting.get_nowait()[1].cancel()

    def _serve(self) -> None:
        while not self._closed.is_set():
            batch = self._gather()
            if batch:
                self._answer(batch)

    def _gather(self) -> list[tuple[Asked, Future[Answer]]]:
        try:
            batch = [self._waiting.get(timeout=0.1)]
        except queue.Empty:
            return []
        until = time.monotonic() + self._wait_s
        while len(batch) < self._most:
            wait_s = until - time.monotonic() if len(batch) < self._last else 0.0
            try:
                batch.append(self._waiting.get(timeout=max(0.0, wait_s)))
            except queue.Empty:
                break
        self._last = len(batch)
        # Whoever has gone meanwhile needs no answer.
        return [(asked, future) for asked, future in batch if future.set_running_or_notify_cancel()]

    def _answer(self, batch: list[tuple[Asked, Future[Answer]]]) -> None:
        try:
            answers = self._run([asked for asked, _ in batch])
            if len(answers) != len(batch):
                raise ValueError(f"{len(answers)} answers to {len(batch)} requests")
        except Exception as error:  # whatever it is, the thread goes on
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for single in batch:
                self._answer([single])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)


LIMIT_BYTES = 10_000_000
"""At this size the log becomes ``requests.jsonl.1``, and the one before is dropped."""
_MOST_CHARACTERS = 400


class RequestLog:
    """Appends lines to a file that several servers of one run may share.

    Raises HpcmmError when the file cannot be made.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._said = False
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.close(self._open())
        except OSError as error:
            raise HpcmmError(
                f"The log of requests {path} cannot be written ({error.strerror}): is the run yours, and the disk free?"
            ) from error

    def write(self, **fields: Any) -> None:
        """One line. A full disk is said once, and takes no answer from anybody."""
        line = json.dumps({"time": _now(), **{key: _bounded(value) for key, value in fields.items()}}) + "\n"
        try:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, line.encode("ascii"))
                if os.fstat(descriptor).st_size >= self._limit_bytes and _is(descriptor, self._path):
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._said:
                print(f"hpcmm.serve: {self._path} cannot be written ({error.strerror}).", file=sys.stderr, flush=True)
            self._said = True

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still this file: another server may have moved it away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _bounded(value: Any) -> Any:
    """Text of bounded length; JSON escapes line breaks and whatever else a terminal would heed."""
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"


class Service(Generic[Asked, Answer]):
    """What all users of a page share: the batcher in front of the model, and the log. Close it at the end."""

    def __init__(
        self, predict: Callable[[Sequence[Asked]], Sequence[Answer]], options: ServeOptions, log: RequestLog
    ) -> None:
        self.options = options
        self._log = log
        self._batcher: Batcher[Asked, Answer] = Batcher(
            predict, most=options.max_batch, wait_s=options.max_wait_ms / 1000, waiting=options.max_waiting
        )
        self._preparing: asyncio.Semaphore | None = None

    def close(self) -> None:
        """End the batcher."""
        self._batcher.close()

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """What ``work``, such as the decoding of an upload, returns: in a thread, few at once."""
        if self._preparing is None:
            self._preparing = asyncio.Semaphore(_PREPARED_AT_ONCE)
        async with self._preparing:
            return await asyncio.to_thread(work)

    async def ask(self, request: Asked) -> Answer:
        """The model's answer. Raises HpcmmError, with a sentence for the user, if too many wait already."""
        return await asyncio.wrap_future(self._batcher.submit(request))

    async def logged(self, answering: Awaitable[tuple[Result, dict[str, Any]]], **fields: Any) -> Result:
        """Await a result, and write one line of it into the log of requests, whatever comes of it.

        ``fields`` say what was asked, those beside the result what came of it: short values that JSON has, and never
        what was uploaded. Raises what ``answering`` raises; an HpcmmError is a sentence for the user.
        """
        began = time.monotonic()
        try:
            result, found = await answering
        except HpcmmError as error:
            self._log.write(**fields, outcome="refused", reason=str(error), seconds=_since(began))
            raise
        except Exception as error:
            self._log.write(**fields, outcome="failed", reason=type(error).__name__, seconds=_since(began))
            raise
        self._log.write(**fields, outcome="answered", **found, seconds=_since(began))
        return result


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)
