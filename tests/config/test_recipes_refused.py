"""What a recipe refuses before anything is submitted, each with its reason and what to do instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcmm.config.mesh import SIZES
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.recipe import Recipe, recipe_of
from hpcmm.config.schema import (
    ClusterConfig,
    Encoders,
    Offload,
    ParallelConfig,
    Precision,
    RunConfig,
    SequenceAttention,
)
from hpcmm.errors import HpcmmError

DENSE = ModelShape(layers=4, width=64, heads=4, kv_heads=2, head_width=16, intermediate=128, vocabulary=512)
EXPERTS = ModelShape(4, 64, 4, 2, 16, 128, 512, experts=4, experts_per_token=2)
ALL = frozenset(SIZES)


def problems(parallel: ParallelConfig, ranks: int = 8, axes: frozenset[str] = ALL, shape: ModelShape = DENSE) -> str:
    config = RunConfig(cluster=ClusterConfig(name="test", ranks_per_node=ranks), parallel=parallel)
    return "\n".join(Recipe().problems(config, axes, shape))


@pytest.mark.parametrize(
    ("parallel", "reason", "remedy"),
    [
        (ParallelConfig(mesh={"pipeline": 2}), "gradients from micro-batch to micro-batch", "parallel.zero_stage=1"),
        (
            ParallelConfig(mesh={"pipeline": 2}, zero_stage=0, precision=Precision.bf16),
            "checkpoints DeepSpeed cannot load",
            "parallel.zero_stage=1",
        ),
        (ParallelConfig(mesh={"pipeline": 8}, zero_stage=1), "has 4 layers", "at most 4"),
        (ParallelConfig(mesh={"pipeline": 2}, zero_stage=1, pipeline_layers=[4]), "for 2 stages", "one for each"),
        (ParallelConfig(mesh={"pipeline": 2}, zero_stage=1, pipeline_layers=[4, 0]), "without layers", "at least 1"),
        (ParallelConfig(mesh={"pipeline": 2}, zero_stage=1, pipeline_layers=[2, 3]), "is 5 layers", "sum to that"),
        (ParallelConfig(pipeline_layers=[4]), "one stage", "leave it out"),
        (ParallelConfig(mesh={"tensor": 4}), "4 heads and 2 of keys and values", "a divisor of both"),
        (ParallelConfig(mesh={"sequence": 8}), "4 heads, which Ulysses", "parallel.attention=ring"),
        (ParallelConfig(mesh={"expert": 2}), "has no experts", "leave it out"),
        (ParallelConfig(mesh={"sequence": 2, "tensor": 2}), "attention heads", "set one of them to 1"),
        (ParallelConfig(mesh={"pipeline": 2, "sequence": 2}, zero_stage=1), "whole sequences", "one of them to 1"),
        (ParallelConfig(zero_stage=0, offload_optimizer=Offload.cpu), "no optimizer states", "zero_stage to 1, 2 or 3"),
        (ParallelConfig(offload_parameters=Offload.cpu), "stage 3 divides parameters", "parallel.zero_stage=3"),
        (ParallelConfig(zero_stage=3, offload_optimizer=Offload.nvme), "nvme_path is not given", "name a folder"),
        (
            ParallelConfig(zero_stage=3, offload_optimizer=Offload.nvme, nvme_path="nvme"),
            "nvme_path is 'nvme', which would be a folder of wherever the job runs",
            "give the whole path",
        ),
        (ParallelConfig(encoders=Encoders.replicated), "divides none", "parallel.zero_stage=3"),
        (ParallelConfig(mesh={"tensor": 3}), "3 ranks", "change one of them"),
    ],
)
def test_a_combination_that_cannot_hold_is_refused(parallel, reason, remedy):
    said = problems(parallel)
    assert reason in said
    assert remedy in said


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(mesh={"expert": 2}, zero_stage=0, precision=Precision.bf16), "parallel.zero_stage=1"),
        (ParallelConfig(mesh={"expert": 2}, zero_stage=0, precision=Precision.fp16), "parallel.zero_stage=1"),
        (ParallelConfig(mesh={"expert": 2}, zero_stage=0), "clips by each rank's own norm"),
        (
            ParallelConfig(mesh={"expert": 2, "tensor": 2}, offload_optimizer=Offload.cpu),
            "leave parallel.mesh.tensor out",
        ),
        (ParallelConfig(mesh={"expert": 2, "tensor": 2}, zero_stage=3), "parallel.zero_stage=2"),
        (ParallelConfig(mesh={"expert": 8}), "4 experts a layer"),
        (ParallelConfig(mesh={"tensor": 2}), "add parallel.mesh.expert"),
        (ParallelConfig(mesh={"pipeline": 2, "expert": 2}, zero_stage=1), "one of them to 1"),
    ],
)
def test_experts_have_rules_of_their_own(parallel, words):
    assert words in problems(parallel, shape=EXPERTS)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(zero_stage=3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu),
        ParallelConfig(mesh={"sequence": 4}),
        ParallelConfig(mesh={"sequence": 8}, attention=SequenceAttention.ring),
        ParallelConfig(mesh={"pipeline": 2, "tensor": 2}, zero_stage=1),
    ],
)
def test_what_holds_is_not_refused(parallel):
    assert problems(parallel) == ""


def test_frozen_experts_that_zero_divides_could_not_be_saved():
    parallel = ParallelConfig(mesh={"expert": 2}, zero_stage=3)
    assert problems(parallel, shape=EXPERTS) == ""
    assert "frozen" in problems(parallel, shape=replace(EXPERTS, frozen=True))
    assert problems(replace(parallel, zero_stage=2), shape=replace(EXPERTS, frozen=True)) == ""


def test_a_model_that_cannot_be_cut_is_named_with_what_it_can():
    said = problems(ParallelConfig(mesh={"tensor": 2}), axes=frozenset({"data", "pipeline"}))
    assert "cannot be cut along tensor" in said
    assert "data, pipeline" in said


class Halves(Recipe):
    """A recipe of a user's own."""

    def problems(self, config, axes, shape):  # noqa: ARG002
        yield "halves are all that it does"


def test_a_recipe_of_a_users_own_is_a_class_that_a_file_names():
    named = RunConfig(parallel=ParallelConfig(_target_=f"{__name__}.Halves"))
    assert list(recipe_of(named).problems(named, ALL, None)) == ["halves are all that it does"]
    with pytest.raises(HpcmmError, match="is not a recipe: it must be a subclass of"):
        recipe_of(RunConfig(parallel=ParallelConfig(_target_="hpcmm.config.mesh.Mesh")))


def test_tensor_parallelism_needs_feed_forward_networks_that_divide():
    odd = ModelShape(layers=4, width=64, heads=4, kv_heads=4, head_width=16, intermediate=130, vocabulary=512)
    assert "130 wide" in problems(ParallelConfig(mesh={"tensor": 4}), shape=odd)


def test_encoders_are_not_kept_whole_of_a_model_that_tells_none():
    whole = ParallelConfig(zero_stage=3, encoders=Encoders.replicated)
    assert "does not tell one from the other: leave it out" in problems(whole, axes=frozenset({"data"}), shape=None)
    assert problems(whole) == ""
