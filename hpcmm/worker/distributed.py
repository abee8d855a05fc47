"""GPU or CPU, and one process group over all ranks of the job: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.worker.environment import RankEnvironment, threads_per_rank

DEVICES = Path("/dev")


def select_accelerator() -> str:
    """``cuda`` if this process sees a GPU that works, else ``cpu``; DeepSpeed is told through DS_ACCELERATOR.

    A scheduler may set CUDA_VISIBLE_DEVICES on nodes whose GPUs PyTorch cannot drive, so PyTorch is asked.
    """
    if not any(DEVICES.glob("nvidia[0-9]*")):
        # PyTorch complains of the driver's library, which nsys brings along on machines without a GPU.
        warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = accelerator
    return accelerator


BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_LAST_TENSORS_S = 0.1


@contextlib.contextmanager
def process_group(rank_env: RankEnvironment, config: RunConfig, metrics: MetricsWriter) -> Iterator[torch.device]:
    """Join the job's process group, leave it at the end. Yields this rank's device.

    Raises HpcmmError when not all ranks arrive within ``parallel.rendezvous_timeout_s``.
    """
    rank_env.export()
    device = _own_device(rank_env)
    _set_threads(config)
    with metrics.startup("rendezvous"):
        _rendezvous(rank_env, config, BACKENDS[device.type])
    try:
        with _timeout_of_later_groups(timedelta(seconds=config.parallel.collective_timeout_s)):
            yield device
    finally:
        leave_group()


def leave_group() -> None:
    """Destroy this process's groups, so that it can end.

    A backend's thread drops the tensors of the last collective only once it holds the interpreter's lock. Groups that
    something still refers to (default arguments of ``torch.distributed.nn``, DeepSpeed's own groups) keep their
    threads, and a process whose interpreter shuts down before that is aborted. So they get the lock for a moment.
    """
    dist.destroy_process_group()
    time.sleep(_LAST_TENSORS_S)


@contextlib.contextmanager
def _timeout_of_later_groups(timeout: timedelta) -> Iterator[None]:
    """Give groups that are made without a timeout this one.

    ZeRO reduces gradients in groups that DeepSpeed makes so; PyTorch would let them wait for half an hour.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def _own_device(rank_env: RankEnvironment) -> torch.device:
    if select_accelerator() == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A scheduler that binds each rank to its GPU shows it that one alone, as number 0.
    number = 0 if visible == 1 else rank_env.local_rank
    if number >= visible:
        raise HpcmmError(
            f"Rank {rank_env.rank} is number {rank_env.local_rank} on {rank_env.node}, which shows it {visible} GPUs."
        )
    torch.cuda.set_device(number)
    os.environ["LOCAL_RANK"] = str(number)  # DeepSpeed takes its device from it
    return torch.device("cuda", number)


def _set_threads(config: RunConfig) -> None:
    torch.set_num_threads(threads_per_rank(config))


def _rendezvous(rank_env: RankEnvironment, config: RunConfig, backend: str) -> None:
    import deepspeed  # noqa: PLC0415 -- reads DS_ACCELERATOR when it is imported

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    wait_s = config.parallel.rendezvous_timeout_s
    where = f"{rank_env.master_addr}:{rank_env.master_port}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            rank_env.master_addr,
            rank_env.master_port,
            rank_env.world_size,
            is_master=rank_env.rank == 0,
            timeout=timedelta(seconds=wait_s),
        )
        dist.init_process_group(
            backend,
            store=PrefixStore("default", store),
            rank=rank_env.rank,
            world_size=rank_env.world_size,
            timeout=timedelta(seconds=config.parallel.collective_timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if rank_env.rank == 0 and "EADDRINUSE" in str(error):
            raise HpcmmError(
                f"Rank 0 cannot listen for the others at {where} (EADDRINUSE): after the job found that port free, "
                f"another process on {rank_env.node} took it. See `ss -tlnp` there, and submit the job again."
            ) from error
        raise HpcmmError(
            f"Rank {rank_env.rank} on {rank_env.node} did not meet the other ranks at {where} within {wait_s} s: did "
            f"all {rank_env.world_size} start (see the others' logs), and does {rank_env.master_addr} resolve "
            f"on {rank_env.node}?"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
