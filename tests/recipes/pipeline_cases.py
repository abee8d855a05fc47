"""What a pipeline makes of a tiny model, against one process. On the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from token_chain import WIDTH, TokenTraining, random_row
from torch import nn
from writers import written_twice

from hpcmm import annotate
from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import ClusterConfig, ParallelConfig, Precision, RunConfig, TrainConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import Checkpoints, read_trained, start_from
from hpcmm.train.engine import learning_rate_factor
from hpcmm.train.optimizers import build_optimizer
from hpcmm.train.recipes import build
from hpcmm.worker.environment import RankEnvironment

RANKS, STEPS = 4, 4
CLUSTER = ClusterConfig(name="test", ranks_per_node=RANKS)
OPTIMIZERS = {"sgd": "torch.optim.SGD", "adamw": "torch.optim.AdamW"}
"""SGD shows gradients of a wrong scale, which AdamW hides."""
LARGE_STEPS = {"sgd": 0.5, "adamw": 1e-2}


def config_of(mesh: dict[str, int], *, rounds: int = 2, optimizer: str = "sgd", **parallel: Any) -> RunConfig:
    train = TrainConfig(
        micro_batch_size=2, gradient_accumulation_steps=rounds, steps=STEPS, learning_rate=LARGE_STEPS[optimizer],
        gradient_clip=parallel.pop("clip", 1e9), warmup_steps=0, weight_decay=0.01,
    )  # fmt: skip
    return RunConfig(
        cluster=CLUSTER, train=train, parallel=ParallelConfig(mesh=mesh, **{"zero_stage": 1} | parallel),
        optimizer={"_target_": OPTIMIZERS[optimizer]},
    )  # fmt: skip


def of_one_process(config: RunConfig, data: int, options: dict[str, Any]) -> Any:
    """The losses of the steps, the weights after them, and the scores of a row: what plain PyTorch makes of it."""

    training = TokenTraining(config, torch.device("cpu"), **options)
    train, rows = config.train, config.train.gradient_accumulation_steps * data
    stepper = build_optimizer(config, training.model, training.parameter_groups())
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


def engine_of(config: RunConfig, options: dict[str, Any]) -> Any:
    training = TokenTraining(config, torch.device("cpu"), **options)
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
    engine = engine_of(config, dict(options))
    batches = engine.training.batches(engine.data_rank, engine.mesh.data, 0)
    losses = [step_of(engine, batches) for _ in range(STEPS)]
    weights = engine.weights()
    engine.model.eval()
    scores = engine.model(random_row(1000, 3))
    engine.model.train()
    expected, trained, of_row = of_one_process(config, engine.mesh.data, dict(options))
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
CUBE = {"pipeline": 2, "tensor": 2}
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
    "stages that are frozen": lambda: as_one_process({"pipeline": 4}, frozen=CONNECTOR, clip=0.05, tied=True),
    "stages that are frozen, without ZeRO": lambda: as_one_process(TWO, frozen=CONNECTOR, clip=0.05, zero_stage=0),
    "LoRA": lambda: as_one_process(TWO, frozen="encoder", lora=True, clip=0.5),
    "recomputed activations": lambda: as_one_process(TWO, kind="mixtral", activation_checkpointing=True, clip=0.5),
    "experts": lambda: as_one_process({"pipeline": 4}, kind="qwen3_moe"),
    "pipeline x tensor": lambda: as_one_process(CUBE, clip=0.5, tied=True),
    "pipeline x tensor without ZeRO": lambda: as_one_process(CUBE, clip=0.5, tied=True, zero_stage=0, kind="qwen3"),
    "pipeline x tensor with LoRA": lambda: as_one_process(CUBE, clip=0.5, frozen="encoder", lora=True, kind="qwen2"),
    "bf16": lambda: as_one_process(TWO, precision=Precision.bf16, tied=True, optimizer="adamw", tolerance=3e-2),
}

CORE = (
    "two stages of two data ranks",
    "tied embeddings over four stages",
    "stages that are frozen",
    "LoRA",
    "pipeline x tensor",
    "bf16",
)
"""One of each kind."""


def resumed(folder: str) -> None:
    """A run that is saved and goes on gives the losses of one that was never stopped, in the same order of data."""
    for number, (mesh, zero_stage) in enumerate([(TWO, 1), (CUBE, 0)]):
        goes_on(
            f"{folder}/{number}",
            config_of(mesh, optimizer="adamw", clip=0.5 * zero_stage or 1e9, zero_stage=zero_stage),
        )


def goes_on(folder: str, config: RunConfig) -> None:
    options = {"tied": True, "frozen": "encoder"}
    whole = engine_of(config, options)
    batches = whole.training.batches(whole.data_rank, whole.mesh.data, 0)
    checkpoints = Checkpoints(run_in(folder), rank_env(), keep=1)
    step_of(whole, batches)
    step_of(whole, batches)
    assert written_twice(partial(checkpoints.save, whole, 2, {"note": "kept"})) == ()
    expected = [step_of(whole, batches) for _ in range(2)]
    weights = whole.weights()
    whole.destroy()
    again = engine_of(config, {**options, "seed": 8})
    state = checkpoints.load_newest(again)
    assert state is not None
    assert state["note"] == "kept"
    batches = again.training.batches(again.data_rank, again.mesh.data, 2 * again.rounds)
    assert [step_of(again, batches) for _ in range(2)] == expected
    for name, value in again.weights().items():
        assert value.equal(weights[name]), name
    again.destroy()
    if dist.get_rank() == 0:
        alone = TokenTraining(config, torch.device("cpu"), seed=8, **options)
        start_from(alone.model, folder)
        assert not any(name.startswith("encoder") for name in read_trained(RunDir(Path(folder))))


def run_in(folder: str) -> RunDir:
    run = RunDir(Path(folder))
    if dist.get_rank() == 0 and not run.checkpoints.exists():
        run.create()
    dist.barrier()
    return run


def rank_env() -> RankEnvironment:
    rank = dist.get_rank()
    return RankEnvironment(rank, rank, RANKS, RANKS, "1", "here", "127.0.0.1", 1)


def textbook_bytes(_folder: str) -> None:
    """A stage sends each micro-batch's hidden states, its places and its length, and gets their gradient back."""
    engine = engine_of(config_of(TWO, rounds=3), {})
    rows = [random_row(number * 2 + engine.data_rank, 2) for number in range(3)]
    tokens = sum(row.tokens.shape[1] for row in rows)
    with mock.patch.object(dist, "send", side_effect=dist.send) as send:
        step_of(engine, iter(rows))
        sent = [call.kwargs["tensor"].nbytes for call in send.call_args_list]
    hidden = tokens * WIDTH * 4
    assert sum(sent) == (hidden + 8 * tokens + 1024 * 3 if dist.get_rank() < 2 else hidden)
    engine.destroy()


def own_layers_alone(_folder: str) -> None:
    """A rank keeps its stage's layers, under the model's names, and the first stage alone reads data."""
    engine = engine_of(config_of({"pipeline": 4}, pipeline_layers=[1, 1, 1, 1]), {"tied": True})
    rank, last = dist.get_rank(), RANKS - 1
    held = {name for name, each in engine.training.model.named_parameters(remove_duplicate=False) if not each.is_meta}
    layers = {name.split(".")[4] for name in held if ".layers." in name}
    assert layers == {str(rank)}
    assert ("connector.weight" in held, "trunk.lm.lm_head.weight" in held) == (rank == 0, rank == last)
    assert "trunk.lm.model.embed_tokens.weight" in engine.parameter_names.values() or rank not in (0, last)
    moved: list[Any] = []
    rows = [random_row(0, 2), random_row(1, 2)] if rank == 0 else []
    for row in rows:
        row.to = lambda device, row=row: moved.append(device) or row
    read = iter(rows)
    engine.step(read)
    assert next(read, None) is None
    assert moved == [engine.device] * len(rows)
    engine.destroy()


def annotated(_folder: str) -> None:
    """A step's instructions are the phases of any other recipe's."""
    engine = engine_of(config_of({"pipeline": 4}), {})
    with mock.patch.object(annotate, "phase", side_effect=annotate.phase) as phase:
        step_of(engine, engine.training.batches(0, 1, 0))
    found = [call.args[0] for call in phase.call_args_list]
    rank = dist.get_rank()
    reading = ["data"] * 2 if rank == 0 else []
    sent = 2 * ((rank > 0) + (rank < 3))  # at each boundary, forward and back
    assert sorted(found) == sorted([*reading, *["forward"] * (2 + sent), *["backward"] * (4 + sent), "optimizer"])
    engine.destroy()


def refused(_folder: str) -> None:
    """What a stage could not do is said, and not done wrong."""
    with pytest.raises(HpcmmError, match="output_router_logits"):
        engine_of(config_of(TWO), {"kind": "mixtral", "router_loss": True})
    with pytest.raises(HpcmmError, match="4 layers"):
        engine_of(config_of(TWO, pipeline_layers=[3, 3]), {})
    with pytest.raises(HpcmmError, match="scale trains, but"):
        engine_of(config_of(TWO), {"elsewhere": True})


OF_FILES = (resumed, textbook_bytes, own_layers_alone, annotated, refused)


def check_named(_rank: int, names: Sequence[str]) -> None:
    """These checks, one after another."""
    for name in names:
        try:
            CHECKS[name]()
        except Exception as error:
            error.add_note(f"in the check {name!r}")
            raise


def check_core(rank: int, folder: str) -> None:
    """Those that each change is tried with."""
    check_named(rank, CORE)
    for each in OF_FILES:
        each(f"{folder}/{each.__name__}")
