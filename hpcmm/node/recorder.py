"""In the rank: leave a record of the exception that ends it, and its threads' stacks when it is told to end.

And tell where it stands when the process in front of it asks, while it goes on.
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import json
import operator
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from hpcmm.errors import ScriptExitError
from hpcmm.node.classify import CONSEQUENCES, kind_of_exception
from hpcmm.node.network import unreachable_nodes
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.stacks import ASK_FOR_STACK, LISTENS_AT

_open_stacks: list[TextIO] = []


@contextlib.contextmanager
def recording_failure(run: RunDir, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Record what ends the rank meanwhile; every exception goes on its way.

    SIGTERM ends the process again, which submitit keeps it from, but not before the stacks are written: with them
    one sees where a rank hung while the others waited for it.
    """
    rank = rank_of(environ)
    attempt = failures.attempt_folder(run, environ)
    stacks = failures.stacks_file(attempt, rank)
    listen_to_who_asks()
    with _stacks_go_to(stacks):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_stacks_on(signal.SIGTERM)
        try:
            yield
        except ScriptExitError:  # no exception of the script's: its status says it
            raise
        except Exception as error:
            _record(error, failures.error_file(attempt, rank), rank, node_of(environ))
            raise


def write_stacks_on(number: int) -> None:
    """Write all threads' stacks when signal ``number`` arrives, then do what was set for it before this call.

    Works while the process sits in C code. To be called again after another handler of the signal was set.
    """
    if _open_stacks:
        faulthandler.register(number, file=_open_stacks[-1], all_threads=True, chain=True)


_C10D = "torch.distributed.distributed_c10d"
_MOST_GROUPS = 64
_MOST_FRAMES = 100
_MOST_START_S = 10.0


def listen_to_who_asks() -> None:
    """From now on a thread tells where the main thread stands, and the numbers of steps and collectives, when asked.

    It sleeps in a pipe until then. While C code holds Python's lock it cannot answer: for that case a signal is set
    that only that thread gets, so that no system call of the program's is interrupted. No thread's stack changes then,
    so that a handler in C can write them all. Does nothing if no process in front of this one listens.
    """
    place, *numbers = os.environ.pop(LISTENS_AT, "").split(":")
    try:
        stacks, questions, told = (_opened(f"{place}/{int(number)}") for number in numbers)
    except (OSError, ValueError):  # no such process, or one that may not be looked into
        return
    faulthandler.register(ASK_FOR_STACK, file=stacks, all_threads=True, chain=False)
    # Not by the module threading: a program may wait for all of its threads.
    introduced = _thread.allocate_lock()
    introduced.acquire()
    _thread.start_new_thread(_answer, (threading.get_ident(), questions, told, introduced))
    introduced.acquire(timeout=_MOST_START_S)  # C code may hold Python's lock from now on


def _opened(path: str) -> int:
    readable = str(Path(path).readlink()).startswith("pipe:")
    return os.open(path, (os.O_RDONLY if readable else os.O_RDWR | os.O_APPEND) | os.O_CLOEXEC)


def _answer(main: int, questions: int, told: int, introduced: _thread.LockType) -> None:
    """Say who answers, then answer what comes by two lines."""
    with contextlib.suppress(OSError):
        try:
            _tell(told, {"pid": os.getpid(), "thread": threading.get_native_id()})
        finally:
            introduced.release()
        while os.read(questions, 64):
            _tell(told, {"stack": _stack_of(main)})
            _tell(told, {"step": _step(), "groups": _collectives(), "spins": _uses_gpu()})


def _tell(told: int, values: Mapping[str, object]) -> None:
    os.write(told, json.dumps(values).encode() + b"\n")


def _stack_of(thread: int) -> str:
    """As faulthandler writes it."""
    lines, frame = ["Stack (most recent call first):"], sys._current_frames().get(thread)
    while frame is not None and len(lines) <= _MOST_FRAMES:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        frame = frame.f_back
    return "\n".join(lines) + "\n"


def _uses_gpu() -> bool:
    torch: Any = sys.modules.get("torch")
    with contextlib.suppress(Exception):  # it may just be imported
        return torch is not None and bool(torch.cuda.is_initialized())
    return False


def _collectives() -> dict[str, int]:
    """The number of the latest collective in each process group of several ranks, by the group's name."""
    c10d: Any = sys.modules.get(_C10D)
    found: dict[str, int] = {}
    with contextlib.suppress(Exception):  # internals of PyTorch's, which another version may have changed
        for group in list(c10d._world.pg_map):
            if group.size() > 1 and len(found) < _MOST_GROUPS:
                found[str(group.group_name)] = int(group._get_sequence_number_for_group())
    return found


def rank_of(environ: Mapping[str, str]) -> int:
    """This process' rank by its environment, 0 where that does not tell."""
    return int(environ.get("SLURM_PROCID") or environ.get("SUBMITIT_LOCAL_GLOBALID") or 0)


def node_of(environ: Mapping[str, str]) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextlib.contextmanager
def _stacks_go_to(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        print(f"hpcmm: {path} cannot be written ({error.strerror}); the rank runs without.", file=sys.stderr)
        yield
        return
    _open_stacks.append(file)
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        _open_stacks.pop()
        file.close()
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
                path.parent.rmdir()  # succeeds for the last rank of a job without failures
                path.parent.parent.rmdir()


def _record(error: Exception, path: Path, rank: int, node: str) -> None:
    now_ns = time.time_ns()
    kind = type(error).__qualname__
    if type(error).__module__ != "builtins":
        kind = f"{type(error).__module__}.{kind}"
    message = str(error)[: failures.MOST_CHARACTERS]
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this module's own frame
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines()
    cut = [line for line in lines[: -failures.MOST_LINES] if line[:1].strip()]  # what it was raised from stays
    lines = [*cut[-failures.MOST_LINES :], *lines[-failures.MOST_LINES :]]
    unreachable = unreachable_nodes() if kind_of_exception(kind, message, lines) in CONSEQUENCES else []
    try:
        failures.write(failures.RankError(rank, node, now_ns, kind, message, lines, unreachable, _step()), path)
    except OSError as problem:
        print(f"hpcmm: {path} cannot be written ({problem.strerror}).", file=sys.stderr)


def _step() -> int | None:
    """The step of ``hpcmm.annotate`` that the program was in last, if it has imported that."""
    ranges = sys.modules.get("hpcmm.annotate.ranges")
    try:
        return None if ranges is None else operator.index(ranges.step_begun())
    except TypeError:  # it was in none, or gave it another name than a number
        return None
