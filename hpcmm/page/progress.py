"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpcmm.reports.report import Progress
from hpcmm.text import printable

QUIET_S = 15.0
"""Where standard error is no terminal, or one that moves no cursor, long work says this often how far it is."""


@contextmanager
def progress_bar(program: str = "hpcmm.analyze") -> Iterator[Progress]:
    """A callback for standard error: a bar on a terminal that can draw it, elsewhere a line of ``program`` at times."""
    if not sys.stderr.isatty():
        yield _progress_lines(program)
        return
    # 0.1 s of imports that a pipe can do without.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_dumb_terminal:  # which a bar would leave empty
        yield _progress_lines(program)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, count="")

        def show(what: str, done: int, of: int) -> None:
            total, count = (of, f"{done}/{of}") if of > 1 else (None, "")
            bar.update(task, description=printable(what), completed=done, total=total, count=count)

        yield show


def _progress_lines(program: str) -> Progress:
    last = time.monotonic()

    def show(what: str, done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            print(f"{program}: {printable(what)}" + (f" ({done}/{of})" if of > 1 else ""), file=sys.stderr, flush=True)

    return show
