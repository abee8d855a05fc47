"""The engine over a model whose linear maps or experts are cut: it knows what each rank has of which parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcmm.config.mesh import TENSOR, Mesh
from hpcmm.config.schema import Encoders, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.engine import WholeEngine
from hpcmm.train.recipes.encoders import group_of, share_encoders
from hpcmm.train.recipes.experts import (
    count_all_experts,
    expert_groups,
    expert_parameters,
    expert_settings,
    no_expert_trains,
    own_names,
    tell_tokens,
    text_keys,
    write_experts_once,
)
from hpcmm.train.recipes.tensor import cut_parameters, gathered, shard_tensor, tensor_settings
from hpcmm.train.structure import Structure
from hpcmm.train.weights import buffers, whole_over_zero
from hpcmm.train.workload import Training


class CutEngine(WholeEngine):
    """Each rank runs the whole chain, with its part of each linear map, and its share of the experts."""

    def __init__(self, training: Training, structure: Structure, config: RunConfig, mesh: Mesh, rank: int) -> None:
        model, network = training.model, structure.network
        self._own_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._tensor_group: dist.ProcessGroup | None = None
        settings: dict[str, Any] = {}
        groups = training.parameter_groups()
        with ExitStack() as meanwhile:
            if mesh.tensor > 1:
                self._tensor_group = group_of(mesh, rank, TENSOR)
                if config.parallel.encoders is Encoders.replicated:
                    share_encoders(structure, self._tensor_group, partial=False)
                shard_tensor(model, network, self._tensor_group)
                settings |= tensor_settings(mesh.tensor)
            if mesh.expert > 1:
                settings |= expert_settings(network, structure.network_name, mesh.expert)
                groups = expert_groups(groups, network, mesh.expert)
                if not any(group.get("moe") for group in groups):
                    _check_frozen(config.parallel.zero_stage)
                    meanwhile.enter_context(no_expert_trains())
                meanwhile.enter_context(text_keys())
                meanwhile.enter_context(_described(model, network.config))
            super().__init__(training, config, mesh, rank, settings=settings, groups=groups)
        tell_tokens(self.deepspeed.module)
        if mesh.tensor > 1:  # it would send the first batch as a pickle
            self.deepspeed.first_dataloader_check.remove()
            count_all_experts(self.deepspeed.optimizer, set(expert_parameters(self.deepspeed.module)))
            write_experts_once(self.deepspeed, mesh.tensor, mesh.expert, rank)

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`Engine.weights`."""
        weights = dict(self._whole())
        assert all(value.shape == self._own_shapes[name] for name, value in weights.items())
        return {**weights, **dict(buffers(self.deepspeed.module))}

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, whole over the ranks of each axis that cuts them, in float32."""
        module: nn.Module = self.deepspeed.module
        dimensions, names, groups = cut_parameters(module), own_names(module), expert_parameters(module)
        halves: dict[str, dict[int, Tensor]] = {}
        for parameter, known_as in self.parameter_names.items():
            if not parameter.requires_grad:
                continue
            value = whole_over_zero(parameter)
            if parameter in dimensions:
                value = gathered(value, self._tensor_group, dimensions[parameter])
            if parameter in groups:
                value = gathered(value, groups[parameter], 0)
            name, half = names.get(parameter, (known_as, None))
            if half is None:
                yield name, value
                continue
            both = halves.setdefault(name, {})
            both[half] = value
            if len(both) == 2:
                yield name, torch.cat([both[0], both[1]], dim=1)
                del halves[name]


def _check_frozen(zero_stage: int) -> None:
    """Raises HpcmmError if a run whose experts are frozen could not save a checkpoint."""
    if zero_stage == 3:
        raise HpcmmError(
            "parallel.zero_stage is 3 and the experts of the language model are frozen, which DeepSpeed's AutoEP "
            "cannot save in a checkpoint: set parallel.zero_stage=2."
        )


@contextmanager
def _described(model: nn.Module, config: Any) -> Iterator[None]:
    """Give the model its network's ``config`` meanwhile: DeepSpeed reads the number of experts there."""
    absent = object()
    before = model.__dict__.get("config", absent)
    model.__dict__["config"] = config
    try:
        yield
    finally:
        if before is absent:
            del model.__dict__["config"]
        else:
            model.__dict__["config"] = before
