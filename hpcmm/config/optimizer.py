"""Which optimizers fit which run: what can be known of a class from its name and its source text, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpcmm.config.mesh import TENSOR
from hpcmm.config.parts import TARGET, class_attribute, part_name
from hpcmm.config.schema import RunConfig

WHOLE_PARAMETERS = "whole_parameters"
"""Class attribute of an optimizer whose step of an element depends on the whole parameter, such as its norm."""
_OF_WHOLE_PARAMETERS = frozenset({"torch.optim.Adafactor", "torch.optim.Muon"})
_WITH_A_CLOSURE = frozenset({"torch.optim.LBFGS"})
_ON_GPUS = ("bitsandbytes.",)


def optimizer_problems(config: RunConfig) -> Iterator[str]:
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
