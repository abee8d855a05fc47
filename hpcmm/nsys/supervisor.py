"""Run a rank's profiler in a process of its own, which Slurm's SIGTERM does not reach and which ends with this one.

A job that is cancelled or out of time gets SIGTERM, and SIGKILL some seconds later (Slurm's KillWait). nsys' agent dies
of the SIGTERM with all that it has recorded. If Slurm follows processes by control groups, only the process that it
started itself gets SIGTERM; where it follows them by their parents, every descendant does. So the profiler's ancestor
leaves the family: it is told of signals by this process alone, passes them to the rank and not to the profiler, and
kills all that it has started when this process is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_PR_SET_CHILD_SUBREAPER = 36
"""From Linux' sys/prctl.h."""

HEEDS_SIGTERM_S = 5.0
"""Seconds after which a rank that was told to end is killed, which leaves the report time before Slurm's SIGKILL."""

_WATCH_S = 2.0
_ENDED_STATES = frozenset("ZXx")
"""Of a process that is over but still listed: a zombie, or dead."""


@dataclass(frozen=True)
class End:
    """How the rank's command ended."""

    status: int
    """Exit status, or minus the signal's number."""
    unix_ns: int


class Supervisor:
    """What the work in the process apart may know and say."""

    def __init__(self, words: int, rank_pid: Callable[[], int | None], heeds_s: float | None) -> None:
        self._words = words
        self._heeds_s = heeds_s
        self._rank_pid = rank_pid
        self.in_a_hurry = False
        """Whether the rank was told to end, so that SIGKILL may come soon."""

    def say_ended(self, status: int) -> None:
        """Tell the process in front, before any further work, that the rank's command is over."""
        ended = {"status": status, "unix_ns": time.time_ns()}
        os.write(self._words, json.dumps(ended).encode() + b"\n")

    def heed(self, orders: int) -> None:
        """Pass on the signals that come as bytes; kill everything when the pipe is closed. For a thread of its own."""
        while order := os.read(orders, 1):
            self._pass_on(signal.Signals(order[0]))
        while killed := _descendants(os.getpid()):
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        os._exit(1)

    def _pass_on(self, number: signal.Signals) -> None:
        pid = self._rank_pid()
        if number in _ENDING:
            self.in_a_hurry = True
            if pid is None:  # the profiler has not come to start it
                for each in _descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
                return
            if self._heeds_s is not None:
                kill = threading.Timer(self._heeds_s, _kill_if_alive, (pid,))
                kill.daemon = True
                kill.start()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def run_supervised(
    work: Callable[[Supervisor], object],
    *,
    rank_pid: Callable[[], int | None],
    ended: Callable[[End], None],
    must_end: Callable[[], bool],
    heeds_s: float | None = HEEDS_SIGTERM_S,
) -> int:
    """Do ``work`` in a process apart. Returns the status that it said the rank's command ended with, when it is done.

    ``rank_pid`` tells the rank's process once there is one. ``ended`` is called here as soon as the command is over,
    while ``work`` goes on. ``must_end`` is asked every two seconds: once it is true, the rank is told to end. A rank
    that was told to end is killed ``heeds_s`` seconds later (None: never). 1 is returned if the process apart was
    killed before it could say anything.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    orders_read, orders = os.pipe()
    words, words_write = os.pipe()
    with _passing_signals_to(orders):  # before there is anybody to miss one
        child = os.fork()
        if child == 0:
            os.close(orders)
            os.close(words)
            os.setsid()
            if os.fork() == 0:
                _work_and_exit(work, Supervisor(words_write, rank_pid, heeds_s), orders_read)
            os._exit(0)
        os.close(orders_read)
        os.close(words_write)
        os.waitpid(child, 0)
        status = _follow(words, orders, ended, must_end)
    os.close(orders)
    return status


def _work_and_exit(work: Callable[[Supervisor], object], apart: Supervisor, orders: int) -> None:
    """Never returns, so that nothing of the process that was copied is done twice."""
    status = 1
    try:
        for number in _PASSED_ON:
            signal.signal(
                number, lambda *_: None
            )  # a signal to the whole group; not ignored, or the rank would be, too
        _stay_the_ancestor()
        threading.Thread(target=apart.heed, args=(orders,), daemon=True).start()
        work(apart)
        status = 0
    except BaseException as error:  # this copy of the process must not go on as the original
        print(f"hpcmm: {type(error).__name__} beside the rank: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _follow(words: int, orders: int, ended: Callable[[End], None], must_end: Callable[[], bool]) -> int:
    """Read what the process apart says until it is gone."""
    status, said, told = 1, b"", False
    with selectors.DefaultSelector() as ready, os.fdopen(words, "rb", buffering=0) as pipe:
        ready.register(pipe, selectors.EVENT_READ)
        while True:
            if not ready.select(_WATCH_S):
                if not told and must_end():
                    told = True
                    _order(orders, signal.SIGTERM)
                continue
            given = pipe.read(4096)
            if not given:
                break
            said += given
            if said.endswith(b"\n"):
                end = End(**json.loads(said))
                status, said, told = end.status, b"", True
                ended(end)
    return status


@contextlib.contextmanager
def _passing_signals_to(orders: int) -> Iterator[None]:
    before = {number: signal.signal(number, lambda given, _: _order(orders, given)) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _order(orders: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it is gone, or its pipe is closed by now
        os.write(orders, bytes([number]))


def _kill_if_alive(pid: int) -> None:
    if pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _stay_the_ancestor() -> None:
    """Become the parent of all orphans among its descendants: nsys starts the rank by an agent that detaches itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print(
            f"hpcmm: prctl failed ({os.strerror(ctypes.get_errno())}); a cancelled rank may live on.", file=sys.stderr
        )


def _descendants(ancestor: int) -> list[int]:
    """Living processes below ``ancestor``, which itself is not among them."""
    children: dict[int, list[int]] = {}
    ended = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # proc_pid_stat(5): number, (name), state, parent ...; a name may hold blanks and brackets.
                state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(folder.name))
                ended |= {int(folder.name)} if state in _ENDED_STATES else set()
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return sorted(set(found[1:]) - ended)
