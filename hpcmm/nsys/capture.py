"""nsys around one rank: its flags, its run, and a report that is whole when the rank's task ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpcmm.errors import HpcmmError, ProfilerUnusableError
from hpcmm.node.cache import make_private_folder
from hpcmm.nsys.importer import import_qdstrm
from hpcmm.nsys.supervisor import HEEDS_SIGTERM_S, End, Supervisor, run_supervised
from hpcmm.resources import FOLDER_OF_NSYS
from hpcmm.runs.attempts import COMMAND_BEGAN

START_ATTEMPTS = 4
_START_POLL_S = 0.02


def run_under_nsys(
    profile: Sequence[str],
    command: Sequence[str],
    report: Path,
    aside: Path | None = None,
    *,
    ended: Callable[[End], None] = lambda _: None,
    must_end: Callable[[], bool] = lambda: False,
    heeds_s: float | None = HEEDS_SIGTERM_S,
) -> int:
    """Run ``command`` under ``nsys profile FLAGS...`` and leave its report at ``report``. Returns its exit status.

    nsys writes on the node's own disk; only the finished report is copied to the shared one. If it cannot be
    finished here, what there is is copied beside ``report`` and the reason is printed. A report that stands there from
    an earlier attempt is moved to the folder ``aside``. A signal to this process reaches the command and not nsys, so
    that the report survives it; ``ended``, ``must_end`` and ``heeds_s`` as in
    :func:`~hpcmm.nsys.supervisor.run_supervised`. Raises ProfilerUnusableError if nsys does not start the command.
    """
    folder = make_private_folder("hpcmm-nsys-")
    started, unusable, output = folder / "started", folder / "unusable", folder / report.stem

    def record(apart: Supervisor) -> None:
        status = start_under_nsys([*profile, f"--output={output}"], command, started)
        if not started.exists() and not apart.in_a_hurry:
            unusable.touch()
            return
        apart.say_ended(status)
        if _finish(output, report, aside, keep_raw=apart.in_a_hurry):
            shutil.rmtree(folder, ignore_errors=True)

    status = run_supervised(record, rank_pid=lambda: _pid_in(started), ended=ended, must_end=must_end, heeds_s=heeds_s)
    if unusable.exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise ProfilerUnusableError(
            f"nsys on {os.uname().nodename} did not start the rank; what it said stands above. What another user "
            "left of nsys in /dev/shm can be why"
        )
    return status


_AS_BEFORE = """\
set -f; IFS=:; libraries=
for each in ${LD_LIBRARY_PATH-}; do
  [ -z "$each" ] || libraries=$libraries${libraries:+:}$each
done
set +f; unset IFS
if [ -n "$libraries" ]; then LD_LIBRARY_PATH=$libraries; else unset LD_LIBRARY_PATH; fi
cd -- "$1" && umask "$2" || exit
if [ -n "$3" ]; then TMPDIR=$3; else unset TMPDIR; fi
shift 3
echo $$ >"$0" && exec "$@"
"""
"""Starts a command in the folder, and with the umask and TMPDIR, that nsys itself does not get.

And without the empty entry that nsys 2022.4 puts before its own in LD_LIBRARY_PATH: each program would take libraries
from the folder that it runs in.
"""


def start_under_nsys(profile: Sequence[str], command: Sequence[str], started: Path) -> int:
    """Run nsys until the command is over; again where nsys fails before it has made the file ``started``.

    ``started`` then holds the command's process id. It lies in a folder of this user alone, in which nsys keeps the raw
    capture while it grows: that holds the whole environment, and nsys would let all users of the node read it.

    The ranks of a node start their nsys one after the other. Several at once meet in nsys 2022.4's shared session table
    and fail, one in twenty, with "Local Endpoint is not available", "sem_open" or "End of file".
    """
    as_before = [current_folder(), f"{_umask():o}", os.environ.get("TMPDIR", "")]
    noting_the_start = ["/bin/sh", "-c", _AS_BEFORE, str(started), *as_before]
    for attempts_left in reversed(range(START_ATTEMPTS)):
        with one_start_at_a_time():
            environment = os.environ | {COMMAND_BEGAN: f"{time.time():.3f}", "TMPDIR": str(started.parent)}
            process = subprocess.Popen([*profile, *noting_the_start, *command], env=environment, cwd=FOLDER_OF_NSYS)
            while not started.exists() and process.poll() is None:
                time.sleep(_START_POLL_S)
        status = process.wait()
        if started.exists():
            return status
        print(f"hpcmm: nsys failed to start the rank; {attempts_left} more attempts.", file=sys.stderr, flush=True)
    return status


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def current_folder() -> str:
    """By the name that the shell has for it, which may lead through links."""
    named = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if named.startswith("/") and os.path.samefile(named, "."):  # noqa: PTH121 -- of names
            return named
    return os.getcwd()  # noqa: PTH109 -- of names


@contextlib.contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Keep others of this user and machine from starting nsys meanwhile (see ``start_under_nsys``).

    If another user has taken the lock's name, nobody is kept: they could hold such a lock for ever. The name by which
    CUDA is told of a library is taken before anything starts.
    """
    lock = Path(tempfile.gettempdir()) / f"hpcmm-nsys-start-{os.geteuid()}.lock"
    with contextlib.ExitStack() as held:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            said = f"{lock} cannot be locked ({error.strerror}); nsys starts without"
            print(f"hpcmm: {said}.", file=sys.stderr, flush=True)
        else:
            held.enter_context(os.fdopen(descriptor, "w"))
            facts = os.fstat(descriptor)  # it may be a hard link to a file of ours that others can open
            if facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        _take_injection_name()
        yield


_INJECTION_NAME = Path("/dev/shm/cuda_injection_path_shm")  # noqa: S108 -- libcuda's
"""If a file of this name is the user's, each CUDA program of the user loads the library that it names."""


def _take_injection_name() -> None:
    """Have the user's own empty file there, mode 0600, which names no library.

    nsys leaves files of the user in /dev/shm that all users can write. Who can write one can make a hard link of it by
    this name, and have their code run in all CUDA programs of the user on this node, also once nsys has ended.
    """
    if not _INJECTION_NAME.parent.is_dir():
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            facts = _INJECTION_NAME.lstat()
            if facts.st_uid == os.geteuid() and (facts.st_nlink > 1 or facts.st_mode & 0o022):
                _INJECTION_NAME.unlink()
        with contextlib.suppress(FileExistsError):
            os.close(os.open(_INJECTION_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        owner = _INJECTION_NAME.lstat().st_uid
        problem = (
            None if owner == os.geteuid() else f"is of user {owner}"
        )  # CUDA passes it over as long as it is theirs
    except OSError as error:
        problem = f"cannot be made ({error.strerror}), so another user could"
    if problem is not None:
        print(f"hpcmm: {_INJECTION_NAME} {problem}: see docs/security.md.", file=sys.stderr, flush=True)


def _pid_in(started: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(started.read_text(encoding="ascii"))
    return None


def _finish(output: Path, report: Path, aside: Path | None, *, keep_raw: bool) -> bool:
    """Import what nsys left and copy it. Returns whether nothing is left behind that anyone would miss.

    ``keep_raw``: copy the raw capture, which the analysis reads too, before the import takes its time.
    """
    finished, unfinished = output.with_suffix(".nsys-rep"), output.with_suffix(".qdstrm")
    raw = report.with_suffix(unfinished.suffix)
    is_kept = False
    if not finished.exists() and unfinished.exists():
        is_kept = keep_raw and _copied(unfinished, raw, aside)
        try:
            import_qdstrm(unfinished, finished)
        except HpcmmError as error:
            print(f"hpcmm: {error}", file=sys.stderr)
    made = finished if finished.exists() else unfinished
    if not made.exists():
        print(f"hpcmm: nsys left no report for {report.stem}; its messages stand above.", file=sys.stderr)
        return True
    if made == unfinished and is_kept:
        return True
    if not _copied(made, report.with_suffix(made.suffix), aside):
        return False
    if is_kept:
        raw.unlink(missing_ok=True)
    return True


def _copied(made: Path, target: Path, aside: Path | None) -> bool:
    """Copy a report to the run directory, where an earlier attempt's makes room. Says so where that cannot be."""
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
