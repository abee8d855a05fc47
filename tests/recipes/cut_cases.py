"""What recipes make of a model whose maps, experts or encoders they cut, against one process. On the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cut_model import TinyTraining, one_process
from deepspeed.utils import groups
from writers import written_twice

from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import (
    ClusterConfig,
    Encoders,
    Offload,
    ParallelConfig,
    Precision,
    RunConfig,
    Schedule,
    TrainConfig,
)
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import Checkpoints, start_from
from hpcmm.train.engine import Engine
from hpcmm.train.precision import multiply_in_fp8
from hpcmm.train.recipes import build
from hpcmm.worker.environment import RankEnvironment

STEPS = 3
SGD = {"_target_": "torch.optim.SGD"}
"""In place of AdamW, which hides wrong scales of gradients."""


@dataclass(frozen=True)
class Case:
    """A tiny model under a recipe."""

    kind: str
    mesh: dict[str, int]
    zero: int = 1
    variant: str = ""
    clip: float = 0.0
    rounds: int = 1
    precision: str = "fp32"
    encoders: str = "along"
    checkpointing: bool = False
    adam: bool = False
    offload: bool = False
    resume: bool = False

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        more = {"clip": self.clip, "rounds": self.rounds - 1, "precision": self.precision != "fp32"}
        more |= {"replicated": self.encoders != "along", "checkpointing": self.checkpointing, "adam": self.adam}
        more |= {"offload": self.offload, "resume": self.resume}
        words = [self.kind, mesh, f"zero {self.zero}", self.variant, *(name for name, on in more.items() if on)]
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class Found:
    """How far a case is from one process: the largest differences."""

    loss: float
    norm: float
    """Of the gradients' norm, relative. 0 without ZeRO, with which DeepSpeed tells none."""
    weight: float
    seen: int
    """Things that rank 0's encoder encoded."""
    wrong_names: list[str]
    """Of trained parameters that ``weights()`` lacks, or has too much, or in another shape."""
    resumed: float = 0.0
    """Of a weight, if the run goes on from a checkpoint."""
    started: float = 0.0
    """Of a weight of the model by itself, if it starts from that checkpoint."""
    written_twice: tuple[str, ...] = ()
    """Files of the checkpoint that more than one rank wrote."""
    sums: int = 0
    """All-reduces that make the weights whole."""


def config_of(case: Case, ranks: int) -> RunConfig:
    offload = Offload.cpu if case.offload else Offload.none
    return RunConfig(
        name="test",
        cluster=ClusterConfig(name="test", ranks_per_node=ranks),
        optimizer="adamw" if case.adam else dict(SGD),
        parallel=ParallelConfig(
            name="test",
            mesh=dict(case.mesh),
            zero_stage=case.zero,
            precision=Precision(case.precision),
            encoders=Encoders(case.encoders),
            activation_checkpointing=case.checkpointing,
            offload_optimizer=offload,
            offload_parameters=offload if case.zero == 3 else Offload.none,
        ),
        train=TrainConfig(
            steps=STEPS,
            micro_batch_size=1,
            gradient_accumulation_steps=case.rounds,
            learning_rate=1e-2 if case.adam else 0.3,
            warmup_steps=0,
            schedule=Schedule.constant,
            gradient_clip=case.clip,
            weight_decay=0.0,
        ),
    )


def forget_groups() -> None:
    """DeepSpeed keeps its groups for the life of a process, which has one run elsewhere."""
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mpu"):
        setattr(groups, name, None)
    for name, value in vars(groups).items():
        if name.startswith("_EXPERT_") and isinstance(value, dict):
            value.clear()


def check(rank: int, cases: list[Case], folder: str) -> list[Found | None]:
    """Each case in turn; rank 0 knows what was found."""
    return [one_case(rank, case, f"{folder}/{number}") for number, case in enumerate(cases)]


def one_case(rank: int, case: Case, folder: str) -> Found | None:
    ranks = dist.get_world_size()
    config, mesh = config_of(case, ranks), Mesh.of(case.mesh, ranks)
    training, engine = built(case, config, mesh, rank)
    checkpoints = checkpoints_in(folder, rank, ranks) if case.resume else None
    batches = training.batches(engine.data_rank, mesh.data, 0)
    losses, norms = [], []
    twice: tuple[str, ...] = ()
    for step in range(STEPS):
        loss, norm = one_step(engine, batches)
        losses.append(loss)
        norms.append(norm)
        if checkpoints is not None and step == STEPS - 2:
            saved = {name: value.clone() for name, value in engine.weights().items()}
            twice = written_twice(partial(checkpoints.save, engine, step + 1, {}))
    with patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as sums:
        weights = engine.weights()
    seen = training.model.encoder.seen
    engine.destroy()
    forget_groups()
    resumed = started = 0.0
    if checkpoints is not None:
        resumed = difference(resumed_weights(case, config, mesh, rank, checkpoints), weights)
        if rank == 0:
            alone = TinyTraining(case.kind, case.variant)
            start_from(alone.model, folder)
            started = difference(saved, dict(alone.model.named_parameters()))
    if rank:
        return None
    return against_one_process(
        case,
        mesh,
        weights,
        losses,
        norms,
        {"seen": seen, "resumed": resumed, "started": started, "written_twice": twice, "sums": sums.call_count},
    )


def built(case: Case, config: RunConfig, mesh: Mesh, rank: int) -> tuple[TinyTraining, Engine]:
    training = TinyTraining(case.kind, case.variant)
    if config.parallel.precision is Precision.fp8:
        multiply_in_fp8(training, config, torch.device("cpu"), emulated=True)
    return training, build(training, config, mesh, rank)


def one_step(engine: Engine, batches: Any) -> tuple[float, float]:
    """The loss over all data ranks, and the gradients' norm."""
    values = engine.step(batches)
    both = torch.tensor([values["loss"] * values["tokens"], values["tokens"]], dtype=torch.float64)
    dist.all_reduce(both)
    return float(both[0] / both[1]), float(engine.deepspeed.get_global_grad_norm() or 0)


def checkpoints_in(folder: str, rank: int, ranks: int) -> Checkpoints:
    run = RunDir(Path(folder))
    if rank == 0:
        run.create()
    dist.barrier()
    return Checkpoints(run, RankEnvironment(rank, rank, ranks, ranks, "1", "here", "127.0.0.1", 1), keep=1)


def resumed_weights(case: Case, config: RunConfig, mesh: Mesh, rank: int, checkpoints: Checkpoints) -> dict[str, Any]:
    training, engine = built(case, config, mesh, rank)
    state = checkpoints.load_newest(engine)
    assert state is not None
    first = state["steps_done"] * case.rounds
    batches = training.batches(engine.data_rank, mesh.data, first)
    for _ in range(state["steps_done"], STEPS):
        one_step(engine, batches)
    weights = engine.weights()
    engine.destroy()
    forget_groups()
    return weights


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((value - expected[name]).detach().abs().max()) for name, value in found.items())


def against_one_process(
    case: Case,
    mesh: Mesh,
    weights: dict[str, torch.Tensor],
    losses: list[float],
    norms: list[float],
    more: dict[str, Any],
) -> Found:
    alone = TinyTraining(case.kind, case.variant)
    trained = {name: value for name, value in alone.model.named_parameters() if value.requires_grad}
    if case.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained.values(), 1e-2, (0.9, 0.95), weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(trained.values(), 0.3)
    expected, expected_norms = one_process(alone, optimizer, case.rounds * mesh.data, STEPS, case.clip)
    wrong = sorted(weights.keys() ^ trained.keys())
    wrong += [name for name, value in trained.items() if name in weights and weights[name].shape != value.shape]
    return Found(
        loss=max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        norm=max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)) if case.zero else 0.0,
        weight=-1 if wrong else difference(weights, trained),
        wrong_names=wrong,
        **more,
    )
