"""nsys around one rank: its flags, its run, and a report that is whole when the rank's task ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpcmm.bootstrap.startup import COMMAND_BEGAN
from hpcmm.errors import HpcmmError
from hpcmm.reports.importer import import_qdstrm

_STEP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ATTEMPTS = 4
_START_POLL_S = 0.02
_PR_SET_CHILD_SUBREAPER = 36
"""From Linux' sys/prctl.h."""


def run_under_nsys(profile: Sequence[str], command: Sequence[str], report: Path, aside: Path | None = None) -> int:
    """Run ``command`` under ``nsys profile FLAGS...`` and leave its report at ``report``. Returns its exit status.

    nsys writes on the node's own disk; only the finished report is copied to the shared one. Where it cannot be
    finished here, what there is is copied beside ``report`` and the reason is printed. A report that stands there from
    an earlier attempt is moved to the folder ``aside``.
    """
    _keep_descendants()
    folder = Path(tempfile.mkdtemp(prefix="hpcmm-nsys-"))
    with _outlive_the_command():
        output = folder / report.stem
        status = start_under_nsys([*profile, f"--output={output}"], command, folder / "started")
        if _finish(output, report, aside):
            shutil.rmtree(folder, ignore_errors=True)
    return status


def start_under_nsys(profile: Sequence[str], command: Sequence[str], started: Path) -> int:
    """Run nsys until the command is over; again where nsys fails before it has made the file ``started``.

    The ranks of a node start their nsys one after the other. Several at once meet in nsys 2022.4's shared session table
    and fail, one in twenty, with "Local Endpoint is not available", "sem_open" or "End of file".
    """
    noting_the_start = ["/bin/sh", "-c", ': >"$0" && exec "$@"', str(started)]
    for attempts_left in reversed(range(_ATTEMPTS)):
        with _one_start_at_a_time():
            environment = os.environ | {COMMAND_BEGAN: f"{time.time():.3f}"}
            process = subprocess.Popen([*profile, *noting_the_start, *command], env=environment)
            while not started.exists() and process.poll() is None:
                time.sleep(_START_POLL_S)
        status = process.wait()
        if started.exists():
            return status
        print(f"hpcmm: nsys failed to start the rank; {attempts_left} more attempts.", file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    lock = Path(tempfile.gettempdir()) / f"hpcmm-nsys-start-{os.getuid()}.lock"
    with os.fdopen(os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _finish(output: Path, report: Path, aside: Path | None) -> bool:
    """Import what nsys left and copy it. Returns whether nothing is left behind that anyone would miss."""
    finished, unfinished = output.with_suffix(".nsys-rep"), output.with_suffix(".qdstrm")
    if not finished.exists() and unfinished.exists():
        try:
            import_qdstrm(unfinished, finished)
        except HpcmmError as error:
            print(f"hpcmm: {error}", file=sys.stderr)
    made = finished if finished.exists() else unfinished
    if not made.exists():
        print(f"hpcmm: nsys left no report for {report.stem}; its messages stand above.", file=sys.stderr)
        return True
    target = report.with_suffix(made.suffix)
    try:
        if aside is not None and target.exists():
            aside.mkdir(exist_ok=True)
            target.replace(aside / target.name)
        _copy_whole(made, target)
    except OSError as error:
        print(
            f"hpcmm: the report cannot be written to {target} ({error.strerror}): it stays in {made} on "
            f"{os.uname().nodename}.",
            file=sys.stderr,
        )
        return False
    return True


def _copy_whole(source: Path, target: Path) -> None:
    """Copy so that ``target`` never exists half-written."""
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, partial)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(target)


def _keep_descendants() -> None:
    """Stay the ancestor of all that is started from here, so that a scheduler that ends this process' tree ends it all.

    nsys starts the command through an agent that detaches itself; on a cluster without cgroups both would live on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print(
            f"hpcmm: prctl failed ({os.strerror(ctypes.get_errno())}); a cancelled rank may live on.", file=sys.stderr
        )


@contextlib.contextmanager
def _outlive_the_command() -> Iterator[None]:
    """Let signals meant for the rank pass by this process, which has a report to finish once the rank is gone."""
    before = {number: signal.signal(number, lambda *_: None) for number in _STEP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
