"""The faults whose verdict is known: how each is put into a real run, and what the first row must say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One recording. The first row's cause begins with ``cause``; ``rank`` and ``node`` are named, and nobody else.

    ``also`` are causes, ranks and nodes that further rows name, in any order.
    """

    injected: Sequence[dict[str, Any]] = ()
    """Faults of ``inject/sitecustomize.py``, within the ranks."""
    overrides: Sequence[str] = ()
    """Further overrides of the launch command."""
    throttle: tuple[str, str] | None = None
    """Node and rate of its link."""
    stops: Sequence[tuple[int, float, int]] = ()
    """Rank, seconds of SIGSTOP, and the step after which it comes, each."""
    cut: tuple[str, float, int] | None = None
    """Node, seconds without a link, and the step after which that comes."""
    crowd: tuple[int, int] | None = None
    """Rank that is bound to one core, and how many busy processes share it."""
    cause: str = ""
    rank: int | None = None
    node: str = ""
    phase: str = ""
    also: Sequence[tuple[str, int | None, str]] = ()


def _burn(at: str, seconds: float, **when: Any) -> dict[str, Any]:
    return {"at": at, "do": "burn", "seconds": seconds, **when}


def _sleep(at: str, seconds: float, **when: Any) -> dict[str, Any]:
    return {"at": at, "do": "sleep", "seconds": seconds, **when}


FAULTS: dict[str, Fault] = {
    "clean": Fault(),
    "slow_forward": Fault(
        injected=[_burn("forward", 0.3, ranks=[5])], cause="computation", rank=5, node="node3", phase="forward"
    ),
    "slow_data": Fault(
        injected=[_sleep("data", 0.5, ranks=[3])], cause="data loading", rank=3, node="node2", phase="data"
    ),
    "slow_link": Fault(throttle=("node3", "100mbit"), cause="communication transfer", node="node3"),
    "child_process": Fault(
        injected=[{"at": "forward", "do": "wait", "seconds": 0.4, "ranks": [4]}],
        cause="waiting for a child process",
        rank=4,
        node="node3",
        phase="forward",
    ),
    "checkpoint": Fault(
        injected=[_sleep("save", 1.5, ranks=[1])],
        overrides=["train.checkpoint_every=4"],
        cause="checkpoint",
        rank=1,
        node="node1",
        phase="checkpoint",
    ),
    "stopped": Fault(stops=[(6, 2.0, 5)], cause="stall", rank=6, node="node4"),
    "long_batches": Fault(
        injected=[{"at": "batch", "do": "enlarge", "factor": 3, "ranks": [7]}],
        cause="longer batches",
        rank=7,
        node="node4",
    ),
    "uneven_batches": Fault(
        injected=[{"at": "batch", "do": "enlarge", "factor": [1, 1, 2, 3]}],
        cause="uneven batches",
    ),
    "slow_node": Fault(
        injected=[_burn("forward", 0.2, node="node2"), _burn("backward", 0.2, node="node2")],
        cause="computation on a slow node",
        node="node2",
    ),
    # These were first tried on an analysis that had been made without them.
    "every_fourth_step": Fault(
        injected=[_sleep("forward", 0.7, ranks=[6], every=4)],
        overrides=["train.steps=20"],
        cause="computation",
        rank=6,
        node="node4",
        phase="forward",
    ),
    "two_faults": Fault(
        injected=[_burn("forward", 0.3, ranks=[1]), _sleep("data", 0.6, ranks=[6])],
        overrides=["train.steps=14"],
        cause="computation",
        rank=1,
        node="node1",
        phase="forward",
        also=[("data loading", 6, "node4")],
    ),
    "slow_data_node": Fault(
        injected=[_sleep("data", 0.5, node="node3")],
        overrides=["train.steps=14"],
        cause="data loading on a slow node",
        node="node3",
        phase="data",
    ),
    "slow_loader_process": Fault(
        injected=[_sleep("fetch", 2.5, ranks=[4])],
        overrides=["train.steps=14", "data.num_workers=1"],
        cause="data loading",
        rank=4,
        node="node3",
        phase="data",
    ),
    "slow_checkpoints": Fault(
        injected=[_sleep("save", 1.0)],
        overrides=["train.steps=14", "train.checkpoint_every=4"],
        cause="checkpoint on all ranks",
        also=[("checkpoint", 0, "node1")],  # which writes the model besides its own part
    ),
    "between": Fault(
        injected=[_sleep("between", 0.4, ranks=[5])],
        overrides=["train.steps=14"],
        cause="work between steps",
        rank=5,
        node="node3",
    ),
    "two_stops": Fault(
        stops=[(2, 2.0, 4), (7, 2.0, 9)],
        overrides=["train.steps=14"],
        cause="stall",
        rank=7,
        node="node4",
        also=[("stall", 2, "node2")],
    ),
}
