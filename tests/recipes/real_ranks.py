"""Real ranks on gloo for many short trials: each rank is forked from a server that has imported the heavy packages.

A process that imports PyTorch, DeepSpeed and transformers itself takes six seconds of a core before its first step.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["preloaded"]
_FOREVER = 10**6


class RanksFailedError(AssertionError):
    """A rank raised, ended early, or all were still at work at the end of their time."""


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """``function(rank, *arguments)`` on each of ``world`` ranks in one process group; what they return, by rank.

    Raises RanksFailedError with the first rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    _start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, world, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        return _outcomes(ends, timeout_s)
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _start_server() -> None:
    """With this folder on its path, which Python 3.11 does not hand on, and then imports nothing without a word."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _outcomes(ends: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(ends):
        left = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank for rank in range(len(ends)) if rank not in results]
            raise RanksFailedError(f"ranks {silent} were still at work after {timeout_s} s: they hang.")
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                worked, value = end.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RanksFailedError(f"rank {rank} ended without a result.") from None
            if not worked:
                raise RanksFailedError(f"rank {rank} of {len(ends)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]


def _rank(
    end: Connection, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        with _in_group(rank, world, port):
            value = function(rank, *arguments)
        end.send((True, value))
    except BaseException:
        end.send((False, traceback.format_exc()))
    finally:
        end.close()
        os._exit(0)  # at a normal end DeepSpeed's and gloo's threads may abort the process


@contextlib.contextmanager
def _in_group(rank: int, world: int, port: int) -> Iterator[None]:
    import deepspeed
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, _quiet(Path(folder)):
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield
        dist.barrier()


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """DeepSpeed and gloo print to the process' own output, some of it from C++."""
    output = os.open(folder / "output", os.O_RDWR | os.O_CREAT, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    yield
