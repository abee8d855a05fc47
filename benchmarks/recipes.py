"""Steps of hpcmm's recipes beside the same model under DeepSpeed calls written by hand, by turns.

    python benchmarks/recipes.py [ddp zero1 ... pipeline] [--runs 11] [--steps 16] [--json FILE]

For each recipe two ranks make the omni-modal workload's tiny model twice, from one seed: once by the recipe, and once
by ``deepspeed.initialize`` and a loop of forward, backward and step, with the same settings, data and optimizer. In
each turn both run ``--steps`` steps, in alternating order. Prints the processor time of a step, user and system, summed
over the ranks, and what hpcmm's costs as a multiple of the other.

By hand, tensor parallelism is AutoTP and expert parallelism AutoEP, both in DeepSpeed's configuration (the latter with
hpcmm's repair for the newest ``transformers``), and a pipeline is ``PipelineModule`` over the same chain of layers, cut
at the same place, with the batch read by both ends and no sum for tied embeddings. DeepSpeed has no ring attention, and
its Ulysses takes no packed rows: those recipes have nobody to be compared with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring
from measuring import Row, ratio, summary

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.recipe import recipe_of
from hpcmm.config.validate import validate
from hpcmm.files import read_json_object, write_json

RECIPES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "tensor", "expert", "pipeline")
RANKS = 2
CONFIGURATION = (
    "cluster=local",
    f"cluster.ranks_per_node={RANKS}",
    "task=omni",
    "train.evaluate=false",
    "train.schedule=constant",
    "train.micro_batch_size=4",
)
OF_RECIPE = {
    "expert": ("model/language_model=tiny_mixtral",),
    "pipeline": ("train.gradient_accumulation_steps=4",),
}
"""What a recipe needs besides its name."""
LANGUAGE_MODEL_ALONE = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r"trunk\.lm\..*\.([qkv]|gate|up)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r"trunk\.lm\..*\.(o|down)_proj\.weight$"], "partition_type": "row"},
    ],
}
"""What AutoTP is to cut: by itself it would cut the encoders, too, and their shapes would not fit any more."""


def run(recipe: str, options: argparse.Namespace) -> Row:
    """Start the ranks, and return what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*CONFIGURATION, f"parallel={recipe}", *OF_RECIPE.get(recipe, ()), f"runs_root={folder}"]
        config = compose_run(overrides)
        validate(config)
        config_file.dump(config, Path(folder) / "config.yaml")
        program = [__file__, recipe, f"--runs={options.runs}", f"--steps={options.steps}", f"--rank-in={folder}"]
        failed = measuring.run_ranks(program, RANKS, TORCHDYNAMO_DISABLE="1")  # its import takes seconds of each rank
        if any(failed):
            sys.exit(f"{recipe}: ranks ended with {failed}")
        return read_json_object(Path(folder) / "row.json")


def run_rank(recipe: str, options: argparse.Namespace) -> None:
    """One rank: both by turns."""
    from hpcmm.node.cache import extensions_dir  # noqa: PLC0415
    from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415
    from hpcmm.worker.distributed import leave_group, select_accelerator  # noqa: PLC0415

    config = config_file.load(Path(options.rank_in) / "config.yaml")
    select_accelerator()
    load_ops(extensions_dir(config.cluster))
    import deepspeed  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    contestants = [by_hand(config), by_recipe(config)]
    for contestant in contestants:
        steps_s(contestant, options.steps)  # warm
    turns: list[list[float]] = []
    for turn in range(options.runs):
        times = {place: steps_s(contestants[place], options.steps) for place in ((0, 1), (1, 0))[turn % 2]}
        both = torch.tensor([times[0], times[1]], dtype=torch.float64)
        dist.all_reduce(both)
        turns.append((both / options.steps).tolist())
    if dist.get_rank() == 0:
        write_json(Path(options.rank_in) / "row.json", row(recipe, turns))
    leave_group()


def steps_s(steps: Iterator[None], count: int) -> float:
    """Processor seconds of this rank."""
    began = time.process_time()
    for _ in range(count):
        next(steps)
    return time.process_time() - began


def row(recipe: str, turns: list[list[float]]) -> Row:
    """Seconds of a step on all ranks together, and hpcmm's as a multiple of the other's."""
    hand_s, recipe_s = zip(*turns, strict=True)
    ratios = [ratio(ours, theirs) or 0.0 for theirs, ours in turns]
    found: Row = {"recipe": recipe, "turns": len(turns), **summary(hand_s, "s", "hand")}
    return (
        found
        | summary(recipe_s, "s", "hpcmm")
        | {"times_the_cost": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    )


def made(config: Any) -> Any:
    """The workload's half with model and data."""
    import torch  # noqa: PLC0415

    from hpcmm.config.workload import workload_of  # noqa: PLC0415

    workload = workload_of(config)
    assert workload is not None
    return workload.training(config, torch.device("cpu"))


def by_recipe(config: Any) -> Iterator[None]:
    """hpcmm's engine, a step at a time."""
    import torch.distributed as dist  # noqa: PLC0415

    from hpcmm.train.recipes import build  # noqa: PLC0415

    training, mesh = made(config), recipe_of(config).mesh(config)
    engine = build(training, config, mesh, dist.get_rank())
    return _endless(engine.step, training.batches(engine.data_rank, mesh.data, 0))


def by_hand(config: Any) -> Iterator[None]:
    """DeepSpeed's engine, driven by the calls that its documentation shows."""
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    training, mesh = made(config), recipe_of(config).mesh(config)
    if mesh.pipeline > 1:
        return pipeline_by_hand(config, training)
    engine = initialized(config, training)
    rounds = config.train.gradient_accumulation_steps

    def step(batches: Iterator[Any]) -> float:
        micro_batches = [next(batches) for _ in range(rounds)]
        tokens = torch.tensor(float(sum(batch.labelled for batch in micro_batches)))
        dist.all_reduce(tokens)
        total = 0.0
        for batch in micro_batches:
            loss = engine(batch).total
            engine.backward(loss * (rounds * RANKS / tokens))
            engine.step()
            total += float(loss.detach())
        return total

    place = mesh.coordinates(dist.get_rank())["data"]
    return _endless(step, training.batches(place, mesh.data, 0))


def initialized(config: Any, training: Any) -> Any:
    """``deepspeed.initialize`` with the recipe's settings."""
    import deepspeed  # noqa: PLC0415

    from hpcmm.train.engine import deepspeed_config  # noqa: PLC0415
    from hpcmm.train.optimizers import build_optimizer  # noqa: PLC0415
    from hpcmm.train.recipes.experts import expert_groups, expert_settings, text_keys  # noqa: PLC0415

    model, settings, mesh = training.model, deepspeed_config(config), recipe_of(config).mesh(config)
    structure, groups = training.structure(), training.parameter_groups()
    if mesh.tensor > 1:
        settings["tensor_parallel"] = {"autotp_size": mesh.tensor, "partition_config": LANGUAGE_MODEL_ALONE}
    if mesh.expert > 1:
        settings |= expert_settings(structure.network, structure.network_name, mesh.expert)
        groups = expert_groups(groups, structure.network, mesh.expert)
        model.config = structure.network.config
    with text_keys():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(config, model, groups), config=settings, dist_init_required=False
        )
    if mesh.tensor > 1:  # it compares the ranks' first batches, and takes no class but its own structures
        engine.first_dataloader_check.remove()
    return engine


def pipeline_by_hand(config: Any, training: Any) -> Iterator[None]:
    """``PipelineModule`` and ``train_batch``: both stages read the micro-batches, as DeepSpeed's own examples do."""
    import deepspeed  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from deepspeed.pipe import PipelineModule  # noqa: PLC0415

    from hpcmm.train.engine import deepspeed_config  # noqa: PLC0415
    from hpcmm.train.optimizers import build_optimizer  # noqa: PLC0415
    from hpcmm.train.recipes import stages  # noqa: PLC0415

    chain = stages.chain_of(training.structure())
    first, last = chain[0], chain[-1]
    module = PipelineModule(chain, num_stages=RANKS, partition_method="uniform", dynamic_shape=True)
    own = {id(parameter) for parameter in module.parameters()}
    groups = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) in own]}
        for group in training.parameter_groups()
    ]
    optimizer = build_optimizer(config, module, [group for group in groups if group["params"]])
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
    )
    rounds = config.train.gradient_accumulation_steps
    nothing = torch.zeros(1)

    def step(batches: Iterator[Any]) -> float:
        micro_batches = [next(batches) for _ in range(rounds)]
        if dist.get_rank() == 0:
            first.waiting.extend(micro_batches)
        last.share = rounds / sum(batch.labelled for batch in micro_batches)
        loss = float(engine.train_batch(iter([(nothing, nothing)] * rounds)))
        last.found.clear()
        return loss

    return _endless(step, training.batches(0, 1, 0))


def _endless(step: Any, batches: Iterator[Any]) -> Iterator[None]:
    while True:
        step(batches)
        yield


def main() -> None:
    """Print a line a recipe."""
    parser = measuring.parser(__doc__)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []], metavar="RECIPE", help="default: all")
    parser.add_argument("--runs", type=measuring.positive, default=11, help="turns (default: 11)")
    parser.add_argument("--steps", type=measuring.positive, default=16, help="steps of a turn (default: 16)")
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        run_rank(options.recipes[0], options)
        return
    found = []
    for recipe in options.recipes or RECIPES:
        found.append(run(recipe, options))
        print(text_of(found[-1]), flush=True)
    measuring.write(options.json, "recipes", found)


def text_of(found: Row) -> str:
    """One line."""
    return (
        f"{found['recipe']}: by hand {found['hand_median_s']:.3f} s a step, hpcmm {found['hpcmm_median_s']:.3f} s; "
        f"{found['times_the_cost']:.3f} times the cost ({found['least']:.3f} to {found['most']:.3f} in "
        f"{found['turns']} turns)"
    )


if __name__ == "__main__":
    main()
