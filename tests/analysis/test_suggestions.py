"""What is suggested to a run of one of hpcmm's recipes: keys that exist, and that this recipe takes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from hpcmm.analysis.advice import WITHOUT_PYTHON
from hpcmm.analysis.findings import Finding
from hpcmm.analysis.suggestions import suggest
from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump
from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.config.validate import validate

EXPERTS = "model/language_model=tiny_mixtral"
RUNS = {
    "ddp": ["parallel=ddp"],
    "zero1": ["parallel=zero1"],
    "zero3": ["parallel=zero3"],
    "zero3, replicated encoders": ["parallel=zero3", "parallel.encoders=replicated"],
    "zero3_offload": ["parallel=zero3_offload"],
    "zero3 on NVMe": ["parallel=zero3_offload", "parallel.offload_optimizer=nvme", "parallel.nvme_path=/local"],
    "ulysses": ["parallel=ulysses"],
    "ulysses in bf16": ["parallel=ulysses", "parallel.precision=bf16"],
    "ring": ["parallel=ring", "parallel.precision=bf16"],
    "pipeline": ["parallel=pipeline"],
    "pipeline in bf16": ["parallel=pipeline", "parallel.precision=bf16"],
    "tensor": ["parallel=tensor"],
    "tensor in bf16": ["parallel=tensor", "parallel.precision=bf16"],
    "expert": ["parallel=expert", EXPERTS],
    "expert x tensor": ["parallel=expert", "parallel.mesh.tensor=2", "parallel.zero_stage=1", EXPERTS],
    "3d": ["parallel=3d"],
}
TRANSFERS = {
    "ddp": ["gradients"],
    "zero1": ["gradients"],
    "zero3": ["gradients", "sharded parameters"],
    "zero3_offload": ["gradients", "sharded parameters"],
    "ulysses": ["gradients", "sequence parts"],
    "ring": ["gradients", "sequence parts"],
    "pipeline": ["gradients", "pipeline sends"],
    "tensor": ["gradients", "activations"],
    "expert": ["gradients", "tokens of experts"],
    "expert x tensor": ["gradients", "activations", "tokens of experts"],
    "3d": ["gradients", "activations", "pipeline sends"],
}
"""What moves in a recipe, beside small messages."""


def configuration(folder: Path, overrides: list[str]) -> dict:
    """As the analysis reads it of the run."""
    config = compose_run(overrides)
    validate(config)
    dump(config, folder / "config.yaml")
    return dict(read_untyped_config(folder / "config.yaml"))


def overrides_of(name: str, ranks_per_node: int) -> list[str]:
    size = ["cluster.nodes=4", f"cluster.ranks_per_node={ranks_per_node}", "cluster.gpus_per_node=0"]
    return ["task=omni", "cluster=local_slurm", *size, "train.micro_batch_size=4", *RUNS[name]]


def transfer(moves: str, bound: str, *, is_in_node: bool = False) -> Finding:
    return Finding(
        "transfer", "", 1.0, None, "", "forward", "", "high", moves=moves, bound=bound, is_in_node=is_in_node
    )


@pytest.mark.few(6)
@pytest.mark.parametrize("name", RUNS)
def test_a_transfer_is_advised_keys_that_exist_and_that_the_recipe_takes(name: str, tmp_path):
    overrides = overrides_of(name, ranks_per_node=1)
    config = configuration(tmp_path, overrides)
    moved = TRANSFERS.get(name) or TRANSFERS[re.split(" in | on |, ", name)[0]]
    told = {
        suggest(transfer(moves, bound, is_in_node=is_in_node), config)
        for moves, bound, is_in_node in product([*moved, "small messages"], ("", "latency", "bandwidth"), (False, True))
    }
    for each in told:
        keys = re.findall(r"[a-z_.]+=[^\s,]+", each)
        assert keys, each
        validate(compose_run([*overrides, *keys]))


def test_small_messages_of_hpcmms_own_are_not_the_users_to_fuse(tmp_path):
    config = configuration(tmp_path, overrides_of("zero1", 2))
    assert suggest(transfer("small messages", "latency"), config) == "train.micro_batch_size=8"
    assert suggest(transfer("small messages", "latency"), {"cluster": {}}).startswith("fuse small collectives")


def test_a_pipeline_of_hpcmms_is_advised_its_own_keys(tmp_path):
    config = configuration(tmp_path, [*overrides_of("pipeline", 2), "train.gradient_accumulation_steps=4"])
    bubble = Finding("bubble", "", 1.0, None, "", "", "", "medium")
    assert suggest(bubble, config) == "train.micro_batch_size=2 train.gradient_accumulation_steps=8"
    stage = Finding(
        "stage", "", 1.0, None, "", "", "", "high", moves="move about 10% of the work of stage 1 to stage 0"
    )
    told = suggest(stage, config)
    assert told.endswith("to stage 0: parallel.pipeline_layers=[...], the layers of each stage")
    assert "PipelineModule" in suggest(stage, {"cluster": {}})


def test_a_group_that_spans_nodes_is_advised_nodes_with_whole_groups(tmp_path):
    config = configuration(tmp_path, overrides_of("expert x tensor", 1))
    tensor, expert = (suggest(transfer(moves, ""), config) for moves in ("activations", "tokens of experts"))
    assert tensor == "cluster.nodes=2 cluster.ranks_per_node=2, so that each tensor group lies within a node"
    assert expert == "cluster.nodes=1 cluster.ranks_per_node=4, so that each expert group lies within a node"


def test_what_takes_zero_3_is_set_back_with_it(tmp_path):
    config = configuration(tmp_path, overrides_of("zero3_offload", 2))
    assert suggest(transfer("sharded parameters", ""), config) == (
        "parallel.zero_stage=2 parallel.offload_parameters=none"
    )


def test_without_zero_no_size_of_a_bucket_is_advised(tmp_path):
    config = configuration(tmp_path, overrides_of("ddp", 2))
    assert suggest(transfer("gradients", "latency"), config) == "train.gradient_accumulation_steps=2"


def test_uneven_experts_of_hpcmms_are_not_advised_a_loss_that_it_refuses(tmp_path):
    config = configuration(tmp_path, overrides_of("expert", 2))
    told = suggest(Finding("experts", "", 1.0, None, "", "", "", "medium"), config)
    assert told.endswith("parallel.mesh.expert=1")


@pytest.mark.parametrize(
    ("phase", "advice"),
    [
        ("run_validation", "evaluate on all ranks"),
        ("doEval", "evaluate on all ranks"),
        ("log metrics", "log less often"),
        ("wandb.log", "log less often"),
        ("write retrieval index latest", "share it out over all ranks"),
        ("load data", "num_workers"),
        ("save_checkpoint", "async_save"),
    ],
)
def test_the_advice_against_work_of_one_rank_alone_is_that_of_the_thing(phase: str, advice: str) -> None:
    assert advice in suggest(Finding("solo", "", 1.0, 0, "node1", phase, "", "high"), {})


SLOW_RANK = Finding("compute", "", 1.0, 1, "node1", "forward", "", "high", is_only_node=True)


def test_other_users_of_a_node_on_which_all_ranks_run_are_the_last_thing_to_look_for() -> None:
    told = suggest(SLOW_RANK, {})
    assert told.startswith("if it stays with the rank in another run, so do its samples")
    assert told.index("py-spy") < told.index("top")
    without = suggest(SLOW_RANK, {}, framework=WITHOUT_PYTHON)
    assert "py-spy" not in without
    assert "nsys profile --sample=process-tree" in without
    computes = suggest(replace(SLOW_RANK, gpu_excess="computes"), {})
    assert "nvidia-smi" in computes


OF_SLURM = re.compile("sbatch|srun|SLURM")
NO_SLURM = {
    "node": (replace(SLOW_RANK, is_only_node=False), "leave node1 out of the nodes that you launch on"),
    "cores": (Finding("imbalance", "", 1.0, None, "", "", "", "low"), "numactl"),
    "stall": (Finding("stall", "", 1.0, 1, "node1", "", "", "high"), "on node1: dmesg"),
    "network": (Finding("interruption", "", 1.0, None, "", "", "", "medium"), "on each node: ip -s link"),
    "slow node": (Finding("transfer", "", 1.0, None, "node1", "", "", "high"), "on node1: ip -s link"),
    "slow link": (Finding("transfer", "", 1.0, None, "", "", "", "high", is_slow=True), "on each node: ip -s link"),
    "unseen": (Finding("unseen", "", 1.0, None, "", "", "", "low"), "torchrun --no-python"),
}


@pytest.mark.parametrize(("finding", "told"), NO_SLURM.values(), ids=NO_SLURM)
def test_a_run_that_slurm_did_not_start_is_advised_none_of_its_commands(finding: Finding, told: str) -> None:
    assert OF_SLURM.search(suggest(finding, {}))
    for framework in ("", WITHOUT_PYTHON):
        assert not OF_SLURM.search(suggest(finding, {}, framework=framework, has_slurm=False))
    assert told in suggest(finding, {}, has_slurm=False)
    assert not OF_SLURM.search(suggest(finding, {"cluster": {"executor": "local", "nodes": 1}}))
