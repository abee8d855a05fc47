"""Ctrl-C waits while a job is handed over, so that no job is queued of which nothing is written down."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[list[str]]:
    """Within, a first SIGINT is kept, and raised as KeyboardInterrupt at the end; a second one is raised at once.

    Jobs that were submitted are to be appended to the list, which the KeyboardInterrupt then names.
    """
    submitted: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield submitted  # signals are the main thread's
        return
    came = False
    before = signal.getsignal(signal.SIGINT)

    def keep(signum: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signum, before)

    if callable(before):  # else it is ignored already
        signal.signal(signal.SIGINT, keep)
    try:
        yield submitted
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        commands = " and ".join(f"python -m hpcmm.jobs cancel {job_id}" for job_id in submitted)
        raise KeyboardInterrupt(f"what is submitted stays; to take it back: {commands}" if commands else "")
