"""Every recipe against one process: for each workload the cells of the table recipe x precision x what trains x mesh.

Each cell trains the same tiny model of its workload from the same seed on real ranks, and its losses are those of a
plain loop of PyTorch in one process; or it is refused before submission. ``python tests/recipes/cells.py`` runs all of
them, and ``--write`` puts the tables into ``docs/recipes_table.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from real_ranks import RanksFailedError, run_ranks
from tiny_omni import random_example
from torch import Tensor, nn

from hpcmm.config.compose import compose_run
from hpcmm.config.mesh import DATA, Mesh
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.train.optimizers import build_optimizer
from hpcmm.train.structure import Structure
from hpcmm.train.workload import Training, trained_parameters
from hpcmm.workloads.anomaly.data.anomaly import Batch as Images
from hpcmm.workloads.anomaly.llm_folder import model_config
from hpcmm.workloads.anomaly.models import build_model as build_detector
from hpcmm.workloads.anomaly.models.losses import LossLearner
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue
from hpcmm.workloads.anomaly.training import AnomalyTraining
from hpcmm.workloads.omni.data.batch import Batch, pack
from hpcmm.workloads.omni.models import OmniModel, build_model

if TYPE_CHECKING:
    from hpcmm.config.schema import RunConfig

GLOBAL_BATCH = 24
"""Examples of a step, whatever the mesh: what every number of data ranks and micro-batches here divides."""
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-3}
"""The largest deviation of a step's loss from that of one process, relative."""
ROUTED_BF16 = 3e-2
"""The same of experts in bf16: a token whose best experts are nearly equal goes to others when its scores are rounded.
DDP, which leaves such a model as it is, deviates by 1.6e-2."""
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
    workload: str = "omni"

    @property
    def table(self) -> Table:
        """That it is a place of."""
        return TABLES[self.workload]

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        if self.row in RANKS:
            return RANKS[self.row][1]
        return {"3d": 4, "ring of 3": 3, "expert x tensor": 4, "sequence x tensor": 4}.get(self.row, 2)

    @property
    def tolerance(self) -> float:
        """Of the deviation, in this precision."""
        return ROUTED_BF16 if self.precision == "bf16" and "expert" in self.row else TOLERANCE[self.precision]

    def overrides(self) -> list[str]:
        """The configuration as a user would write it."""
        return [
            f"task={self.workload}",
            "cluster=local",
            f"cluster.ranks_per_node={self.ranks}",
            *self.table.model,
            *(self.table.experts if "expert" in self.row else ()),
            *MESHES[RANKS[self.row][0] if self.row in RANKS else self.row],
            f"parallel.precision={self.precision}",
            *self.table.trained[self.trained],
            *FEATURES[self.feature],
            "train.warmup_steps=0",
            "train.schedule=constant",
            "optimizer=sgd",  # Adam hides a wrong scale of the gradients, and so does clipping
            f"train.learning_rate={self.table.learning_rates[self.trained]}",
            f"train.gradient_clip={CLIP[self.feature == 'clipping']}",
            "train.seed=5",
        ]

    def config(self) -> RunConfig:
        """Composed and validated. Raises HpcmmError if the cell is refused."""
        config = compose_run(self.overrides())
        validate(config)
        return config

    def __str__(self) -> str:
        workload = "" if self.workload == "omni" else self.workload
        return ", ".join(filter(None, (workload, self.row, self.precision, self.trained, self.feature)))


def all_cells() -> Iterator[Cell]:
    """Both tables."""
    for workload, table in TABLES.items():
        for row, precision, trained in itertools.product(table.rows, table.precisions, table.trained):
            yield Cell(row, precision, trained, workload=workload)
        for row, feature in itertools.product(table.rows, table.features):
            yield Cell(row, feature=feature, workload=workload)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    refusal: str = ""
    """Why it was refused, and what to do instead; empty if it was not."""
    deviation: float = 0.0
    """The largest relative difference of a step's loss from that of one process."""
    differs: float = 0.0
    """The largest relative difference between what ranks of one model note as a step's loss."""
    learnt: float = 0.0
    """By what part the loss of one process changed over the steps: what a wrong gradient would make another change."""

    def holds(self, cell: Cell) -> bool:
        return not self.refusal and max(self.deviation, self.differs) <= cell.tolerance < self.learnt / 2


def run(cell: Cell) -> Outcome:
    """Raises RanksFailedError if a rank fails, or the cell hangs."""
    try:
        config = cell.config()
    except HpcmmError as error:
        return Outcome(refusal=str(error))
    steps = cell.table.steps[cell.trained]
    losses = run_ranks(cell.ranks, trained_losses, config, cell.table.training, steps, timeout_s=CELL_S)
    alone = alone_losses(config, cell.table, steps)
    together = [
        sum(total for total, _ in step) / sum(tokens for _, tokens in step) for step in zip(*losses, strict=True)
    ]
    deviation = max(abs(a - b) / b for a, b in zip(together, alone, strict=True))
    return Outcome(deviation=deviation, differs=differs(losses, config), learnt=abs(alone[-1] - alone[0]) / alone[0])


def differs(losses: list[list[tuple[float, int]]], config: RunConfig) -> float:
    """As :attr:`Outcome.differs`. ``losses``: by rank, as of :func:`trained_losses`."""
    mesh = Mesh.of(config.parallel.mesh, config.world_size)
    first = {mesh.coordinates(rank)[DATA]: losses[rank] for rank in reversed(range(len(losses)))}
    return max(
        abs(total - expected) / expected
        for rank, steps in enumerate(losses)
        for (total, _), (expected, _) in zip(steps, first[mesh.coordinates(rank)[DATA]], strict=True)
    )


_alone: dict[str, list[float]] = {}


def alone_losses(config: RunConfig, table: Table, steps: int) -> list[float]:
    """Those of one process, once for all cells that train the same: the mesh changes nothing, nor do micro-batches
    change a loss that is a sum over examples."""
    config = copy.deepcopy(config)
    if not table.is_sum:
        config.train.gradient_accumulation_steps *= Mesh.of(config.parallel.mesh, config.world_size).data
    train = config.train
    key = repr((steps, config.model, config.optimizer, train.gradient_clip, train.learning_rate))  # type: ignore[attr-defined]
    key += "" if table.is_sum else str(train.gradient_accumulation_steps)
    if key not in _alone:
        (_alone[key],) = run_ranks(1, losses_of_one_process, config, table.training, steps, timeout_s=CELL_S)
    return _alone[key]


def trained_losses(rank: int, config: Any, made: Callable[[Any], Training], steps: int) -> list[tuple[float, int]]:
    """On a rank: of each step its loss times its tokens, and its tokens; if these do not count, as if it had one."""
    from hpcmm.config.recipe import recipe_of
    from hpcmm.train.recipes import build

    training = made(config)
    engine = build(training, config, recipe_of(config).mesh(config), rank)
    batches = training.batches(engine.data_rank, engine.mesh.data, 0)
    steps = [engine.step(batches) for _ in range(steps)]
    return [(values["loss"] * values.get("tokens", 1), int(values.get("tokens", 1))) for values in steps]


def losses_of_one_process(_rank: int, config: Any, made: Callable[[Any], Training], steps: int) -> list[float]:
    """PyTorch alone, in float32: the loss of each step's whole batch, a mean over its tokens or its micro-batches."""
    training = made(config)
    model: Any = training.model
    optimizer = build_optimizer(config, model, training.parameter_groups())
    batches = training.batches(0, 1, 0)
    found = []
    for _ in range(steps):
        micro_batches = list(itertools.islice(batches, config.train.gradient_accumulation_steps))
        tokens = sum(training.tokens(batch) or 1 for batch in micro_batches)
        losses = [training.loss(model, batch)[0] / tokens for batch in micro_batches]
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(trained_parameters(model), config.train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(sum(losses)))
    return found


def places(rank: int, world_size: int, first: int, rounds: int) -> Iterator[range]:
    """The examples of this rank's micro-batches: the ranks share each global batch out in its order."""
    size = GLOBAL_BATCH // (world_size * rounds)
    for step in itertools.count(first // rounds):
        start = step % 2 * GLOBAL_BATCH + rank * size * rounds
        for number in range(rounds):
            yield range(start + number * size, start + (number + 1) * size)


class ManyConversations(Training):
    """The same random conversations for every mesh, to the same tiny model."""

    model: OmniModel

    def __init__(self, config: Any) -> None:
        self._config = config
        self.model = build_model(config.model, config.train.seed)
        self.model.trunk.lm.config.output_router_logits = False  # of each packed row by itself, so no sum over rows
        rng = np.random.default_rng(7)
        kinds = [("image",), ("sound",), (), ("image", "sound"), ("image", "image"), ("sound", "image", "sound")]
        kinds += [(key, "image") for key in self.model.modalities if key not in {"image", "sound"}]
        self._examples = [random_example(self.model, rng, kinds[n % len(kinds)]) for n in range(2 * GLOBAL_BATCH)]

    def batches(self, rank: int, world_size: int, first: int) -> Iterator[Batch]:
        for own in places(rank, world_size, first, self._config.train.gradient_accumulation_steps):
            yield pack([self._examples[number] for number in own])

    def loss(self, engine: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return engine(batch).total, {}

    def tokens(self, batch: Batch) -> int:
        return batch.labelled

    def structure(self) -> Structure:
        return self.model.structure()


class ManyImages(AnomalyTraining):
    """The same random images for every mesh, to the same tiny detector."""

    def __init__(self, config: Any) -> None:
        self._config, self._device = config, torch.device("cpu")
        self.model = build_detector(model_config(config), config.train.seed)
        self._loss = LossLearner(config.train)
        generator = torch.Generator().manual_seed(7)
        count, side = 2 * GLOBAL_BATCH, config.data.image_size
        self._pictures = torch.randn(count, 3, side, side, generator=generator)
        self._masks = (torch.rand(count, 1, side, side, generator=generator) < 0.3).float()

    def batches(self, rank: int, world_size: int, first: int = 0) -> Iterator[Images]:
        for own in places(rank, world_size, first, self._config.train.gradient_accumulation_steps):
            numbers, count = torch.tensor(own), len(own)
            yield {
                "image": self._pictures[numbers],
                "mask": self._masks[numbers],
                "label": torch.ones(count, dtype=torch.int64),
                "index": numbers,
                "caption": [("a lawn", "a wall")[number % 2] for number in own],
                "dialogue": [Dialogue("Is there an anomaly?", "Yes, at the top left.")] * count,
                "category": ["lawn"] * count,
            }


@dataclass(frozen=True)
class Table:
    """What the cells of a workload have in common."""

    training: Callable[[Any], Training]
    model: Sequence[str]
    """Overrides that make it tiny."""
    trained: Mapping[str, list[str]]
    """What trains, with its overrides."""
    rows: Sequence[str]
    learning_rates: Mapping[str, float]
    """By what trains: such that the steps change the loss by far more than a cell may deviate."""
    steps: Mapping[str, int]
    """By what trains: enough to learn more than its precisions round off."""
    precisions: Sequence[str] = ("fp32", "bf16")
    features: Sequence[str] = tuple(filter(None, FEATURES))
    experts: Sequence[str] = ()
    """Overrides that give it experts."""
    is_sum: bool = True
    """Whether its loss is a sum over examples: then micro-batches change nothing of it."""


TABLES = {
    "omni": Table(
        ManyConversations,
        ["model/language_model=tiny_llama"],
        {
            "all": [],
            "connectors": ["model.language_model.frozen=true"],
            "LoRA": ["model.language_model.frozen=true", "model.language_model.lora_rank=2"],
        },
        [*MESHES, *RANKS],
        {"all": 0.03, "connectors": 0.03, "LoRA": 0.03},
        {"all": 5, "connectors": 5, "LoRA": 5},
        experts=["model.language_model.architecture=mixtral"],
    ),
    "anomaly": Table(
        ManyImages,
        ["model=clip_tiny", "model.decoder_width=32", "model.text_adapter_width=32", "data.image_size=32"],
        {
            "all": [],
            "decoder": ["model.freeze_image_encoder=true"],
            "LoRA": ["model.freeze_image_encoder=true", "model/llm=tiny", "model.llm.lora_rank=2"],
        },
        ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "ulysses", "ring", "pipeline", "tensor", "expert", "3d"],
        {"all": 3.0, "decoder": 3.0, "LoRA": 0.01},
        {"all": 20, "decoder": 20, "LoRA": 5},
        features=["clipping", "accumulation"],
        is_sum=False,
    ),
}


def as_markdown(outcomes: dict[Cell, Outcome]) -> str:
    """A workload's cells: a row a mesh, a column a precision and what trains, and the features at the end."""
    (workload,) = {cell.workload for cell in outcomes}
    columns = list(dict.fromkeys((cell.precision, cell.trained, cell.feature) for cell in outcomes))
    heads = [", ".join(filter(None, column)) for column in columns]
    lines = ["| mesh | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    reasons: dict[str, int] = {}
    for row in dict.fromkeys(cell.row for cell in outcomes):
        places = []
        for column in columns:
            outcome = outcomes.get(Cell(row, *column, workload=workload))
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
        given.write.write_text(with_tables(given.write.read_text(encoding="utf-8"), outcomes), encoding="utf-8")
    return 1 if wrong else 0


def with_tables(text: str, outcomes: dict[Cell, Outcome]) -> str:
    """The document with new tables: each stands at the end of its section, whose words before it stay."""
    first, *sections = re.split("^(?=## )", text, flags=re.MULTILINE)
    found = [first]
    for workload, section in zip(TABLES, sections, strict=True):
        own = {cell: outcome for cell, outcome in outcomes.items() if cell.workload == workload}
        words, _, _ = section.partition("| mesh |")
        found.append(words + as_markdown(own) if own else section)
    return "\n".join(each.rstrip("\n") + "\n" for each in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
