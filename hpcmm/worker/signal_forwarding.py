"""In front of a rank: start it, pass signals on, and leave a record when it ends badly.

Only a parent sees a rank that SIGKILL ended, and when.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from hpcmm.node.recorder import node_of
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_TO_WRITE_STACKS_S = 0.5
_PR_SET_PDEATHSIG = 1
"""From Linux' sys/prctl.h."""


def run_watched(command: Sequence[str], run: RunDir, rank: int) -> int:
    """Run the rank's command to its end. Returns its exit status, negative for the signal that ended it."""
    libc = ctypes.CDLL(None)  # loaded here, since little may be done between fork and exec

    def in_the_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _unblock()

    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is somebody to pass them on to
    process = subprocess.Popen(command, preexec_fn=in_the_child)  # noqa: PLW1509 -- one thread here

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM:  # Slurm sends it to the rank as well, whose stacks a second one would cut off
            time.sleep(_TO_WRITE_STACKS_S)
        if process.returncode is None:
            process.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    _unblock()
    status = process.wait()
    record_exit(status, run, rank)
    return status


def record_exit(status: int, run: RunDir, rank: int, unix_ns: int | None = None, said: str = "") -> None:
    """Leave a record of a rank that ended with another status than 0, at ``unix_ns`` (None: now).

    A negative status is a signal's number. What the rank itself has recorded stays. ``said``: see RankExit.
    """
    if status == 0:
        return
    number = -status if status < 0 else None
    now_ns = unix_ns or time.time_ns()
    status_of_its_own = None if number else status
    said = said[: failures.MOST_CHARACTERS]
    record = failures.RankExit(rank, node_of(os.environ), now_ns, status_of_its_own, number, said)
    attempt = failures.attempt_folder(run)
    path = failures.exit_file(attempt, rank)
    try:
        if not path.exists():
            failures.write(record, path)
            failures.note_status(record, attempt)
    except OSError as error:
        print(f"hpcmm: {path} cannot be written ({error.strerror}).", file=sys.stderr)


def record_good_end(run: RunDir, rank: int) -> None:
    """Leave the mark by which the job's script knows that the rank ended with status 0."""
    try:
        failures.note_good_end(run, rank)
    except OSError as error:
        said = f"{run.ended} cannot be written ({error.strerror}), so the job is noted as failed"
        print(f"hpcmm: {said}.", file=sys.stderr)


def end_as(status: int) -> int:
    """The exit status for ``sys.exit`` that tells the scheduler the same; does not return where a signal ended it."""
    if status < 0:
        sys.stdout.flush()
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
