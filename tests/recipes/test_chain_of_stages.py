"""What one stage trains and the next one freezes reaches the last one's checkpoint, exactly: two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_ranks import run_ranks
from torch import Tensor, nn

from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig
from hpcmm.config.workload import Workload
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import load_model, read_trained, start_from
from hpcmm.train.workload import Training

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("compiled_ops")]
PARTS = ("encoder", "connector", "language", "head")


def parts() -> nn.Sequential:
    """Four maps by name, the first from a file of its own, as it were."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in PARTS:
        model.add_module(name, nn.Linear(3, 3))
    return model


class Chain(Training):
    """Trains the part that ``config.name`` names."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._size = config.train.micro_batch_size
        self.model = parts().to(device)
        if config.train.init_from is not None:
            start_from(self.model, config.train.init_from)
        for name, part in self.model.named_children():
            part.requires_grad_(name == config.name)

    def batches(self, rank: int, _world_size: int, _first: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        while True:
            yield torch.randn(self._size, 3, generator=generator)

    def loss(self, engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (engine(batch.to(next(self.model.parameters()).dtype)).float() - batch).square().mean(), {}


class ChainWorkload(Workload):
    def training_class(self) -> type[Training]:
        return Chain


def train_part(rank: int, root: Path, part: str, before: str | None, steps: int = 2) -> None:
    from hpcmm.runs.metrics import MetricsWriter
    from hpcmm.train.loop import train
    from hpcmm.worker.environment import RankEnvironment

    overrides = [f"name={part}", f"train.steps={steps}", "train.learning_rate=0.1", "parallel.precision=bf16"]
    config = compose_run(["cluster=local", "cluster.ranks_per_node=2", *overrides])
    config.train.init_from = None if before is None else str(root / before)
    run = RunDir(root / part)
    with MetricsWriter(run.rank_metrics(rank)) as metrics:
        rank_env = RankEnvironment(rank, rank, 2, 2, "0", "here", "127.0.0.1", 1)
        train(ChainWorkload(), config, run, rank_env, torch.device("cpu"), metrics)


def chain(rank: int, root: Path) -> None:
    train_part(rank, root, "connector", None)
    train_part(rank, root, "language", "connector")
    train_part(rank, root, "head", "language")
    train_part(rank, root, "connector", None, steps=4)  # it is trained on, while the others are done
    train_part(rank, root, "language", "connector", steps=3)  # and so is one that began with what it was


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, compiled_ops: None) -> Path:
    made = tmp_path_factory.mktemp("chain")
    for name in PARTS[1:]:
        RunDir(made / name).create()
    run_ranks(2, chain, made)
    return made


def of(state: dict[str, Tensor], part: str) -> list[Tensor]:
    return [state[f"{part}.weight"], state[f"{part}.bias"]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_last_stage_has_what_all_stages_trained(root):
    head = read_trained(RunDir(root / "head"))
    assert {name.partition(".")[0] for name in head} == {"connector", "language", "head"}
    untrained = parts().state_dict()
    for part in PARTS[1:]:
        assert not same(of(head, part), of(untrained, part))


def test_what_is_frozen_is_not_rounded_to_the_precision_of_the_run(root):
    (weight, bias) = of(read_trained(RunDir(root / "head")), "connector")
    assert not torch.equal(weight, weight.bfloat16().float())
    assert weight.dtype is bias.dtype is torch.float32


def test_a_model_is_read_whole_from_the_last_stage_alone(root):
    def build() -> nn.Module:
        model = parts()
        for name, part in model.named_children():
            part.requires_grad_(name == "head")
        return model

    model = load_model(RunDir(root / "head"), build)
    kept = read_trained(RunDir(root / "head"))
    assert same(of(model.state_dict(), "connector"), of(kept, "connector"))
    assert same(of(model.state_dict(), "encoder"), of(parts().state_dict(), "encoder"))


def test_a_stage_that_goes_on_keeps_the_weights_that_it_began_with(root):
    now = of(read_trained(RunDir(root / "connector")), "connector")
    for later in ("language", "head"):
        assert not same(of(read_trained(RunDir(root / later)), "connector"), now)
    kept = [of(read_trained(RunDir(root / later)), "connector") for later in ("language", "head")]
    assert same(*kept)
