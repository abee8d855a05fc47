"""In the rank: leave a record of the exception that ends it, and its threads' stacks when it is told to end.

And from outside: what the kernel and their Pythons tell of a rank's processes, and whether these move.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import faulthandler
import fcntl
import os
import re
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from hpcmm.annotate.groups import named_groups
from hpcmm.annotate.in_children.sitecustomize import exchange_that_failed, listen, opened, step_begun
from hpcmm.errors import ScriptExitError
from hpcmm.node.classify import CONSEQUENCES, kind_of_exception
from hpcmm.node.network import unreachable_nodes
from hpcmm.ranges import write_ranges
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.stacks import ASK_FOR_STACK, MOST_STACK, Answer, Look, frames_in, main_place

_open_stacks: list[TextIO] = []


@contextlib.contextmanager
def recording_failure(run: RunDir, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Record what ends the rank meanwhile; every exception goes on its way.

    SIGTERM ends the process again, which submitit keeps it from, but not before the stacks are written: with them
    one sees where a rank hung while the others waited for it.
    """
    rank, process = rank_of(environ), os.getpid()
    attempt = failures.attempt_folder(run, environ)
    stacks = failures.stacks_file(attempt, rank)
    listen(is_rank=True)
    with _stacks_go_to(stacks):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_stacks_on(signal.SIGTERM)
        try:
            yield
        except ScriptExitError:  # no exception of the script's: its status says it
            raise
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if os.getpid() != process:  # one that the program has forked, and which ends here as well
                raise
            _record(error, failures.error_file(attempt, rank), rank, node_of(environ))
            raise


def write_stacks_on(number: int) -> None:
    """Write all threads' stacks when signal ``number`` arrives, then do what was set for it before this call.

    Works while the process sits in C code. To be called again after another handler of the signal was set.
    """
    if _open_stacks:
        faulthandler.register(number, file=_open_stacks[-1], all_threads=True, chain=True)


def rank_of(environ: Mapping[str, str]) -> int:
    """This process' rank by its environment, 0 where that does not tell."""
    return int(environ.get("SLURM_PROCID") or environ.get("SUBMITIT_LOCAL_GLOBALID") or 0)


def node_of(environ: Mapping[str, str]) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextlib.contextmanager
def _stacks_go_to(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened_high(path)
    except OSError as error:
        print(f"hpcmm: {path} cannot be written ({error.strerror}); the rank runs without.", file=sys.stderr)
        yield
        return
    _open_stacks.append(file)
    faulthandler.enable(file)
    process = os.getpid()
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        _open_stacks.pop()
        with contextlib.suppress(OSError):  # closed by the program, which is its right
            file.close()
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0 and os.getpid() == process:
                path.unlink()
                path.parent.rmdir()  # succeeds for the last rank of a job without failures
                path.parent.parent.rmdir()


_HIGH = 4000


def _opened_high(path: Path) -> TextIO:
    """Open under a number that no file of the program's gets soon, even if the program closes all numbers first."""
    with path.open("w", encoding="utf-8") as file:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        high = min(_HIGH, most - 64) if most > 0 else _HIGH
        number = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, max(3, high))
    return os.fdopen(number, "w", encoding="utf-8")


def _record(error: BaseException, path: Path, rank: int, node: str) -> None:
    now_ns = time.time_ns()
    kind = type(error).__qualname__
    if type(error).__module__ != "builtins":
        kind = f"{type(error).__module__}.{kind}"
    message = words_of(error)[: failures.MOST_CHARACTERS]
    frames = frames_of_program(error)
    lines = "".join(traceback.format_exception(type(error), error, frames)).splitlines()
    cut = [line for line in lines[: -failures.MOST_LINES] if line[:1].strip()]  # what it was raised from stays
    lines = [*cut[-failures.MOST_LINES :], *lines[-failures.MOST_LINES :]]
    of_others = kind_of_exception(kind, message, lines) in CONSEQUENCES
    unreachable, exchange = (unreachable_nodes(), exchange_of(error)) if of_others else ([], "")
    record = failures.RankError(rank, node, now_ns, kind, message, lines, unreachable, step_begun(), exchange)
    try:
        failures.write(record, path)
    except OSError as problem:
        print(f"hpcmm: {path} cannot be written ({problem.strerror}).", file=sys.stderr)


def exchange_of(error: BaseException) -> str:
    """``all_reduce of the tensor group of ranks 2-3``; of a group without a name the call alone, or nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name, group, peer = exchange_that_failed(trace.tb_frame) if trace is not None else ("", "", None)
    mark = named_groups().get(group)
    words = name if peer is None else f"{name} {'to' if name == 'send' else 'from'} rank {peer}"
    return words if mark is None else f"{words} of the {mark.name} group of ranks {write_ranges(mark.ranks)}"


_HPCMM = Path(__file__).parent.parent
_AROUND = (str(Path(__file__)), str(_HPCMM / "start.py"), f"{_HPCMM / 'worker'}{os.sep}", contextlib.__file__)
"""Files through which a rank comes to the program, or the beginnings of their names."""

_RUNPY = ("<frozen runpy>", runpy.__file__)


def frames_of_program(error: BaseException) -> TracebackType | None:
    """A traceback as it would be if Python itself ran the program; all of it if the error is none of the program's."""
    trace = own = error.__traceback__
    while own is not None:
        name = own.tb_frame.f_code.co_filename
        if not name.startswith(_AROUND) and name not in _RUNPY:
            return own
        own = own.tb_next
    return None if isinstance(error, SyntaxError) else trace  # which tells itself where it is


def words_of(value: object) -> str:
    """``str(value)``, or what Python's own tracebacks say if that fails."""
    try:
        return str(value)
    except Exception:
        return f"<{'exception' if isinstance(value, BaseException) else type(value).__name__} str() failed>"


# What the kernel tells of the processes of this machine.

_STATES = {
    "T": "it is stopped (SIGSTOP)",
    "t": "it is stopped by a debugger",
    "D": "it is in an uninterruptible state: it waits for a disk, a file system or a device",
    "Z": "its process has ended",
    "X": "its process has ended",
}
CANNOT_TELL = frozenset({_STATES["T"], _STATES["t"], _STATES["Z"]})
MOST_GENERATIONS = 16


@dataclass(frozen=True)
class Process:
    """One of them, by its ``stat``."""

    pid: int
    name: str
    state: str
    parent: int
    ticks: int
    """Processor time of its own."""
    children_ticks: int
    """That of children that have ended."""


def processes() -> dict[int, Process]:
    """All of this machine, by their number."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            before, _, after = kernel_s(int(folder.name), "stat").rpartition(")")
            fields = after.split()
            own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
            name = before.partition("(")[2]
            found[int(folder.name)] = Process(int(folder.name), name, fields[0], int(fields[1]), own, children)
    return found


def below(pid: int, known: Mapping[int, Process]) -> list[int]:
    """All that a process has started, and what these have: its children first."""
    found: list[int] = []
    newest = {pid}
    for _ in range(MOST_GENERATIONS):
        newest = {each.pid for each in known.values() if each.parent in newest} - {pid, *found}
        found += sorted(newest)
    return found


def what_keeps(pid: int, known: Mapping[int, Process]) -> str:
    """What the kernel says of a process, if that keeps it from running."""
    return _STATES.get(known[pid].state if pid in known else "X", "")


def what_it_does(process: Process) -> str:
    """Of a program that is asked nothing: what its main thread does."""
    if process.state in _STATES:
        return _STATES[process.state]
    if process.state == "R":
        return "it computes"
    found: list[str] = []
    with contextlib.suppress(OSError):
        call = kernel_s(process.pid, "syscall").split()
        found += [f"in system call {call[0]}"] if call and call[0].isdecimal() else []
    with contextlib.suppress(OSError):
        place = kernel_s(process.pid, "wchan").strip()
        found += [f"in the kernel's {place}"] if re.fullmatch(r"[A-Za-z_][\w.]{1,80}", place) else []
    return " ".join(["it sleeps", *found])


def work_of(pid: int, known: Mapping[int, Process]) -> tuple[float, float, int]:
    """Processor time in s of a process and of all that it has started, and bytes that they have read and written."""
    started = below(pid, known)
    own, ended = (known[pid].ticks, known[pid].children_ticks) if pid in known else (0, 0)
    ticks = ended + sum(known[each].ticks for each in started)
    per_s = os.sysconf("SC_CLK_TCK")
    return own / per_s, ticks / per_s, sum(map(_io_of, [pid, *started]))


def wakes_of(pid: int) -> int:
    """How often its main thread has gone to sleep."""
    with contextlib.suppress(OSError):
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", kernel_s(pid, "status"), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def listens(pid: int, number: int) -> bool:
    """Whether the signal has a handler, without which it would end the process."""
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", kernel_s(pid, "status"), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _io_of(pid: int) -> int:
    try:
        values = [line.split(": ") for line in kernel_s(pid, "io").splitlines()]
        return sum(int(value) for name, value in values if name in {"rchar", "wchar"})
    except (OSError, ValueError):
        return 0


def kernel_s(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")


# What its Pythons tell.

ANSWERS_WITHIN_S = 2.0
_POLL_S = 0.02
_TGKILL = {"x86_64": 234, "aarch64": 131, "ppc64le": 250}
"""Numbers of the system call, for which older C libraries have no function."""


class Listener:
    """A Python process of a rank, by what it said of itself, and the files by which it is asked and answers."""

    def __init__(self, itself: Mapping[str, Any]) -> None:
        """Raises OSError if it has ended, and KeyError, TypeError or ValueError for words that are not those."""
        self.pid, self.thread, self.is_rank = itself["pid"], itself["thread"], itself["is_rank"]
        self.values: dict[str, Any] = {name: itself[name] for name in ("rank", "world")}
        """What it told last."""
        self._files: list[int] = []
        try:
            for name, flags in (("stack", os.O_RDWR), ("told", os.O_RDWR), ("ask", os.O_WRONLY | os.O_NONBLOCK)):
                number, inode = itself["files"][name]
                self._files.append(opened(f"/proc/{self.pid}/fd/{number}", inode, flags))
        except BaseException:
            self.close()
            raise
        self._stack, self._told, self._ask = self._files
        self._told_at = 0

    def close(self) -> None:
        for number in self._files:
            os.close(number)

    def ask(self) -> None:
        os.ftruncate(self._told, 0)
        with contextlib.suppress(OSError):  # it ends just now, or is full of questions
            os.write(self._ask, b"?")

    def answered(self, within_s: float) -> bool:
        """Whether the thread has told all; what it has told is in ``values`` then."""
        told = values_in(_grown(self._told, within_s, lines=2))
        self.values.update(told)
        return "stack" in told

    def signalled(self) -> str:
        """What the signal's handler writes, if C code holds Python's lock; the stacks of all threads."""
        self.values["stack"] = ""
        if self.thread and listens(self.pid, ASK_FOR_STACK):
            os.ftruncate(self._stack, 0)
            _signal_thread(self.pid, self.thread, ASK_FOR_STACK)
            self.values["stack"] = _grown(self._stack, ANSWERS_WITHIN_S)
            os.ftruncate(self._stack, 0)
        return str(self.values["stack"])

    def left(self) -> str:
        """The stacks that it has written when it was told to end."""
        return os.pread(self._stack, MOST_STACK, 0).decode(errors="replace")


def _grown(descriptor: int, within_s: float, lines: int = 0) -> str:
    """What is written there, once that is so many lines (0: once no more comes)."""
    until_s = time.monotonic() + within_s
    seen = 0
    while True:
        time.sleep(_POLL_S)
        now = os.fstat(descriptor).st_size
        text = os.pread(descriptor, MOST_STACK, 0).decode(errors="replace")
        over = text.count("\n") >= lines if lines else now == seen
        if (now > 0 and over) or time.monotonic() > until_s:
            return text
        seen = now


def values_in(told: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for line in told.splitlines():
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # half a line
            values.update(ast.literal_eval(line))
    return values


def _signal_thread(pid: int, thread: int, number: int) -> None:
    """To one thread alone: a signal to a process may interrupt what its main thread waits in."""
    if (call := _TGKILL.get(os.uname().machine)) is not None:
        ctypes.CDLL(None).syscall(call, pid, thread, int(number))


# Whether ranks move.

_MOVED_BYTES = 1 << 20
"""Read or written between two looks: less may be a thread that only tells of the machine."""
_BUSY = 0.05
"""Of one processor, which others may share. What only waits takes less."""


def moved(before: Look, now: Look) -> bool:
    """Whether a rank has come anywhere between two looks, or something that it waits for has done its work."""
    if (before.step, before.groups) != (now.step, now.groups) or frames_in(before.stack) != frames_in(now.stack):
        return True
    between_s = (now.unix_ns - before.unix_ns) / 1e9
    busy = now.children_s - before.children_s > _BUSY * between_s > 0
    return busy or abs(now.io_bytes - before.io_bytes) > _MOVED_BYTES


def is_still(answer: Answer) -> bool:
    """Whether a rank did nothing between two looks."""
    return len(answer.looks) > 1 and not moved(*answer.looks[-2:])


def works(before: Look, now: Look) -> bool:
    """Whether a rank kept a processor busy between two looks by anything else than a wait, as far as one sees."""
    busy = now.own_s - before.own_s > _BUSY * (now.unix_ns - before.unix_ns) / 1e9
    return busy and not (now.spins or _waits(now))


def wakes(before: Look, now: Look) -> bool:
    """Whether a rank woke and slept again and again between two looks: in a loop that may, or may not, come to an end.

    A wait for a loader's queue wakes every five seconds, too.
    """
    often = now.wakes - before.wakes > max(1.0, _OFTEN * (now.unix_ns - before.unix_ns) / 1e9)
    return often and not _waits(now)


_OFTEN = 0.4
"""Times a second."""


def _waits(look: Look) -> bool:
    place = main_place(look.stack)
    return bool(look.waits) or place is None or place.in_collective or place.may_wait
