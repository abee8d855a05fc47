"""In the rank: leave a record of the exception that ends it, and its threads' stacks when it is told to end."""

from __future__ import annotations

import contextlib
import faulthandler
import operator
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from hpcmm.errors import ScriptExitError
from hpcmm.node.classify import CONSEQUENCES, kind_of_exception
from hpcmm.node.network import unreachable_nodes
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir

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
