"""What a workload puts behind ``hpcmm.serve``, and what the server does for it.

Subclass :class:`ServedModel` in the workload, and give it from ``Workload.served()``. The server keeps the rest: the
checkpoint and the fence against other users' ones, the token and everything that the guard refuses, the private folder
for uploads, batches over users, the log of requests, the Slurm job. What the page shows of untrusted text the
workload escapes itself, with :func:`escaped`; ``uploads`` checks what was uploaded. This module imports no torch and no
gradio, and neither may that of the subclass when it is imported: ``--help`` asks it too.
"""

from __future__ import annotations

import hashlib
import html
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.service import Service
from hpcmm.text import visible

if TYPE_CHECKING:
    import torch


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
    """Style sheet of the page, beside that of all pages (``page.css``); it may fetch nothing from elsewhere."""

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


def escaped(text: str) -> str:
    """Escaped for HTML, and for the page's own templates, which would evaluate ``${...}`` and ``{{...}}``."""
    return html.escape(visible(text)).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def heading(run: str, about: str) -> str:
    """The name of the run, and a line about it."""
    return f'<div class="hpcmm-title"><h1>{escaped(run)}</h1><p>{escaped(about)}</p></div>'


def sentence(text: str, kind: str = "hint") -> str:
    """A line in the place of a result; ``kind`` is hint or problem."""
    return f'<div class="hpcmm-note hpcmm-{kind}" role="status">{escaped(text)}</div>'


def typed(given: object, what: str, most: int) -> str:
    """A text that a user wrote, with no half of a character. Raises HpcmmError if it has more than ``most``."""
    text = given.encode("utf-8", "replace").decode().strip() if isinstance(given, str) else ""
    if len(text) > most:
        raise HpcmmError(f"Of {what}, at most {most} characters are taken; these are {len(text)}.")
    return text


def user_name(session: object) -> str:
    """A short name for a page that is open in a browser, to tell users apart in the log."""
    return hashlib.sha256(str(session).encode(errors="replace")).hexdigest()[:8]
