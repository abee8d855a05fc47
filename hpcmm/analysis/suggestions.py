"""What to try against each kind of loss: an override of this project's configuration, or a shell line.

Each is explained in ``docs/bottlenecks.md`` under the name of its kind. Of a run that hpcmm did not launch nothing is
known but its reports, so that its suggestions are shell lines, or advice in words. Where hpcmm launched a script of the
user's, the keys of the cluster are right, and only these.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hpcmm.analysis.findings import Finding


def suggest(finding: Finding, config: Mapping[str, Any]) -> str:
    """One override or command for ``finding``.

    ``config`` is what decides how the run's ranks ran: its configuration, of it the section ``cluster`` alone where it
    ran a script of the user's, or empty where there is none.
    """
    trains = bool(config) and set(config) != {"cluster"}
    if finding.kind in {"stall", "subprocess", "interruption"} or (finding.kind == "transfer" and finding.node):
        return _shell(finding)
    if finding.kind in _GPU_ADVICE and not (trains and finding.kind in _HELPED_BY_LARGER_BATCHES):
        return _GPU_ADVICE[finding.kind]
    scheduled = finding.kind == "imbalance" or (finding.kind == "compute" and finding.node != "")
    return _override(finding, config) if trains or (config and scheduled) else _advice(finding)


def _shell(finding: Finding) -> str:
    match finding.kind:
        case "stall":
            return f"srun -w {shlex.quote(finding.node)} dmesg -T | grep -iE 'throttl|oom|hung|link'"
        case "interruption":
            return "srun --ntasks-per-node=1 sh -c 'hostname; ip -s link; dmesg -T | grep -i link | tail'"
        case "transfer":
            return f"srun -w {shlex.quote(finding.node)} sh -c 'ip -s link; tc -s qdisc'"
        case _:
            return "grep 'within step' analysis/waitpid.csv"


_GPU_ADVICE = {
    "gpu_host": "a larger micro-batch, or fewer launches: torch.compile(model, mode='reduce-overhead')",
    "gpu_sync": "no .item(), .cpu(), print or torch.cuda.synchronize() in the step; copies with non_blocking=True",
    "gpu_order": "let streams wait for one another only where they must; fewer, larger kernels: torch.compile(model)",
    "gpu_copy": "pinned memory and copies beside the computation: DataLoader(pin_memory=True), non_blocking=True",
    "gpu_wait": "give each GPU as much to do as the others, by the cost of batches, experts or layers",
}


_HELPED_BY_LARGER_BATCHES = {"gpu_host", "gpu_sync", "gpu_order"}
"""More work a launch, for a run whose batch is a key of ours."""


def _override(finding: Finding, config: Mapping[str, Any]) -> str:  # noqa: PLR0911 -- one answer a kind
    match finding.kind:
        case "data":
            return f"data.num_workers={max(2, 2 * _number(config, 'data', 'num_workers', 0))}"
        case "compute" if finding.node:
            return f"cluster.exclude={_excluded(config, finding.node)}"
        case "batch" | "uneven" | "gpu_host" | "gpu_sync" | "gpu_order":
            return f"train.micro_batch_size={2 * max(1, _number(config, 'train', 'micro_batch_size', 1))}"
        case "checkpoint":
            return f"train.checkpoint_every={max(4 * _number(config, 'train', 'checkpoint_every', 0), 100)}"
        case "transfer":
            # Fewer synchronisations a sample; it costs nothing but memory for the accumulated gradients.
            rounds = max(1, _number(config, "train", "gradient_accumulation_steps", 1))
            return f"train.gradient_accumulation_steps={2 * rounds}"
        case "imbalance":
            return f"cluster.cpus_per_rank={_number(config, 'cluster', 'cpus_per_rank', 1) + 1}"
        case _:
            return f"train.log_every={max(4 * _number(config, 'train', 'log_every', 10), 50)}"


def _advice(finding: Finding) -> str:  # noqa: PLR0911 -- one answer a kind
    match finding.kind:
        case "data":
            return "load in processes beside the training: torch.utils.data.DataLoader(..., num_workers=2)"
        case "compute" if finding.node:
            return f"sbatch --exclude={shlex.quote(finding.node)} ..."
        case "batch" | "uneven":
            return "bucket examples by length, or share them out over the ranks by their cost"
        case "checkpoint":
            return "save less often, or from a thread of its own"
        case "transfer":
            return "accumulate gradients over more micro-batches before they are exchanged"
        case "imbalance":
            return "sbatch --cpus-per-task=N --hint=nomultithread ... with more cores a rank"
        case "other":
            return "with annotate.phase(...) around each part of the step, the next capture tells which part it is"
        case _:
            return "log and evaluate less often"


def _excluded(config: Mapping[str, Any], node: str) -> str:
    """The run's own excluded nodes and this one, as one word of Hydra's grammar."""
    cluster = config.get("cluster")
    before = cluster.get("exclude") if isinstance(cluster, Mapping) else None
    nodes = f"{before},{node}" if isinstance(before, str) and before else node
    if all(character.isalnum() or character in "_-." for character in nodes):
        return nodes
    # Within quotes Hydra takes anything; the shell gets the whole as one word.
    text = nodes.replace("\\", "\\\\").replace("'", "\\'")
    return shlex.quote(f"'{text}'")


def _number(config: Mapping[str, Any], section: str, key: str, default: int) -> int:
    value = config.get(section)
    value = value.get(key, default) if isinstance(value, Mapping) else default
    return value if isinstance(value, int) and not isinstance(value, bool) else default
