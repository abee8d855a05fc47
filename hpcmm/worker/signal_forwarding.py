"""In front of a rank: start it, pass signals on, look where it stands, and leave a record when it ends badly.

Only a parent sees a rank that SIGKILL ended, and when. It also sees what a rank that stands still cannot tell itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from hpcmm.annotate.in_children.sitecustomize import LISTENS_AT, memory
from hpcmm.node.recorder import (
    ANSWERS_WITHIN_S,
    CANNOT_TELL,
    MOST_GENERATIONS,
    Listener,
    Process,
    below,
    moved,
    node_of,
    processes,
    values_in,
    wakes,
    wakes_of,
    what_it_does,
    what_keeps,
    work_of,
    works,
)
from hpcmm.runs import failures, stacks
from hpcmm.runs.run_dir import RunDir

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_TO_WRITE_STACKS_S = 0.5
_PR_SET_PDEATHSIG = 1
"""From Linux' sys/prctl.h."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def run_watched(command: Sequence[str], run: RunDir, rank: int, watch: RankWatch | None = None) -> int:
    """Run the rank's command to its end. Returns its exit status, negative for the signal that ended it.

    ``watch``: is asked every two seconds what there is to do, and whether the rank must end.
    """

    def in_the_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _unblock()

    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if not started:
            early.append(number)
            return
        if number == signal.SIGTERM:  # Slurm sends it to the rank as well, whose stacks a second one would cut off
            time.sleep(_TO_WRITE_STACKS_S)
        if started[0].returncode is None:
            started[0].send_signal(number)

    # Before there is somebody to pass them on to, for the mask below is that of one thread, and a rank may have others.
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # what the new process is to hear it hears itself
    process = subprocess.Popen(command, preexec_fn=in_the_child)  # noqa: PLW1509 -- it takes no lock of Python's
    started.append(process)
    _unblock()
    for heard in early:
        pass_on(heard, None)
    if watch is not None:
        threading.Thread(target=_attend, args=(watch, process), daemon=True).start()
    status = _wait(process)
    record_exit(status, run, rank)
    return status


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit status. A signal that another thread caught is handled in this one, which a mere wait would not do."""
    waiting = threading.Thread(target=process.wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(_LOOK_S)
    return process.wait()


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
    attempt = failures.attempt_folder(run)
    if status == -signal.SIGTERM and failures.error_file(attempt, rank).exists():
        status = 1  # of its exception, after which it was told to end while it still cleared up
    number = -status if status < 0 else None
    now_ns = unix_ns or time.time_ns()
    status_of_its_own = None if number else status
    said = said[: failures.MOST_CHARACTERS]
    record = failures.RankExit(rank, node_of(os.environ), now_ns, status_of_its_own, number, said)
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
_HEEDS_SIGTERM_S = 10.0
_MOST_INTRODUCTIONS = 1 << 20
_MOST_KEPT = 256
EXIT_STATUS_OF_HANG = 124
"""That of a job that the watchdog ended; ``timeout`` ends so too."""


class RankWatch:
    """Answers for its rank when all are asked where they stand. In front of rank 0 it also asks, for the watchdog."""

    def __init__(self, run: RunDir, rank: int, hang_s: float | None = None, ranks: int = 1) -> None:
        """Sets the environment variable by which the rank, which starts after this, finds where to introduce itself.

        ``hang_s``: the ranks, of which there are ``ranks``, are ended once none has moved for so long (None: never).
        """
        self._run, self._rank = run, rank
        self._folder = stacks.stacks_folder(run)
        self._introductions, self._heard = memory(), 0
        inode = os.fstat(self._introductions).st_ino
        listens_at = (f"/proc/{os.getpid()}/fd/{self._introductions}", inode, int(stacks.ASK_FOR_STACK))
        os.environ[LISTENS_AT] = ":".join(map(str, listens_at))
        self._listeners: dict[int, Listener] = {}
        self._main: Listener | None = None
        self._dog = Watchdog(run, self._folder, hang_s, ranks) if hang_s is not None and rank == 0 else None
        self._complained = self._ordered = False
        with self._saying_so():
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # so that it is there: a file system may remember that it is not
                stacks.request_file(self._folder).touch(exist_ok=False)
        self._answered = stacks.read_request(run, self._folder).key

    def __call__(self) -> bool:
        """Do what is to be done now, for some seconds at most. Returns whether the rank must end."""
        self._meet()
        request = stacks.read_request(self._run, self._folder)
        if request.key not in {"", self._answered}:
            self._answered = request.key
            if request.ends:
                self._ordered = True
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

    def keep(self) -> None:
        """Leave the stacks that the rank's processes have written when they were told to end, once it has ended badly.

        The rank itself has left its own.
        """
        if self._ordered:  # all ranks have told all that there is to know
            return
        found = []
        for each in self._listeners.values():
            if each is not self._main and (stack := each.left()):
                still_there = stacks.frames_in(stack) == stacks.frames_in(each.values.get("stack", ""))
                told = each.values if still_there else {}
                groups = told.get("groups", {})
                looks = [stacks.Look(time.time_ns(), stack, groups=groups, **stacks.exchanges_in(told))]
                name = each.values.get("name") or f"process {each.pid}"
                found.append(stacks.Worker(each.pid, name=name, looks=looks, **_identity(each.values)))
        if found:
            answer = stacks.Answer(self._rank, node_of(os.environ), stacks.AT_END, [], workers=_bounded(found))
            with self._saying_so():
                stacks.write_answer(self._folder, answer)

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

    def _meet(self) -> None:
        """Make the acquaintance of processes that have started since, and forget those that ended without a word."""
        text = os.pread(self._introductions, _MOST_INTRODUCTIONS, self._heard)
        text = text[: text.rfind(b"\n") + 1]
        self._heard += len(text)
        for line in text.decode(errors="replace").splitlines():
            with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # it has ended since
                new = Listener(values_in(line))
                if (known := self._listeners.pop(new.pid, None)) is not None:
                    known.close()
                self._listeners[new.pid] = new
                self._main = new if new.is_rank else self._main
        for pid, each in list(self._listeners.items()):
            is_gone = each is not self._main and not Path(f"/proc/{pid}").exists()
            if is_gone and (not each.left() or len(self._listeners) > _MOST_KEPT):
                self._listeners.pop(pid).close()

    def _answer(self, request: stacks.Request) -> stacks.Answer:
        workers: dict[int, stacks.Worker] = {}
        mains: list[tuple[stacks.Look, str]] = []
        for number in range(request.looks):
            if number:
                time.sleep(_BETWEEN_LOOKS_S)
                self._meet()
            main, now = self._look()
            mains.append(main)
            before = {worker.pid: worker.looks for worker in workers.values()}
            workers = {each.pid: replace(each, looks=[*before.get(each.pid, []), *each.looks]) for each in now}
        looks, why = [look for look, _ in mains], mains[-1][1]
        itself = _identity(self._main.values) if self._main is not None else {}
        return stacks.Answer(
            self._rank,
            node_of(os.environ),
            request.key,
            looks,
            why,
            _bounded(workers.values()),
            itself.get("world"),
            itself.get("joined", False),
        )

    def _look(self) -> tuple[tuple[stacks.Look, str], list[stacks.Worker]]:
        """What the rank does now, and why it does not tell, or what keeps it; and what its processes do."""
        if self._main is None:
            return (stacks.Look(time.time_ns()), "its program has not started yet, or does not listen"), []
        known = processes()
        started = below(self._main.pid, known)
        asked = [self._main, *(self._listeners[pid] for pid in started if pid in self._listeners)]
        asked = asked[: 1 + stacks.MOST_WORKERS]
        said = dict(zip((each.pid for each in asked), _looks_at(asked, known)))
        names = {each.pid for each in asked}
        workers = []
        for pid in started:
            if pid in said:
                look, why = said[pid]
                values = self._listeners[pid].values
                name = values.get("name") or known[pid].name
                worker = stacks.Worker(pid, name=name, looks=[look], why=why, **_identity(values))
            elif not any(each.parent == pid for each in known.values()):  # a shell waits for what it has started
                look = stacks.Look(time.time_ns(), "", None, {}, *work_of(pid, known), wakes_of(pid))
                worker = stacks.Worker(pid, name=known[pid].name, looks=[look], why=what_it_does(known[pid]))
            else:
                continue
            workers.append(replace(worker, parent=_parent_in(names - {self._main.pid}, pid, known)))
        return said[self._main.pid], workers


def _looks_at(asked: Sequence[Listener], known: Mapping[int, Process]) -> list[tuple[stacks.Look, str]]:
    """All are asked at once, so that one that cannot answer delays the others no more than itself."""
    whys = [what_keeps(each.pid, known) for each in asked]
    able = [each for each, why in zip(asked, whys) if why not in CANNOT_TELL]
    for each in able:
        each.ask()
    until_s = time.monotonic() + ANSWERS_WITHIN_S
    # Long enough that only a lock keeps the thread from it: else the handler would see stacks that change.
    silent = [each for each in able if not each.answered(max(0.0, until_s - time.monotonic()))]
    looks = []
    for each, why in zip(asked, whys):
        stack = "" if each not in able else each.signalled() if each in silent else each.values["stack"]
        if stack and each in silent:
            why = why or "C code holds Python's lock there"  # noqa: PLW2901
        elif not (stack or why):
            why = f"it did not answer within {ANSWERS_WITHIN_S:.0f} s"  # noqa: PLW2901
        step, groups, spins = (each.values.get(name) for name in ("step", "groups", "spins"))
        work = work_of(each.pid, known)
        told = stacks.exchanges_in(each.values) if each not in silent else {}
        look = stacks.Look(time.time_ns(), stack, step, groups or {}, *work, wakes_of(each.pid), spins is True, **told)
        looks.append((look, why))
    return looks


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": values.get("rank"), "world": values.get("world"), "joined": values.get("joined", False)}


def _parent_in(names: Collection[int], pid: int, known: Mapping[int, Process]) -> int:
    """The nearest process above that is one of these; 0 if none is."""
    for _ in range(MOST_GENERATIONS):
        pid = known[pid].parent if pid in known else 0
        if pid in names or not pid:
            break
    return pid if pid in names else 0


def _bounded(workers: Iterable[stacks.Worker]) -> list[stacks.Worker]:
    most = stacks.MOST_STACK_OF_WORKER
    return [
        replace(each, looks=[replace(look, stack=look.stack[:most]) for look in each.looks])
        for each in list(workers)[: stacks.MOST_WORKERS]
    ]


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
        some_moved = any(last is None or moved(last, look) or works(last, look) for last, look in pairs)
        if self._since_s is None or some_moved or whys != self._whys or (output != self._output and not tells):
            self._since_s, self._looks = now_s, 0
        if any(last is not None and wakes(last, look) for last, look in pairs):
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
            still_s = self._stillness.hear(self._asked_s, stacks.ranks_of(answers), self._output())
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
