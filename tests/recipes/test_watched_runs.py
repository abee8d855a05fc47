"""A run ends when its metric has settled, is scored while it trains, and skips steps that overflow fp16: two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from real_ranks import run_ranks
from torch import nn

from hpcmm.annotate.stopping import STOP
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig
from hpcmm.config.workload import Workload
from hpcmm.errors import HpcmmError
from hpcmm.runs.metrics import Settled, read_settled
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.sampling import EndlessSampler
from hpcmm.train.workload import Training
from hpcmm.worker.__main__ import is_finished

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("compiled_ops")]
XS = torch.linspace(-1, 1, 16)[:, None]
UNTIL_LOSS = ["train.until={metric: loss, patience: 6, min_delta: 0.01, every: 2}"]


class Line(Training):
    """Learns y = 3 x. ``fit``, its score, is known to rank 0 alone, and draws random numbers."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._train = config.train
        self.model = nn.Linear(1, 1).to(device)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.5)

    def batches(self, rank: int, world_size: int, first: int) -> Iterator[torch.Tensor]:
        for batch in EndlessSampler(len(XS), self._train.micro_batch_size, rank, world_size, self._train.seed, first):
            yield XS[[number % len(XS) for number in batch]] + 0 * torch.rand(1)

    def loss(self, engine: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = (engine(batch.to(self._dtype())).float() - 3 * batch).square().mean()
        return error, {"error": error.detach()}

    @torch.no_grad()
    def evaluate(self, engine: Any, rank: int, _world_size: int, **_: bool) -> dict[str, float]:
        fit = -float((engine(XS.to(self._dtype())).float() - 3 * XS).square().mean()) + 0 * float(torch.rand(1))
        return {"fit": fit} if rank == 0 else {}

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class LineWorkload(Workload):
    def training_class(self) -> type[Training]:
        return Line


def config_of(*overrides: str) -> RunConfig:
    usual = ["train.steps=40", "train.learning_rate=0.3", "train.warmup_steps=0", "train.schedule=constant"]
    return compose_run(["cluster=local", "cluster.ranks_per_node=2", *usual, *overrides])


def train_here(rank: int, run: RunDir, *overrides: str) -> list[dict[str, Any]]:
    """On a rank: train, from the newest checkpoint on. Returns this rank's records of this attempt."""
    from hpcmm.runs.metrics import MetricsWriter
    from hpcmm.train.loop import train
    from hpcmm.worker.environment import RankEnvironment

    config, file = config_of(*overrides), run.rank_metrics(rank)
    rank_env = RankEnvironment(rank, rank, 2, 2, "0", "here", "127.0.0.1", 1)
    known = len(file.read_text().splitlines()) if file.exists() else 0
    with MetricsWriter(file) as metrics:
        train(LineWorkload(), config, run, rank_env, torch.device("cpu"), metrics)
    return [json.loads(line) for line in file.read_text().splitlines()[known:]]


def error_of(rank: int, run: RunDir, *overrides: str) -> str:
    try:
        train_here(rank, run, *overrides)
    except HpcmmError as error:
        return str(error)
    return ""


def new_run(folder: Path) -> RunDir:
    run = RunDir(folder)
    run.create()
    return run


def events(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == event]


# Until its metric has settled.


def settling_ranks(rank: int, root: Path) -> dict[str, Any]:
    import torch.distributed as dist

    facts: dict[str, Any] = {}
    whole, cut, scored = (RunDir(root / name) for name in ("whole", "cut", "scored"))
    facts["whole"] = train_here(rank, whole, *UNTIL_LOSS)
    facts["again"] = train_here(rank, whole, *UNTIL_LOSS)
    for stops in (1, 2, 3):  # after one step each
        dist.barrier()
        (cut.root / STOP).touch()
        facts[f"stop {stops}"] = train_here(rank, cut, *UNTIL_LOSS)
    dist.barrier()
    (cut.root / STOP).unlink(missing_ok=True)
    facts["cut"] = train_here(rank, cut, *UNTIL_LOSS)
    until_fit = ["train.until={metric: fit, patience: 4, min_delta: 0.01}", "train.evaluate_every=2"]
    facts["scored"] = train_here(rank, scored, *until_fit)
    facts["unknown"] = error_of(rank, RunDir(root / "unknown"), "train.until={metric: lost, patience: 20}")
    return facts


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory, compiled_ops: None) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("settled")
    for name in ("whole", "cut", "scored", "unknown"):
        new_run(root / name)
    return root, run_ranks(2, settling_ranks, root)


def test_a_run_ends_when_its_loss_has_settled_on_all_ranks_after_the_same_step(settled):
    root, ranks = settled
    ends = [events(facts["whole"], "settled") for facts in ranks]
    assert ends[0][0]["steps_done"] == ends[1][0]["steps_done"] < 40
    assert len(events(ranks[0]["whole"], "step")) == ends[0][0]["steps_done"]
    assert ends[0][0]["reason"].startswith("loss has not fallen by 0.01 in ")
    assert "fit_after" in events(ranks[0]["whole"], "end")[0]
    assert read_settled(RunDir(root / "whole")) == Settled(ends[0][0]["steps_done"], ends[0][0]["reason"])
    assert not RunDir(root / "whole").stopped.exists()


def test_what_settles_is_the_mean_over_the_ranks(settled):
    _, ranks = settled
    losses = [[step["loss"] for step in events(facts["whole"], "step")] for facts in ranks]
    assert losses[0] != losses[1]
    means = [sum(both) / 2 for both in zip(*losses, strict=True)]
    looks = [(means[at] + means[at + 1]) / 2 for at in range(0, len(means) - 1, 2)]
    best, best_at = looks[0], 0
    for at, value in enumerate(looks):
        if best - value > 0.01:
            best, best_at = value, at
    assert events(ranks[0]["whole"], "settled")[0]["steps_done"] == 2 * (best_at + 1) + 6


def test_a_run_that_has_settled_trains_no_step_when_it_is_started_again(settled):
    root, ranks = settled
    assert events(ranks[0]["again"], "step") == []
    assert "fit_after" in events(ranks[0]["again"], "end")[0]
    config = config_of(*UNTIL_LOSS)
    config.task._target_ = "hpcmm.workloads.anomaly.workload.AnomalyWorkload"
    assert is_finished(config, RunDir(root / "whole"))


def test_what_was_seen_before_a_stop_counts_after_it(settled):
    _, ranks = settled
    assert [len(events(ranks[0][f"stop {number}"], "step")) for number in (1, 2, 3)] == [1, 1, 1]
    for facts in ranks:
        said = [(end["steps_done"], end["reason"]) for end in events([*facts["whole"], *facts["cut"]], "settled")]
        assert said[0] == said[1]


def test_a_score_of_rank_0_ends_the_run_on_all_ranks(settled):
    _, ranks = settled
    for facts in ranks:
        (end,) = events(facts["scored"], "settled")
        assert end["reason"].startswith("fit has not risen by 0.01 in 4 steps")
        scores = {record["steps_done"]: record["fit"] for record in events(facts["scored"], "evaluate")}
        assert list(scores) == list(range(2, end["steps_done"] + 1, 2))
        assert scores[end["steps_done"]] - scores[end["steps_done"] - 4] <= 0.01


def test_a_metric_that_there_is_not_is_named_with_those_that_there_are(settled):
    _, ranks = settled
    said = (
        "train.until.metric is lost, but the steps have error, loss: choose one of these, or set train.evaluate_every"
    )
    assert all(facts["unknown"].startswith(said) for facts in ranks)


# Scores while it trains.


def scored_ranks(rank: int, root: Path) -> dict[str, Any]:
    import torch.distributed as dist

    facts: dict[str, Any] = {}
    every, plain, cut = (RunDir(root / name) for name in ("every", "plain", "cut"))
    facts["every"] = train_here(rank, every, "train.steps=6", "train.evaluate_every=2")
    facts["plain"] = train_here(rank, plain, "train.steps=6")
    dist.barrier()
    (cut.root / STOP).touch()
    facts["stopped"] = train_here(rank, cut, "train.steps=3", "train.evaluate_every=1")
    dist.barrier()
    (cut.root / STOP).unlink(missing_ok=True)
    facts["resumed"] = train_here(rank, cut, "train.steps=3", "train.evaluate_every=1")
    facts["refused"] = error_of(rank, RunDir(root / "fp16"), "parallel.precision=fp16")
    facts["fp16"] = fp16_here(rank, RunDir(root / "fp16"))
    return facts


def fp16_here(rank: int, run: RunDir) -> list[dict[str, Any]]:
    """In the processor's own fp16."""
    from deepspeed.accelerator import get_accelerator

    supported = mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True)
    with supported, mock.patch("hpcmm.train.engine.check_fp16"):
        scale = "train.loss_scale={initial_power: 18, window: 3}"
        return train_here(rank, run, "parallel.precision=fp16", "train.steps=12", "train.schedule=cosine", scale)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, compiled_ops: None) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("scored")
    for name in ("every", "plain", "cut", "fp16"):
        new_run(root / name)
    return run_ranks(2, scored_ranks, root)


def test_scores_while_training_change_no_step(scored):
    for facts in scored:
        assert [record["steps_done"] for record in events(facts["every"], "evaluate")] == [2, 4]  # 6 is the last one
        losses = [[step["loss"] for step in events(facts[name], "step")] for name in ("every", "plain")]
        assert losses[0] == losses[1]


def test_scores_that_a_stop_left_no_time_for_come_when_the_run_goes_on(scored):
    assert events(scored[0]["stopped"], "evaluate") == []
    assert [record["steps_done"] for record in events(scored[0]["resumed"], "evaluate")] == [1, 2]


def test_fp16_on_a_processor_is_refused_in_a_sentence(scored):
    assert scored[1]["refused"] == (
        "parallel.precision is fp16, which needs a GPU, and this rank trains on the processor: choose "
        "parallel.precision=bf16 or fp32."
    )


def test_a_step_that_overflows_fp16_is_skipped_and_counted_and_the_scale_halves(scored):
    steps = events(scored[0]["fp16"], "step")
    skipped = [step["skipped_steps"] for step in steps]
    assert skipped[0] == 1
    assert skipped[-1] < len(steps)
    scales = [step["loss_scale"] for step in steps]
    assert scales[0] == 2**17
    for before, after in pairwise(zip(scales, skipped, strict=True)):
        is_skipped = after[1] > before[1]
        assert after[0] == before[0] / 2 if is_skipped else after[0] in (before[0], 2 * before[0])
    assert steps[-1]["loss"] < steps[0]["loss"]
