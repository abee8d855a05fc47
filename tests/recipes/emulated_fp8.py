"""fp8 on a processor: torchao rounds as a GPU rounds, and multiplies in float32. On the ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cells import Cell, ManyConversations
from cut_cases import Case, Found, check, config_of, forget_groups
from cut_model import TinyTraining
from torch.multiprocessing.reductions import StorageWeakRef

from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import Precision
from hpcmm.train.engine import WholeEngine, deepspeed_config
from hpcmm.train.precision import multiply_in_fp8
from hpcmm.train.recipes import build

RANKS = 2
STEPS = 5
PACKAGES = Path(sys.prefix) / "fp8"
"""Where ``scripts/setup.sh`` puts torchao."""
IS_INSTALLED = PACKAGES.is_dir() or find_spec("torchao") is not None
CPU = torch.device("cpu")
CORE = [Case("llama", {}, 3, "all and lora", clip=0.5, precision="fp8", resume=True)]
REST = [
    Case("qwen3", {}, 3, rounds=2, precision="fp8", checkpointing=True),
    Case("mixtral", {"expert": 2}, 1, precision="fp8", resume=True),
    Case("qwen3_moe", {"expert": 2}, 3, precision="fp8"),
    Case("llama", {"sequence": 2}, 2, precision="fp8", encoders="replicated"),
    Case("tied", {}, 0, "encoder frozen", precision="fp8"),
]
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
"""So that ZeRO stage 3 lets go of a tiny model's parameters, too, as it does of a large one's."""


def check_cases(rank: int, cases: Sequence[Case], folder: str) -> list[Found]:
    """As of any precision."""
    if find_spec("torchao") is None:
        sys.path.append(str(PACKAGES))
    return check(rank, list(cases), folder)


def on_ranks(rank: int, folder: str) -> dict[str, Any]:
    """What the tests look at in each run."""
    return {
        "cases": check_cases(rank, CORE, folder),
        "omni": [conversations(rank, "zero2", Precision.bf16), conversations(rank, "pipeline", Precision.fp8)],
        "maps": {kind: maps_of(kind, variant) for kind, variant in (("llama", "all and lora"), ("mixtral", ""))},
        "kept": weights_that_stay(rank),
    }


def in_fp8(training: Any, config: Any) -> int:
    return multiply_in_fp8(training, config, CPU, emulated=True)


def conversations(rank: int, row: str, precision: Precision) -> tuple[list[float], list[str]]:
    """The losses of all ranks' steps of a tiny omni-modal model, and the names of its weights; rank 0's."""
    config = Cell(row).config()
    config.parallel.precision = precision  # which is refused for a processor
    training = ManyConversations(config)
    if precision is Precision.fp8:
        in_fp8(training, config)
    engine = build(training, config, Mesh.of(config.parallel.mesh, RANKS), rank)
    batches = training.batches(engine.data_rank, engine.mesh.data, 0)
    losses = []
    for _ in range(STEPS):
        values = engine.step(batches)
        sums = torch.tensor([values["loss"] * values["tokens"], values["tokens"]], dtype=torch.float64)
        dist.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
    names = sorted(engine.weights())
    engine.destroy()
    forget_groups()
    return losses, names


def maps_of(kind: str, variant: str) -> dict[str, Any]:
    """Which modules multiply in fp8, and whether the model has the parameters that it had, by the same names."""
    training = TinyTraining(kind, variant)
    network = training.model.trunk.lm
    network.model.layers[1].mlp.requires_grad_(kind != "llama")
    before = dict(training.model.state_dict(keep_vars=True))
    count = in_fp8(training, config_of(Case(kind, {}, 2, variant, precision="fp8"), RANKS))
    after = training.model.state_dict(keep_vars=True)
    converted = [name for name, each in training.model.named_modules() if type(each).__name__ == "Float8Linear"]
    same = list(before) == list(after) and all(before[name] is value for name, value in after.items())
    return {"converted": converted, "count": count, "same": same}


def weights_that_stay(rank: int) -> tuple[int, int]:
    """How many whole weights are still there between a forward and a backward pass at ZeRO stage 3, and of how many."""
    config = config_of(Case("llama", {}, 3, precision="fp8"), RANKS)
    training = TinyTraining("llama")
    in_fp8(training, config)
    zero = deepspeed_config(config)["zero_optimization"] | NOTHING_KEPT
    engine = WholeEngine(training, config, Mesh(data=RANKS), rank, settings={"zero_optimization": zero})
    whole: list[StorageWeakRef] = []
    for each in training.model.modules():
        if type(each).__name__ == "Float8Linear":
            each.register_forward_hook(
                lambda module, *_: whole.append(StorageWeakRef(module.weight.untyped_storage())), prepend=True
            )
    loss = training.loss(engine.deepspeed, next(training.batches(rank, RANKS, 0)))[0]
    left = sum(not each.expired() for each in whole)
    engine.deepspeed.backward(loss)
    engine.destroy()
    forget_groups()
    return left, len(whole)
