"""Every recipe against one process: the cells of the table recipe x precision x what trains x mesh.

Each cell trains the same tiny omni-modal model from the same seed on real ranks, and its losses are those of a plain
loop of PyTorch in one process; or it is refused before submission. ``python tests/recipes/cells.py`` runs all of
them, and ``--write`` puts the table into ``docs/recipes_table.md``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from real_ranks import RanksFailedError, run_ranks
from tiny_omni import random_example
from torch import Tensor, nn

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.train.optimizers import build_optimizer
from hpcmm.train.structure import Structure
from hpcmm.train.workload import Training, trained_parameters
from hpcmm.workloads.omni.data.batch import Batch, pack
from hpcmm.workloads.omni.models import OmniModel, build_model

if TYPE_CHECKING:
    from hpcmm.config.schema import RunConfig

STEPS = 5
GLOBAL_BATCH = 24
"""Examples of a step, whatever the mesh: what every number of data ranks and micro-batches here divides."""
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-3}
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
CLIP = (1e9, 0.5)
"""The largest norm of the gradients, without and with clipping."""
FEATURES = {
    "": [],
    "clipping": [],
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
            "optimizer=sgd",  # Adam hides a wrong scale of the gradients, and so does clipping
            "train.learning_rate=0.3",
            f"train.gradient_clip={CLIP[self.feature == 'clipping']}",
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
    """Why it was refused, and what to do instead; empty if it was not."""
    deviation: float = 0.0
    """The largest relative difference of a step's loss from that of one process."""
    learnt: float = 0.0
    """By what part the loss of one process changed over the steps: what a wrong gradient would make another change."""

    def holds(self, cell: Cell) -> bool:
        return not self.refusal and self.deviation <= TOLERANCE[cell.precision] < self.learnt / 2


def run(cell: Cell) -> Outcome:
    """Raises RanksFailedError if a rank fails, or the cell hangs."""
    try:
        config = cell.config()
    except HpcmmError as error:
        return Outcome(refusal=str(error))
    losses = run_ranks(cell.ranks, trained_losses, config, timeout_s=CELL_S)
    alone = alone_losses(config)
    together = [
        sum(total for total, _ in step) / sum(tokens for _, tokens in step) for step in zip(*losses, strict=True)
    ]
    deviation = max(abs(a - b) / b for a, b in zip(together, alone, strict=True))
    return Outcome(deviation=deviation, learnt=abs(alone[-1] - alone[0]) / alone[0])


_alone: dict[str, list[float]] = {}


def alone_losses(config: RunConfig) -> list[float]:
    """Those of one process, once for all cells that train the same: the mesh and the micro-batches change nothing."""
    key = repr((config.model, config.optimizer, config.train.gradient_clip, config.train.learning_rate))  # type: ignore[attr-defined]
    if key not in _alone:
        (_alone[key],) = run_ranks(1, losses_of_one_process, config, timeout_s=CELL_S)
    return _alone[key]


def trained_losses(rank: int, config: Any) -> list[tuple[float, int]]:
    """On a rank: of each step its loss times its tokens, and its tokens."""
    from hpcmm.config.recipe import recipe_of
    from hpcmm.train.recipes import build

    training = ManyConversations(config)
    engine = build(training, config, recipe_of(config).mesh(config), rank)
    batches = training.batches(engine.data_rank, engine.mesh.data, 0)
    steps = [engine.step(batches) for _ in range(STEPS)]
    return [(values["loss"] * values["tokens"], int(values["tokens"])) for values in steps]


def losses_of_one_process(_rank: int, config: Any) -> list[float]:
    """PyTorch alone, in float32: the loss of each step's whole batch, a mean over its tokens."""
    training = ManyConversations(config)
    optimizer = build_optimizer(config, training.model, training.parameter_groups())
    batches = training.batches(0, 1, 0)
    found = []
    for _ in range(STEPS):
        micro_batches = list(itertools.islice(batches, config.train.gradient_accumulation_steps))
        tokens = sum(batch.labelled for batch in micro_batches)
        losses = [training.model(batch).total / tokens for batch in micro_batches]
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(trained_parameters(training.model), config.train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(sum(losses)))
    return found


class ManyConversations(Training):
    """The same random conversations for every mesh, to the same tiny model."""

    model: OmniModel

    def __init__(self, config: Any, device: torch.device | None = None) -> None:
        del device
        self._config = config
        self.model = build_model(config.model, config.train.seed)
        self.model.trunk.lm.config.output_router_logits = False  # of each packed row by itself, so no sum over rows
        rng = np.random.default_rng(7)
        kinds = [("image",), ("sound",), (), ("image", "sound"), ("image", "image"), ("sound", "image", "sound")]
        kinds += [(key, "image") for key in self.model.modalities if key not in {"image", "sound"}]
        self._examples = [random_example(self.model, rng, kinds[n % len(kinds)]) for n in range(2 * GLOBAL_BATCH)]

    def batches(self, rank: int, world_size: int, first: int) -> Iterator[Batch]:
        """The ranks share each global batch out in its order."""
        rounds = self._config.train.gradient_accumulation_steps
        size = GLOBAL_BATCH // (world_size * rounds)
        for step in itertools.count(first // rounds):
            start = step % 2 * GLOBAL_BATCH + rank * size * rounds
            for number in range(rounds):
                yield pack(self._examples[start + number * size : start + (number + 1) * size])

    def loss(self, engine: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return engine(batch).total, {}

    def tokens(self, batch: Batch) -> int:
        return batch.labelled

    def structure(self) -> Structure:
        return self.model.structure()


def table(outcomes: dict[Cell, Outcome]) -> str:
    """The cells as Markdown: a row a mesh, a column a precision and what trains, and the features at the end."""
    columns = list(dict.fromkeys((cell.precision, cell.trained, cell.feature) for cell in outcomes))
    heads = [", ".join(filter(None, column)) for column in columns]
    lines = ["| mesh | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    reasons: dict[str, int] = {}
    for row in dict.fromkeys(cell.row for cell in outcomes):
        places = []
        for column in columns:
            outcome = outcomes.get(Cell(row, *column))
            if outcome is None:
                places.append("")
            elif outcome.refusal:
                number = reasons.setdefault(outcome.refusal.replace("\n", " "), len(reasons) + 1)
                places.append(f"refused ({number})")
            else:
                places.append(f"{outcome.deviation:.0e}")
        lines.append(f"| {row} | " + " | ".join(places) + " |")
    said = (textwrap.fill(f"{number}. {reason}", 118, subsequent_indent="   ") for reason, number in reasons.items())
    return "\n".join([*lines, "", *said, ""])


def main(arguments: Sequence[str]) -> int:
    """Run the cells, print a line of each, and fail if one neither holds nor is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only cells that have all of these, such as: tensor bf16")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    outcomes, wrong = {}, []
    for cell in all_cells():
        if not set(given.words) <= set(str(cell).split(", ")):
            continue
        try:
            outcomes[cell] = outcome = run(cell)
            said = f"refused: {outcome.refusal}" if outcome.refusal else f"deviation {outcome.deviation:.1e}"
            if not outcome.refusal and not outcome.holds(cell):
                wrong.append(cell)
                said = f"WRONG, {said}, learnt {outcome.learnt:.1e}"
        except RanksFailedError as error:
            wrong.append(cell)
            said = f"FAILED: {error}"
        print(f"{cell}: {said}", flush=True)
    if given.write is not None:
        head, _, _ = given.write.read_text(encoding="utf-8").partition("| mesh |")  # the words before the table stay
        given.write.write_text(head + table(outcomes), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
