"""In front of a rank: start it, pass signals on, look where it stands, and leave a record when it ends badly.

Only a parent sees a rank that SIGKILL ended, and when. It also sees what a rank that stands still cannot tell itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hpcmm.node.recorder import node_of
from hpcmm.runs import failures, stacks
from hpcmm.runs.run_dir import RunDir

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_TO_WRITE_STACKS_S = 0.5
_PR_SET_PDEATHSIG = 1
"""From Linux' sys/prctl.h."""


def run_watched(command: Sequence[str], run: RunDir, rank: int, watch: RankWatch | None = None) -> int:
    """Run the rank's command to its end. Returns its exit status, negative for the signal that ended it.

    ``watch``: is asked every two seconds what there is to do, and whether the rank must end.
    """

    def in_the_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
    if watch is not None:
        threading.Thread(target=_attend, args=(watch, process), daemon=True).start()
    status = process.wait()
    record_exit(status, run, rank)
    return status


def _attend(watch: RankWatch, process: subprocess.Popen[bytes]) -> None:
    while not watch():
        time.sleep(_LOOK_S)
    process.terminate()
    time.sleep(_HEEDS_SIGTERM_S)
    process.kill()


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


# Looking where the rank stands.

_LOOK_S = 2.0
"""Seconds between two looks at the file that asks: on a shared file system each is a question to its server."""
_BETWEEN_LOOKS_S = 2.0
_ANSWERS_WITHIN_S = 2.0
_POLL_S = 0.02
_HEEDS_SIGTERM_S = 10.0
EXIT_STATUS_OF_HANG = 124
"""That of a job that the watchdog ended; ``timeout`` ends so too."""


class RankWatch:
    """Answers for its rank when all are asked where they stand. In front of rank 0 it also asks, for the watchdog."""

    def __init__(self, run: RunDir, rank: int, hang_s: float | None = None, ranks: int = 1) -> None:
        """Sets the environment variable by which the rank, which starts after this, finds where to answer.

        ``hang_s``: the ranks, of which there are ``ranks``, are ended once none has moved for so long (None: never).
        """
        self._run, self._rank = run, rank
        self._folder = stacks.stacks_folder(run)
        self._stack, self._told = os.memfd_create("hpcmm-stack"), os.memfd_create("hpcmm-told")
        self._questions, self._ask = os.pipe()
        numbers = (self._stack, self._questions, self._told)
        os.environ[stacks.LISTENS_AT] = ":".join(map(str, (f"/proc/{os.getpid()}/fd", *numbers)))
        self._listener: tuple[int, int] | None = None
        self._dog = Watchdog(run, self._folder, hang_s, ranks) if hang_s is not None and rank == 0 else None
        self._complained = False
        with self._saying_so():
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # so that it is there: a file system may remember that it is not
                stacks.request_file(self._folder).touch(exist_ok=False)
        self._answered = stacks.read_request(run, self._folder).key

    def __call__(self) -> bool:
        """Do what is to be done now, for some seconds at most. Returns whether the rank must end."""
        request = stacks.read_request(self._run, self._folder)
        if request.key not in {"", self._answered}:
            self._answered = request.key
            if request.ends:
                return True
            with self._saying_so():
                stacks.write_answer(self._folder, self._answer(request))
        if self._dog is not None:
            with self._saying_so():
                self._dog.watch(time.monotonic())
        return False

    def forget(self) -> None:
        """Remove what was asked, once a rank has ended well: all of its run is over soon."""
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._run.stacks.rmdir()

    @contextlib.contextmanager
    def _saying_so(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:  # rank 0 has ended well, and removed it
            return
        except OSError as error:
            if not self._complained:
                print(f"hpcmm: {self._folder} cannot be written ({error.strerror}).", file=sys.stderr, flush=True)
            self._complained = True

    def _answer(self, request: stacks.Request) -> stacks.Answer:
        looks: list[stacks.Look] = []
        why = ""
        for number in range(request.looks):
            if number:
                time.sleep(_BETWEEN_LOOKS_S)
            look, why = self._look()
            looks.append(look)
        return stacks.Answer(self._rank, node_of(os.environ), request.key, looks, why)

    def _look(self) -> tuple[stacks.Look, str]:
        """What the rank does now, and why it does not tell, or what keeps it."""
        if self._listener is None:
            self._listener = _listener_in(self._told)
        if self._listener is None:
            return stacks.Look(time.time_ns()), "its program has not started yet, or does not listen"
        pid, thread = self._listener
        why = _what_keeps(pid)
        told: dict[str, Any] = {} if why in _CANNOT_TELL else self._asked(pid, thread)
        stack, groups = told.get("stack", ""), told.get("groups", {})
        if stack and told.get("by_signal"):
            why = why or "C code holds Python's lock there"
        elif not (stack or why):
            why = f"it did not answer within {_ANSWERS_WITHIN_S:.0f} s"
        own_s, children_s, io_bytes = _work_of(pid)
        step, spins = told.get("step"), told.get("spins", False)
        return stacks.Look(time.time_ns(), stack, step, groups, own_s, children_s, io_bytes, _wakes_of(pid), spins), why

    def _asked(self, pid: int, thread: int) -> dict[str, Any]:
        """What the rank's thread tells; if C code holds Python's lock, what the signal's handler writes."""
        told_at = os.fstat(self._told).st_size
        os.write(self._ask, b"?")
        # Long enough that only a lock keeps the thread from it: else the handler would see stacks that change.
        told = _values_in(_grown(self._told, told_at, _ANSWERS_WITHIN_S, lines=2))
        os.ftruncate(self._told, told_at)
        if "stack" not in told and _listens(pid):
            stack_at = os.fstat(self._stack).st_size
            _signal_thread(pid, thread, stacks.ASK_FOR_STACK)
            told["stack"] = _grown(self._stack, stack_at, _ANSWERS_WITHIN_S)
            told["by_signal"] = True
            os.ftruncate(self._stack, 0)
        return told


def _grown(descriptor: int, size: int, within_s: float, lines: int = 0) -> str:
    """What is written behind ``size`` bytes, once that is so many lines (0: once no more comes)."""
    until_s = time.monotonic() + within_s
    seen = size
    while True:
        time.sleep(_POLL_S)
        now = os.fstat(descriptor).st_size
        text = os.pread(descriptor, stacks.MOST_STACK, size).decode(errors="replace")
        over = text.count("\n") >= lines if lines else now == seen
        if (now > size and over) or time.monotonic() > until_s:
            return text
        seen = now


def _values_in(told: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for line in told.splitlines():
        with contextlib.suppress(ValueError):  # half a line
            values.update(json.loads(line))
    return values


def _listener_in(descriptor: int) -> tuple[int, int] | None:
    """The rank's process, and the thread of it that answers: a profiler may stand between it and this process."""
    first, end, _ = os.pread(descriptor, 256, 0).partition(b"\n")
    values = _values_in(first.decode()) if end else {}
    return (values["pid"], values["thread"]) if values else None


_LIBC = ctypes.CDLL(None, use_errno=True)
_TGKILL = {"x86_64": 234, "aarch64": 131, "ppc64le": 250}
"""Numbers of the system call, for which older C libraries have no function."""


def _signal_thread(pid: int, thread: int, number: int) -> None:
    """To one thread alone: a signal to a process may interrupt what its main thread waits in."""
    if (call := _TGKILL.get(os.uname().machine)) is not None:
        _LIBC.syscall(call, pid, thread, int(number))


_STATES = {
    "T": "it is stopped (SIGSTOP)",
    "t": "it is stopped by a debugger",
    "D": "it is in an uninterruptible state: it waits for a disk, a file system or a device",
    "Z": "its process has ended",
    "X": "its process has ended",
}
_CANNOT_TELL = frozenset({_STATES["T"], _STATES["t"], _STATES["Z"]})


def _what_keeps(pid: int) -> str:
    """What the kernel says of a rank's main thread, if that keeps it from running."""
    try:
        return _STATES.get(_kernel_s(pid, "stat").rpartition(")")[2].split()[0], "")
    except (OSError, IndexError):
        return _STATES["X"]


def _listens(pid: int) -> bool:
    """Whether the signal has a handler, without which it would end the process."""
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", _kernel_s(pid, "status"), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (stacks.ASK_FOR_STACK - 1) & 1)


def _work_of(pid: int) -> tuple[float, float, int]:
    """Processor time in s of a process and of all that it has started, and bytes that they have read and written."""
    ticks, io_bytes = 0, _io_of(pid)
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = _kernel_s(int(folder.name), "stat").rpartition(")")[2].split()
            parents[int(folder.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
            if int(folder.name) == pid:
                ticks += int(fields[13]) + int(fields[14])  # of children that have ended
    below = {pid}
    for _ in range(_MOST_GENERATIONS):
        found = {child for child, (parent, _) in parents.items() if parent in below} - below
        if not found:
            break
        below |= found
    for child in below - {pid}:
        ticks += parents[child][1]
        io_bytes += _io_of(child)
    per_s = os.sysconf("SC_CLK_TCK")
    return parents.get(pid, (0, 0))[1] / per_s, ticks / per_s, io_bytes


def _wakes_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", _kernel_s(pid, "status"), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


_MOST_GENERATIONS = 16


def _io_of(pid: int) -> int:
    try:
        values = [line.split(": ") for line in _kernel_s(pid, "io").splitlines()]
        return sum(int(value) for name, value in values if name in {"rchar", "wchar"})
    except (OSError, ValueError):
        return 0


def _kernel_s(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")


# The watchdog.


class Stillness:
    """How long no rank has moved, by what is heard of all of them again and again."""

    def __init__(self, hang_s: float) -> None:
        self._hang_s = hang_s
        self._last: dict[int, stacks.Look] = {}
        self._whys: dict[int, str] = {}
        self._output: object = None
        self._since_s: float | None = None
        self._awake_s = -math.inf
        self._looks = 0

    def hear(self, now_s: float, answers: Mapping[int, stacks.Answer], output: object) -> float | None:
        """Returns for how many seconds no rank has moved, once that is a hang; else None.

        ``output``: the sizes of logs and metrics. It counts only if no rank tells of steps or collectives, since a log
        may tell only that its program waits.
        """
        looks = {rank: answer.looks[-1] for rank, answer in answers.items() if answer.looks}
        whys = {rank: answer.why for rank, answer in answers.items()}
        tells = any(look.step is not None or look.groups for look in {**self._last, **looks}.values())
        pairs = [(self._last.get(rank), look) for rank, look in looks.items()]
        some_moved = any(last is None or stacks.moved(last, look) or stacks.works(last, look) for last, look in pairs)
        if self._since_s is None or some_moved or whys != self._whys or (output != self._output and not tells):
            self._since_s, self._looks = now_s, 0
        if any(last is not None and stacks.wakes(last, look) for last, look in pairs):
            self._awake_s = now_s
        self._last, self._whys, self._output = {**self._last, **looks}, whys, output
        self._looks += 1
        still_s = now_s - self._since_s
        asleep = now_s - self._awake_s >= self._hang_s or still_s >= _WHILE_AWAKE * self._hang_s
        is_hang = looks and asleep and still_s >= self._hang_s and self._looks >= _LEAST_LOOKS
        return still_s if is_hang else None


_WHILE_AWAKE = 3
"""So many times longer a rank may wake and sleep at one place: it may work through something there."""
_LEAST_LOOKS = 3
"""At the same place, beside the time that these took."""


_LOOKS_IN_HANG = 4
_MOST_BETWEEN_S = 60.0
_PATIENCE_S = 15.0


class Watchdog:
    """Ends a job whose ranks have not moved for ``hang_s``, with what tells where they stood."""

    def __init__(self, run: RunDir, folder: Path, hang_s: float, ranks: int) -> None:
        self._run, self._folder, self._ranks = run, folder, ranks
        self._stillness = Stillness(hang_s)
        self._between_s = min(_MOST_BETWEEN_S, hang_s / _LOOKS_IN_HANG)
        self._asked, self._asked_s = "", -_MOST_BETWEEN_S

    def watch(self, now_s: float) -> None:
        """To be called again and again: asks all ranks at times, and hears what they say. Raises OSError."""
        if self._asked:
            request = stacks.read_request(self._run, self._folder)
            found = stacks.read_answers(self._run, self._folder)
            answers = {rank: answer for rank, answer in found.items() if answer.key in {self._asked, request.key}}
            if len(answers) < self._ranks and now_s - self._asked_s < _PATIENCE_S:
                return
            self._asked = ""
            still_s = self._stillness.hear(self._asked_s, answers, self._output())
            if still_s is not None:
                self._end(still_s)
                return
        if now_s - self._asked_s >= self._between_s:
            self._asked, self._asked_s = stacks.post(self._folder), now_s

    def _output(self) -> list[int]:
        """The sizes of what the ranks write."""
        sizes = []
        for rank in range(self._ranks):
            for path in (self._run.rank_log(rank), self._run.rank_metrics(rank)):
                with contextlib.suppress(OSError):
                    sizes.append(path.lstat().st_size)
        return sizes

    def _end(self, still_s: float) -> None:
        attempt = failures.attempt_folder(self._run)
        stacks.note_hang(attempt, still_s)
        ended = failures.RankExit(self._rank, node_of(os.environ), time.time_ns(), EXIT_STATUS_OF_HANG, None)
        failures.failed_file(attempt).touch()
        failures.note_status(ended, attempt)
        print(f"hpcmm: no rank has moved for {still_s:.0f} s, so the job is ended.", file=sys.stderr, flush=True)
        stacks.post(self._folder, ends=True)

    _rank = 0
