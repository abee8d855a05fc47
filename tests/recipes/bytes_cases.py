"""Each recipe trains a tiny model for three steps; what its ranks exchange in the third. On the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import cut_model
import torch.distributed as dist
from cut_cases import Case, config_of, forget_groups
from cut_model import SIZES, WIDTH, TinyTraining
from textbook import Held, bytes_of

from hpcmm.annotate import groups
from hpcmm.annotate.collectives import counted_bytes
from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import SequenceAttention
from hpcmm.train import engine as engines
from hpcmm.train.group_names import name_process_groups
from hpcmm.train.recipes import build
from hpcmm.train.throughput import bytes_by_axis

RANKS = 4
ROW = 8
"""The number of the one row that all steps and ranks train on: 20 tokens, 3 things of 6 rows for the encoder."""
TOKENS, LAYERS = 20, SIZES["num_hidden_layers"]
FEATURES = 3
"""Of each of two ranks that share the things: one has the thing of 3 rows, the other those of 1 and 2."""
EXPERTS = 4
"""Of a layer. Each token goes to all of them, so that they are spread evenly."""
CUT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DIVIDE_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""As for a model that is too large for a GPU: tiny parameters stay whole on each rank otherwise."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    mesh: dict[str, int] = field(default_factory=dict)
    zero: int = 0
    kind: str = "llama"
    ring: bool = False
    divide_all: bool = False
    encoders: str = "along"
    rounds: int = 1


RECIPES = {
    "ddp": Recipe(),
    "zero1": Recipe(zero=1),
    "zero2": Recipe(zero=2),
    "zero2 of three micro-batches": Recipe(zero=2, rounds=3),
    "zero3": Recipe(zero=3, divide_all=True),
    "zero3 of two micro-batches": Recipe(zero=3, divide_all=True, rounds=2),
    "zero3 of small parameters": Recipe(zero=3),
    "ulysses": Recipe({"sequence": 2}, 2),
    "ring": Recipe({"sequence": 2}, 2, ring=True),
    "pipeline": Recipe({"pipeline": 2}, 1),
    "tensor": Recipe({"tensor": 2}, 1),
    "tensor, replicated encoders": Recipe({"tensor": 2}, 1, encoders="replicated"),
    "3d": Recipe({"pipeline": 2, "tensor": 2}, 1),
    "expert": Recipe({"expert": 2}, 2, kind="mixtral"),
}


class OneRow(TinyTraining):
    """The same row again and again."""

    def batches(self, *_: int):
        while True:
            yield cut_model.batch(ROW)


def measure(rank: int, names: Sequence[str]) -> dict[str, tuple[dict[str, float], dict[str, int]]]:
    """Of each of these recipes what the rank exchanged in a step, and what it should be."""
    with patch.dict(cut_model.EXPERTS, num_experts_per_tok=EXPERTS):
        return {name: (_measured(rank, RECIPES[name]), _expected(rank, RECIPES[name])) for name in names}


def _measured(rank: int, recipe: Recipe) -> dict[str, float]:
    case, mesh = Case(recipe.kind, recipe.mesh, recipe.zero, clip=0.5, encoders=recipe.encoders), _mesh(recipe)
    config = config_of(replace(case, rounds=recipe.rounds), RANKS)
    config.parallel.attention = SequenceAttention.ring if recipe.ring else SequenceAttention.ulysses
    config.parallel.pipeline_layers = [1, 1] if mesh.pipeline > 1 else None
    training = OneRow(recipe.kind)
    groups._named.clear()  # those of the recipe before
    with ExitStack() as meanwhile:
        if recipe.divide_all:
            meanwhile.enter_context(_dividing_all())
        engine = build(training, config, mesh, rank)
    name_process_groups(mesh)
    batches = training.batches(engine.data_rank, mesh.data, 0)
    for _ in range(2):  # in which ZeRO 3 learns the order of the parameters, and tells the other ranks
        engine.step(batches)
    with counted_bytes() as exchanged:
        engine.step(batches)
    engine.destroy()
    forget_groups()
    dist.barrier()
    return bytes_by_axis(exchanged, mesh, rank)


def _dividing_all() -> Any:
    made = engines.deepspeed_config

    def divided(config: Any) -> dict[str, Any]:
        found = made(config)
        return {**found, "zero_optimization": {**found["zero_optimization"], **DIVIDE_ALL}}

    return patch.object(engines, "deepspeed_config", divided)


def _mesh(recipe: Recipe) -> Mesh:
    return Mesh.of(recipe.mesh, RANKS)


def _expected(rank: int, recipe: Recipe) -> dict[str, int]:
    mesh = _mesh(recipe)
    stage = mesh.coordinates(rank)["pipeline"]
    shared = experts = encoder = 0
    for name, parameter in TinyTraining(recipe.kind).model.named_parameters():
        if mesh.pipeline > 1 and _stage_of(name) != stage:
            continue
        if ".experts." in name:
            experts += parameter.numel() // mesh.expert
        elif name.startswith("trunk.") and name.split(".")[-2] in CUT:
            shared += parameter.numel() // mesh.tensor
        else:
            shared += parameter.numel()
        encoder += parameter.numel() if name.startswith("encoder.") and recipe.encoders == "replicated" else 0
    held = Held(
        shared=shared,
        experts=experts,
        layers=LAYERS // mesh.pipeline,
        tokens=TOKENS,
        width=WIDTH,
        per_token=EXPERTS,
        all_experts=EXPERTS,
        encoder=encoder,
        features=FEATURES,
        whole=shared if recipe.zero == 3 and not recipe.divide_all else 0,
    )
    return bytes_of(mesh, rank, recipe.zero, held, ring=recipe.ring, micro_batches=recipe.rounds)


def _stage_of(name: str) -> int:
    """Of two stages of a layer each."""
    return 1 if any(part in name for part in (".layers.1.", ".norm.", "lm_head")) else 0
