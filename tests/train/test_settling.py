"""When a metric has settled, from the numbers alone; and what of it is refused before the job."""

from __future__ import annotations

import math
from itertools import count

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.train_sections import Better, UntilConfig
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.train.settling import Settling


def end_of(losses: list[float], **keys: object) -> tuple[int, str] | None:
    """After which step a run with these losses has settled, and why."""
    settling = Settling(UntilConfig(metric="loss", **keys))
    for steps_done, loss in zip(count(1), losses):
        settling.see_step(steps_done, loss)
        if settling.reason is not None:
            return steps_done, settling.reason
    return None


def test_a_loss_settles_when_it_has_not_fallen_by_enough_for_long_enough():
    losses = [1.0, 0.5, 0.495, 0.494, 0.493, 0.492]
    assert end_of(losses, patience=3, min_delta=0.01, every=1) == (5, "loss has not fallen by 0.01 in 3 steps")


def test_small_falls_add_up():
    assert end_of([1.0 - 0.004 * step for step in range(50)], patience=5, min_delta=0.01, every=1) is None


def test_the_loss_is_averaged_over_some_steps_so_that_noise_ends_nothing():
    noisy = [1.0 - 0.01 * step + (0.3 if step % 2 else 0.0) for step in range(40)]
    assert end_of(noisy, patience=1, every=1) is not None
    assert end_of(noisy, patience=1, every=2) is None


def test_a_metric_of_which_more_is_better_settles_when_it_rises_no_more():
    assert end_of([0.1, 0.9, 0.5, 0.6], patience=2, every=1, mode=Better.max) == (4, "loss has not risen in 2 steps")


def test_a_score_is_better_if_it_is_higher_unless_it_is_told_otherwise():
    settling = Settling(UntilConfig(metric="auroc", patience=10))
    for steps_done, score in ((10, 0.5), (20, 0.7), (30, 0.6)):
        settling.see_score(steps_done, score)
    assert settling.reason == "auroc has not risen in 10 steps"


def test_a_loss_that_is_no_number_says_nothing():
    assert end_of([math.nan] * 20 + [math.inf] * 20, patience=2, every=1) is None
    assert end_of([1.0, math.nan, math.nan, math.nan], patience=2, every=1) is None


def test_what_was_seen_goes_through_a_checkpoint():
    until = UntilConfig(metric="loss", patience=4, every=2)
    losses = [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for cut in range(1, 8):
        settling = Settling(until)
        for steps_done, loss in enumerate(losses, 1):
            settling.see_step(steps_done, loss)
            if steps_done == cut:
                settling = Settling(until, settling.state)
        assert settling.reason == "loss has not fallen in 4 steps"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.until.patience=5"], "train.until has no metric"),
        (["train.until={metric: loss, patience: 5}"], "is looked at each 10 steps: raise it, or lower"),
        (["parallel.precision=fp16", "cluster=local"], "fp16, which needs GPUs, and cluster.gpus_per_node is 0"),
        (["train.loss_scale.initial_power=40"], "must be at most 32"),
    ],
)
def test_what_cannot_be_is_refused_before_the_job(overrides, expected):
    with pytest.raises(HpcmmError, match=expected):
        validate(compose_run(overrides))


def test_fp16_is_accepted_for_a_cluster_with_gpus():
    validate(compose_run(["cluster=a30", "parallel.precision=fp16"]))


FP8 = ["task=omni", "parallel.precision=fp8"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster=local"], "is fp8, which needs GPUs, and cluster.gpus_per_node is 0: choose parallel.precision=bf16"),
        (["cluster=a30"], "cluster.gpu_type is a30, a GPU that does not multiply in fp8: set parallel.precision=bf16"),
        (["cluster=h100_infiniband", "cluster.gpu_type=nvidia_a100-sxm4-80gb"], "does not multiply in fp8"),
        (["cluster=h100_infiniband", "parallel=tensor"], "parallel.mesh.tensor is 2, and the maps that AutoTP puts"),
        (["cluster=h100_infiniband", "parallel=3d"], "leave parallel.mesh.tensor out, or set parallel.precision=bf16"),
        (["cluster=h100_infiniband", "model.language_model.frozen=true"], "the language model is frozen: set parallel"),
        (
            ["cluster=h100_infiniband", "model.language_model.tiny.width=72"],
            "that 16 divides, but .* is 72: set",
        ),
        (["cluster=h100_infiniband", "task=anomaly"], "does not tell where it has one: set parallel.precision=bf16"),
    ],
)
def test_fp8_is_refused_before_the_job_if_a_gpu_or_the_model_cannot(overrides, expected):
    with pytest.raises(HpcmmError, match=expected):
        validate(compose_run([*FP8, *overrides]))


@pytest.mark.parametrize("words", ["parallel=zero3", "parallel=ring", "parallel=pipeline", "cluster.gpu_type=l40s"])
def test_fp8_is_accepted_for_a_language_model_that_trains_on_new_gpus(words):
    validate(compose_run([*FP8, "cluster=h100_infiniband", words]))
