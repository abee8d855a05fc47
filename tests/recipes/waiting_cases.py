"""Two ranks, of which the first waits for the other in every way there is, and tells in what."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from hpcmm import annotate
from hpcmm.annotate.in_children.sitecustomize import exchanges
from hpcmm.node.recorder import exchange_of

LONGEST_S = 20.0


Waits = list[tuple[str, str, bool, int | None]]
"""Operation, name of the group, whether its number is told, and the peer."""


def told_of_each_wait(rank: int, expected: dict[str, Waits]) -> dict[str, Waits]:
    """Of rank 0, by the way in which it waits. It is looked at until it tells what is ``expected``."""
    tensor, plain = dist.new_group([0, 1]), dist.new_group([0, 1])
    annotate.name_group(tensor, "tensor")
    replica = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4), process_group=tensor)
    found = {}
    for name, call in _calls(tensor, plain, replica).items():
        if rank == 0:
            found[name] = _told_meanwhile(name, call, expected[name])
        else:
            _store().wait([name])
            call(rank)
    return found


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


looked = threading.Event()


def _told_meanwhile(name: str, call: Callable[[int], Any], expected: Waits) -> Waits:
    """What a thread beside tells of this one's waits within ``call``, before the other rank comes to it."""
    main, told = threading.get_ident(), list[Any]()

    def look() -> None:
        until_s = time.monotonic() + LONGEST_S
        while time.monotonic() < until_s:
            known = exchanges(sys._current_frames()[main])
            names = {group: mark[0] for group, mark in known["marks"].items()}
            told[:] = [(op, names.get(group, ""), n is not None, peer) for op, group, n, peer in known["waits"]]
            if told == expected:
                break
            time.sleep(0.02)
        _store().set(name, "")
        looked.set()

    looked.clear()
    beside = threading.Thread(target=look)
    beside.start()
    call(0)
    beside.join()
    return told


SLEEPS = "it has begun a collective, and does something else"


def _calls(tensor: Any, plain: Any, replica: Any) -> dict[str, Callable[[int], Any]]:
    ones = torch.ones(4)

    def work(_rank: int) -> None:
        begun = dist.all_reduce(ones, group=tensor, async_op=True)
        begun.wait()

    def passed(rank: int) -> None:
        operations = [dist.P2POp(dist.irecv if rank == 0 else dist.isend, torch.ones(4), 1 - rank, group=tensor)]
        for begun in dist.batch_isend_irecv(operations):
            begun.wait()

    def sleep(rank: int) -> None:
        begun = dist.all_reduce(ones, group=plain, async_op=True)
        if rank == 0:
            assert looked.wait(LONGEST_S)
        begun.wait()

    return {
        "a call": lambda _rank: dist.all_reduce(ones, group=tensor),
        "a group without a name": lambda _rank: dist.barrier(group=plain),
        "a receive": lambda rank: dist.recv(ones, 1) if rank == 0 else dist.send(ones, 0),
        "a work": work,
        "passed on": passed,
        "a tensor": lambda _rank: functional.wait_tensor(functional.all_reduce(ones, "sum", tensor)),
        "backward": lambda _rank: replica(torch.ones(2, 4)).sum().backward(),
        SLEEPS: sleep,
    }


def told_of_a_wait_in_vain(rank: int) -> str:
    """What rank 0 tells of an exchange that the other rank did not come to, once its groups are gone."""
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    annotate.name_group(pair, "tensor")
    if rank == 1:
        _store().wait(["over"])
        return ""
    try:
        dist.all_reduce(torch.ones(4), group=pair)
    except RuntimeError as error:
        _store().set("over", "")
        return exchange_of(error)
    return "it did not wait"
