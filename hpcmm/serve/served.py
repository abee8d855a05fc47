"""What a workload puts behind ``hpcmm.serve``, and what the server does for it.

Subclass :class:`ServedModel` in the workload, and give it from ``Workload.served()``. The server keeps the rest: the
checkpoint and the fence against other users' ones, the token and everything that the guard refuses, the private folder
for uploads, batches over users, the log of requests, the Slurm job. What the page shows of untrusted text the
workload escapes itself. This module imports no torch and no gradio, and neither may that of the subclass when it is
imported: ``--help`` asks it too.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve.batcher import Batcher
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.request_log import RequestLog

if TYPE_CHECKING:
    import torch

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
_PREPARED_AT_ONCE = 4
"""Uploads that are decoded at once: each may take a few hundred megabytes."""


class ServedModel(ABC):
    """The page of one workload's runs, before a run is loaded. :meth:`build_model` and :meth:`load` are to be given.

    ``config`` is an object of the workload's schema everywhere.
    """

    description: str = ""
    """For ``--help``: what one does on the page, as the end of "Serve a trained run as a page: "."""

    def add_options(self, parser: ArgumentParser) -> None:
        """Add options of this page alone to the command line."""
        del parser

    def options(self, given: Namespace) -> dict[str, Any]:
        """The values of these options as JSON holds them: they reach :meth:`load`, which may run in a Slurm job.

        Raises HpcmmError, with the option's name, for a value that cannot be used.
        """
        del given
        return {}

    @abstractmethod
    def build_model(self, config: Any) -> torch.nn.Module:
        """The run's model as it was before training, on the CPU. The server gives it the checkpoint's weights."""

    @abstractmethod
    def load(self, model: Any, run: RunDir, config: Any, options: ServeOptions) -> ServedPage:
        """The page of this run. ``model`` is trained, in evaluation mode, on the CPU, and may be moved.

        ``options.page`` is what :meth:`options` gave. Raises HpcmmError if the run cannot be served.
        """


class ServedPage(ABC):
    """A run's model and the page that asks it."""

    css: str = ""
    """Style sheet of the page; it may fetch nothing from elsewhere."""

    @abstractmethod
    def predict(self, requests: Sequence[Any]) -> Sequence[Any]:
        """One answer to each request, in their order. Called by one thread at a time, with up to ``--max-batch``.

        A batch that raises is asked again, one request at a time.
        """

    @abstractmethod
    def build(self, service: Service[Any, Any], cache: Path) -> None:
        """Add the page's components and events, within the gradio Blocks that the server has opened.

        The model is asked through ``service`` alone. Files to download go into a new folder within ``cache``, the only
        one of which the guard shows files. Every event is ``api_visibility="private"``.
        """


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
