"""Every recipe against one process: the cells of the table recipe x precision x what trains x mesh.

Each cell trains the same tiny omni-modal model from the same seed on real ranks, and its losses are those of a plain
loop of PyTorch in one process; or it is refused before submission. ``python tests/recipes/cells.py`` runs all cells, and
writes the table of ``docs/recipes.md``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from real_ranks import RanksFailedError, run_ranks

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError

if TYPE_CHECKING:
    from hpcmm.config.schema import RunConfig

STEPS = 4
GLOBAL_BATCH = 24
"""Examples of a step, whatever the mesh: what every number of data ranks and micro-batches here divides."""
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
"""The largest deviation of a step's loss from that of one process, relative."""
CELL_S = 150
"""Seconds after which a cell hangs."""

MESHES = {
    "ddp": ["parallel=ddp"],
    "zero1": ["parallel=zero1"],
    "zero2": ["parallel=zero2"],
    "zero3": ["parallel=zero3"],
    "zero3_offload": ["parallel=zero3_offload"],
    "ulysses": ["parallel=ulysses"],
    "ulysses, zero3": ["parallel=ulysses", "parallel.zero_stage=3"],
    "ring": ["parallel=ring"],
    "ring of 3": ["parallel=ring", "parallel.mesh.sequence=3"],
    "pipeline": ["parallel=pipeline"],
    "pipeline, zero2": ["parallel=pipeline", "parallel.zero_stage=2"],
    "tensor": ["parallel=tensor"],
    "tensor, zero3": ["parallel=tensor", "parallel.zero_stage=3"],
    "tensor, replicated encoders": ["parallel=tensor", "parallel.encoders=replicated"],
    "zero3, replicated encoders": ["parallel=zero3", "parallel.encoders=replicated"],
    "expert": ["parallel=expert"],
    "expert, zero3": ["parallel=expert", "parallel.zero_stage=3"],
    "expert x tensor": ["parallel=expert", "parallel.mesh.tensor=2", "parallel.zero_stage=1"],
    "3d": ["parallel=3d"],
    "sequence x tensor": ["parallel.mesh={sequence: 2, tensor: 2}"],
}
"""The rows of the table: a recipe, or a mesh of one's own."""
RANKS = {
    "pipeline x data": ("pipeline", 4),
    "tensor x data": ("tensor", 4),
    "sequence x data": ("ulysses", 4),
    "ring x data": ("ring", 4),
    "expert 2 of 4": ("expert", 4),
}
"""Rows of more ranks than a mesh needs: the rest is the data axis."""
TRAINED = {
    "all": [],
    "connectors": ["model.language_model.frozen=true"],
    "LoRA": ["model.language_model.frozen=true", "model.language_model.lora_rank=2"],
}
FEATURES = {
    "": [],
    "accumulation": ["train.gradient_accumulation_steps=3"],
    "recomputed activations": ["parallel.activation_checkpointing=true"],
}


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    row: str
    precision: str = "fp32"
    trained: str = "all"
    feature: str = ""

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        if self.row in RANKS:
            return RANKS[self.row][1]
        return {"3d": 4, "ring of 3": 3, "expert x tensor": 4, "sequence x tensor": 4}.get(self.row, 2)

    def overrides(self) -> list[str]:
        """The configuration as a user would write it."""
        experts = "expert" in self.row
        return [
            "task=omni",
            "cluster=local",
            f"cluster.ranks_per_node={self.ranks}",
            "model.language_model.kind=tiny",
            f"model.language_model.architecture={'mixtral' if experts else 'llama'}",
            *MESHES[RANKS[self.row][0] if self.row in RANKS else self.row],
            f"parallel.precision={self.precision}",
            *TRAINED[self.trained],
            *FEATURES[self.feature],
            "train.warmup_steps=0",
            "train.schedule=constant",
            "train.learning_rate=0.05",
            "train.gradient_clip=1.0",
            "train.seed=5",
        ]

    def config(self) -> RunConfig:
        """Composed and validated. Raises HpcmmError if the cell is refused."""
        config = compose_run(self.overrides())
        validate(config)
        return config

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.row, self.precision, self.trained, self.feature)))


def all_cells() -> Iterator[Cell]:
    """The whole table."""
    for row, precision, trained in itertools.product([*MESHES, *RANKS], ("fp32", "bf16"), TRAINED):
        yield Cell(row, precision, trained)
    for row, feature in itertools.product([*MESHES, *RANKS], [each for each in FEATURES if each]):
        yield Cell(row, feature=feature)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    refusal: str = ""
    deviation: float = 0.0
    """The largest relative difference of a step's loss from that of one process."""

    def holds(self, cell: Cell) -> bool:
        return not self.refusal and self.deviation <= TOLERANCE[cell.precision]


def run(cell: Cell) -> Outcome:
    """Raises RanksFailedError if a rank fails, or the cell hangs."""
    try:
        config = cell.config()
    except HpcmmError as error:
        return Outcome(refusal=str(error))
    losses = run_ranks(cell.ranks, trained_losses, config, timeout_s=CELL_S)
    (alone,) = run_ranks(1, losses_of_one_process, config, timeout_s=CELL_S)
    together = [sum(total for total, _ in step) / sum(tokens for _, tokens in step) for step in zip(*losses, strict=True)]
    return Outcome(deviation=max(abs(a - b) / b for a, b in zip(together, alone, strict=True)))


def trained_losses(rank: int, config: RunConfig) -> list[tuple[float, int]]:
    """On a rank: of each step its loss times its tokens, and its tokens."""
    import torch  # noqa: PLC0415

    from hpcmm.config.recipe import recipe_of  # noqa: PLC0415
    from hpcmm.train.recipes import build  # noqa: PLC0415

    training = training_of(config)
    engine = build(training, config, recipe_of(config).mesh(config), rank)
    batches = training.batches(engine.data_rank, engine.mesh.data, 0)
    steps = [engine.step(batches) for _ in range(STEPS)]
    del torch
    return [(values["loss"] * values["tokens"], int(values["tokens"])) for values in steps]


def losses_of_one_process(_rank: int, config: RunConfig) -> list[float]:
    """The plain loop: the loss of each step's whole batch, a mean over its tokens."""
    import torch  # noqa: PLC0415

    from hpcmm.config.schema import Precision  # noqa: PLC0415
    from hpcmm.train.engine import build_optimizer  # noqa: PLC0415

    training = training_of(config)
    if config.parallel.precision is Precision.bf16:
        training.model.bfloat16()
    masters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    found = []
    del torch, build_optimizer, masters
    return found


def training_of(config: RunConfig) -> Any:
    """Random conversations to a tiny model."""
    raise NotImplementedError


def main(arguments: Sequence[str]) -> int:
    """Run the cells whose names hold all of ``arguments``, and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only cells whose names hold all of these")
    words = parser.parse_args(arguments).words
    wrong = 0
    for cell in all_cells():
        if not all(word in str(cell).split(", ") for word in words):
            continue
        try:
            outcome = run(cell)
            said = f"refused: {outcome.refusal}" if outcome.refusal else f"deviation {outcome.deviation:.1e}"
            wrong += not outcome.refusal and not outcome.holds(cell)
        except RanksFailedError as error:
            said, wrong = f"FAILED: {error}", wrong + 1
        print(f"{cell}: {said}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
