"""The all-reduce bandwidth between pairs of nodes, with gloo between CPUs and NCCL between GPUs."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from hpcmm.doctor.rendezvous import rounds_of_pairs

_SMALL_BYTES = 1 << 20
_LARGE_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
_ENOUGH_S = 0.1
"""A message is large enough when it takes so long."""

_REPEATS = 3


def pair_bandwidths(
    address: str, port: int, rank: int, count: int, timeout_s: float
) -> tuple[str, list[tuple[int, int, float]]]:
    """The backend, and (member, member, bytes a second) of the pairs that this member was in.

    Between two members an all-reduce of n bytes moves n bytes each way, so n / time is its bus bandwidth (the factor
    2 (p - 1) / p of nccl-tests' PERFORMANCE.md is 1 for p = 2). Raises RuntimeError when a member is lost meanwhile.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, count, is_master=rank == 0, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    try:
        return backend, [
            (*pair, _bandwidth(group, device, _LARGE_BYTES[backend]))
            for pairs in rounds_of_pairs(count)
            for pair, group in [(pair, dist.new_group(list(pair), timeout=timeout)) for pair in pairs]
            if rank in pair
        ]
    finally:
        dist.destroy_process_group()


def _bandwidth(group: dist.ProcessGroup, device: torch.device, most_bytes: int) -> float:
    size = _SMALL_BYTES
    took_s = _time(group, device, size)
    while took_s < _ENOUGH_S and size < most_bytes:  # both members see the slower time, so they agree
        size = min(most_bytes, size * 4)
        took_s = _time(group, device, size)
    return size / min(took_s, *(_time(group, device, size) for _ in range(_REPEATS - 1)))


def _time(group: dist.ProcessGroup, device: torch.device, size: int) -> float:
    """Seconds of one all-reduce of ``size`` bytes, of the slower member."""
    tensor = torch.ones(size // 4, device=device)
    dist.barrier(group)
    began = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = torch.tensor([time.perf_counter() - began], device=device, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group)
    return float(took)
