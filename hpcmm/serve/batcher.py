"""Requests of several users through the model together: one thread that gathers what waits and runs it as a batch."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from hpcmm.errors import HpcmmError

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


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
        """Put the request into the queue. Raises BusyError where that is full, or closed."""
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
