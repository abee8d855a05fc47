"""What must hold of optimizer, precision and the end of training, as far as it is known without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcmm.config.mesh import TENSOR
from hpcmm.config.parts import TARGET, class_attribute, part_name
from hpcmm.config.schema import Executor, Precision, RunConfig
from hpcmm.config.train_sections import UntilConfig

WHOLE_PARAMETERS = "whole_parameters"
"""Class attribute of an optimizer whose step of an element depends on the whole parameter, such as its norm."""
_OF_WHOLE_PARAMETERS = frozenset({"torch.optim.Adafactor", "torch.optim.Muon"})
_WITH_A_CLOSURE = frozenset({"torch.optim.LBFGS"})
_ON_GPUS = ("bitsandbytes.",)
_WITHOUT_FP8 = re.compile(
    r"(?<![a-z0-9])(p100|v100s?|t4|a10|a16|a30|a40|a100|a800|a[456]000|mi[12]\d0x?)(?![a-z0-9])", re.IGNORECASE
)
"""Types of GPUs as Slurm and sites call them. A rank asks its GPU itself."""

_GPU_DEVICES = ("nvidia[0-9]*", "kfd")
"""What the drivers of GPUs make in ``/dev``."""


def optimisation_problems(config: RunConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong with how the run is to be trained."""
    train = config.train
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas is {train.betas}, but must be two numbers from 0 to below 1."
    yield from _optimizer(config)
    yield from _precision(config)
    yield from _until(config)


def _precision(config: RunConfig) -> Iterator[str]:
    precision, cluster = config.parallel.precision, config.cluster
    if precision not in (Precision.fp16, Precision.fp8):
        return
    otherwise = "choose parallel.precision=bf16 or fp32"
    if not cluster.gpus_per_node:
        yield f"parallel.precision is {precision}, which needs GPUs, and cluster.gpus_per_node is 0: {otherwise}."
    elif cluster.executor is Executor.local and not any(any(Path("/dev").glob(name)) for name in _GPU_DEVICES):
        yield f"parallel.precision is {precision}, which needs a GPU, and this machine has none: {otherwise}."
    elif precision is Precision.fp8 and _WITHOUT_FP8.search(cluster.gpu_type or ""):
        yield (
            f"parallel.precision is fp8, and cluster.gpu_type is {cluster.gpu_type}, a GPU that does not multiply in "
            "fp8: set parallel.precision=bf16, or choose a cluster of newer GPUs."
        )


def _until(config: RunConfig) -> Iterator[str]:
    until = config.train.until
    if until.metric is None:
        if until != UntilConfig():
            yield "train.until has no metric: give train.until.metric=loss, a part of the loss, or a score."
    elif until.patience < until.every and not config.train.evaluate_every:
        yield (
            f"train.until.patience is {until.patience}, but {until.metric} is looked at each {until.every} steps: "
            "raise it, or lower train.until.every."
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    """A sentence for each way in which the optimizer does not fit the run."""
    part = config.optimizer
    if not isinstance(part, Mapping) or config.task._target_ is None:
        return
    name, target = part_name(part), str(part.get(TARGET))
    if target in _WITH_A_CLOSURE:
        yield f"optimizer={name} evaluates the loss several times a step, which no run can: choose optimizer=adamw."
    if target.startswith(_ON_GPUS) and not config.cluster.gpus_per_node:
        yield (
            f"optimizer={name} runs on GPUs alone, and cluster.gpus_per_node is 0: choose another cluster, or "
            "optimizer=adamw."
        )
    if not needs_whole_parameters(part):
        return
    if config.parallel.zero_stage > 0:
        yield (
            f"optimizer={name} needs each parameter whole, and ZeRO stage {config.parallel.zero_stage} gives a rank "
            "pieces of flattened ones: set parallel.zero_stage=0, or choose optimizer=adamw."
        )
    if (degree := config.parallel.mesh.get(TENSOR, 1)) != 1:
        yield (
            f"optimizer={name} needs each parameter whole, and parallel.mesh.tensor={degree} cuts them: leave it out, "
            "or choose optimizer=adamw."
        )


def needs_whole_parameters(part: Mapping[str, Any]) -> bool:
    """Whether the optimizer's step would be another one if it saw a parameter in flattened pieces."""
    target = str(part.get(TARGET))
    if target.startswith("torch."):
        return target in _OF_WHOLE_PARAMETERS
    return class_attribute(part, WHOLE_PARAMETERS) is True
