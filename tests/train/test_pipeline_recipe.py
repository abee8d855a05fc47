"""A pipeline trains a model to the losses and weights of one process, whatever its stages and parts.

Four processes do all of it once.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from token_chain import TokenTraining, random_row
from torch import multiprocessing, nn
from torch.multiprocessing.spawn import ProcessRaisedException

from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import ClusterConfig, ParallelConfig, Precision, RunConfig, TrainConfig
from hpcmm.node.cache import cache_dir, extensions_dir, one_at_a_time
from hpcmm.worker.compiled_ops import build_ops, ops_are_built

RANKS, STEPS = 4, 4
CLUSTER = ClusterConfig(name="test", ranks_per_node=RANKS)
LARGE_STEPS = {"sgd": 0.5, "adamw": 1e-2}


def config_of(mesh: dict[str, int], *, rounds: int = 2, optimizer: str = "sgd", **parallel: Any) -> RunConfig:
    train = TrainConfig(
        micro_batch_size=2, gradient_accumulation_steps=rounds, steps=STEPS, learning_rate=LARGE_STEPS[optimizer],
        gradient_clip=parallel.pop("clip", 1e9), warmup_steps=0, weight_decay=0.01,
    )  # fmt: skip
    return RunConfig(cluster=CLUSTER, train=train, parallel=ParallelConfig(mesh=mesh, **{"zero_stage": 1} | parallel))


@contextmanager
def optimizer_of(name: str) -> Iterator[None]:
    """SGD shows gradients of a wrong scale, which AdamW hides."""
    adamw = torch.optim.AdamW
    if name == "sgd":
        torch.optim.AdamW = lambda groups, lr, weight_decay, **_: torch.optim.SGD(  # type: ignore[assignment, misc]
            groups, lr=lr, weight_decay=weight_decay
        )
    try:
        yield
    finally:
        torch.optim.AdamW = adamw  # type: ignore[misc]


def of_one_process(config: RunConfig, data: int, optimizer: str, options: dict[str, Any]) -> Any:
    """The losses of the steps, the weights after them, and the scores of a row: what plain PyTorch makes of it."""
    from hpcmm.train.engine import learning_rate_factor

    training = TokenTraining(config, torch.device("cpu"), **options)
    train, rows = config.train, config.train.gradient_accumulation_steps * data
    with optimizer_of(optimizer):
        stepper = torch.optim.AdamW(
            [each for each in training.model.parameters() if each.requires_grad], lr=train.learning_rate,
            betas=tuple(train.betas), weight_decay=train.weight_decay,
        )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, learning_rate_factor(train))
    batches, losses = training.batches(0, 1, 0), []
    for _ in range(STEPS):
        step = list(islice(batches, rows))
        tokens = sum(training.tokens(batch) for batch in step)
        loss = sum(training.model(batch).total for batch in step) / tokens
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), train.gradient_clip)
        stepper.step()
        schedule.step()
        stepper.zero_grad()
        losses.append(float(loss.detach()))
    trained = {name: each.detach() for name, each in training.model.named_parameters() if each.requires_grad}
    with torch.no_grad():
        return losses, trained, training.model(random_row(1000, 3))


def engine_of(config: RunConfig, optimizer: str, options: dict[str, Any]) -> Any:
    from hpcmm.train.recipes import build

    training = TokenTraining(config, torch.device("cpu"), **options)
    with optimizer_of(optimizer):
        return build(training, config, Mesh.of(config.parallel.mesh, RANKS), dist.get_rank())


def step_of(engine: Any, batches: Iterator[Any]) -> float:
    """The loss of the whole global batch, the same on all ranks."""
    found = engine.step(batches)
    sums = torch.tensor([found["loss"] * found["tokens"], found["tokens"]], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def as_one_process(mesh: dict[str, int], *, optimizer: str = "sgd", tolerance: float = 1e-5, **options: Any) -> None:
    """Losses, weights and scores of a pipeline are those of one process."""
    parallel = {
        key: options.pop(key)
        for key in ("zero_stage", "rounds", "clip", "precision", "activation_checkpointing", "pipeline_layers")
        if key in options
    }
    config = config_of(mesh, optimizer=optimizer, **parallel)
    engine = engine_of(config, optimizer, dict(options))
    batches = engine.training.batches(engine.data_rank, engine.mesh.data, 0)
    losses = [step_of(engine, batches) for _ in range(STEPS)]
    weights = engine.weights()
    engine.model.eval()
    scores = engine.model(random_row(1000, 3))
    engine.model.train()
    expected, trained, of_row = of_one_process(config, engine.mesh.data, optimizer, dict(options))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.total, of_row.total, rtol=tolerance, atol=tolerance)
    if tolerance < 1e-3:
        assert scores.correct.equal(of_row.correct)
    if dist.get_rank() == 0:
        assert weights.keys() == trained.keys()
        for name, value in trained.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    engine.destroy()


TWO = {"pipeline": 2}
"""And two data ranks."""
CONNECTOR = "trunk encoder"
FIRST_STAGE = "encoder connector trunk.lm.model.embed_tokens trunk.lm.model.layers.0"
CHECKS: dict[str, Callable[[], None]] = {
    "four stages": lambda: as_one_process({"pipeline": 4}, rounds=4),
    "two stages of two data ranks": lambda: as_one_process(TWO, rounds=1),
    "tied embeddings": lambda: as_one_process(TWO, tied=True, rounds=4, clip=0.5),
    "tied embeddings over four stages": lambda: as_one_process({"pipeline": 4}, tied=True, clip=0.5),
    "without ZeRO": lambda: as_one_process(TWO, tied=True, clip=0.5, zero_stage=0, kind="qwen2"),
    "AdamW": lambda: as_one_process(TWO, optimizer="adamw", tied=True, clip=0.5, tolerance=5e-5, kind="qwen3"),
    "a frozen encoder": lambda: as_one_process(TWO, frozen="encoder", clip=0.5),
    "a first stage that is frozen": lambda: as_one_process(TWO, frozen=FIRST_STAGE, pipeline_layers=[1, 3], clip=0.5),
    "stages that are frozen": lambda: as_one_process({"pipeline": 4}, frozen=CONNECTOR, clip=0.05),
    "stages that are frozen, without ZeRO": lambda: as_one_process(TWO, frozen=CONNECTOR, clip=0.05, zero_stage=0),
    "LoRA": lambda: as_one_process(TWO, frozen="encoder", lora=True, clip=0.5),
    "recomputed activations": lambda: as_one_process(TWO, kind="mixtral", activation_checkpointing=True, clip=0.5),
    "experts": lambda: as_one_process({"pipeline": 4}, kind="qwen3_moe"),
    "bf16": lambda: as_one_process(TWO, precision=Precision.bf16, tied=True, optimizer="adamw", tolerance=3e-2),
}


def on_a_rank(rank: int, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"LOCAL_SIZE": "0"}  # else DeepSpeed keeps 69 MB of shared memory a rank
    torch.set_num_threads(1)
    import deepspeed

    from hpcmm.worker.compiled_ops import load_ops
    from hpcmm.worker.distributed import leave_group

    load_ops(extensions_dir(CLUSTER))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            (Path(folder) / f"{name}.{rank}").write_text(traceback.format_exc())
            raise  # the ranks are no longer in step
        (Path(folder) / f"{name}.{rank}").touch()
    leave_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each check and rank: how it failed, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    ops = extensions_dir(CLUSTER)
    with one_at_a_time(cache_dir(CLUSTER) / f"{ops.name}.lock"):
        if not ops_are_built(ops):
            build_ops(ops)
    with suppress(ProcessRaisedException):
        multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_a_pipeline_trains_as_one_process(outcomes: Path, name: str):
    reports = [outcomes / f"{name}.{rank}" for rank in range(RANKS)]
    failures = [report.read_text() for report in reports if report.exists() and report.stat().st_size]
    assert not failures, failures[0]
    assert all(report.exists() for report in reports), "an earlier check failed"
