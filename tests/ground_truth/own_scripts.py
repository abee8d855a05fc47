"""Scripts of ``scripts/`` whose verdict is known: four ranks, most often on two nodes, launched as a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnScript:
    """One recording. The first row's cause matches ``cause``; a rank is named only if ``rank`` is not None."""

    command: Sequence[str]
    cause: str
    rank: int | None = None
    advice: str = ""
    """A word of the suggestion."""
    nodes: int = 2
    throttle: Sequence[str] = ()
    """Words of ``slurm/local/fault throttle``: node, rate, options."""
    node: str = ""
    """That the first row names without a rank."""
    also: Sequence[tuple[str, int]] = ()
    """Causes and ranks of further rows, which name nobody else then."""


SCRIPTS: dict[str, OwnScript] = {
    "solo_rank_0": OwnScript(
        command=["solo_work.py", "rank_0"], cause="work of rank 0 alone in steps 6, 13, 20, 27", rank=0, advice="share"
    ),
    "solo_named": OwnScript(
        command=["solo_work.py", "named"],
        cause="evaluation of rank 3 alone in steps 8, 19",
        rank=3,
        advice="DistributedSampler",
    ),
    "solo_first_of_node": OwnScript(
        command=["solo_work.py", "first_of_node"], cause="work of ranks 0, 2 alone in steps 9, 19, 29", advice="share"
    ),
    "solo_broadcast": OwnScript(
        command=["solo_work.py", "broadcast"], cause="work of rank 0 alone in steps 9, 19, 29", rank=0, advice="share"
    ),
    "solo_stall": OwnScript(command=["solo_work.py", "stall"], cause="stall", rank=2, advice="dmesg"),
    "heavy_stage": OwnScript(
        command=["pipeline.py", "gpipe", "8", "14"],
        cause="pipeline stage 1 is heavier than stage 0 by ",
        advice="to stage 0",
    ),
    "interleaved_stages": OwnScript(
        command=["pipeline.py", "interleaved", "14", "8"],
        cause="pipeline stage 0 is heavier than stage 1 by ",
        advice="to stage 1",
    ),
    "even_stages": OwnScript(
        command=["pipeline.py", "gpipe", "8", "8"], cause="pipeline bubble", advice="micro-batches"
    ),
    "uneven_experts": OwnScript(
        command=["experts.py", "2", "0.6"], cause="expert imbalance", rank=2, advice="router_aux_loss_coef"
    ),
    "small_messages": OwnScript(
        command=["messages.py", "small"],
        cause="communication transfer of small messages, bound by latency",
        advice="fuse",
    ),
    "sharded": OwnScript(
        command=["messages.py", "sharded"],
        cause="communication transfer of sharded parameters",
        advice="reshard_after_forward",
    ),
    "slow_link_and_loading": OwnScript(
        command=["loading.py", "1", "0.06"],
        throttle=["node2", "100mbit"],
        cause="communication transfer",
        node="node2",
        also=[("data loading", 1)],
        advice="srun -w node2",
    ),
    "slow_link_and_loading_of_four": OwnScript(
        command=["loading.py", "3", "0.06"],
        nodes=4,
        throttle=["node2", "100mbit"],
        cause="communication transfer",
        node="node2",
        also=[("data loading", 3)],
        advice="srun -w node2",
    ),
    "slow_to_send": OwnScript(
        command=["loading.py", "-1", "0"],
        throttle=["node1", "100mbit", "--only", "send"],
        cause="communication transfer",
        node="node1",
        advice="srun -w node1",
    ),
    "slow_to_receive": OwnScript(
        command=["loading.py", "-1", "0"],
        nodes=4,
        throttle=["node3", "100mbit", "--only", "receive"],
        cause="communication transfer",
        advice="hpcmm.doctor",
    ),
}
