"""Tensor parallelism: neighbours hold parts of a network's linear maps, and together they are the whole network.

Which map is cut by its columns (outputs) and which by its rows (inputs) is what ``transformers`` says of the network's
architecture (``base_model_tp_plan``). The maps themselves are those of DeepSpeed's AutoTP. They are put in place within
the network alone, so that an encoder with like names is never cut. Embedding and output map stay whole on each rank.
M. Shoeybi et al., "Megatron-LM", 2019.

Bytes: for a row of S tokens of width W, e bytes an element, a layer takes four all-reduces of ``S W e`` bytes: one
behind attention and one behind the feed-forward network, and in the backward pass one in front of each. AutoTP as it
comes takes seven: the maps that share an input, such as those of queries, keys and values, sum its gradient one by one.
With LoRA of rank r, a map cut by rows takes one more of ``S r e`` bytes, and one cut by columns one of the gradient of
its first factor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import (
    ColumnParallel,
    LinearAllreduce,
    LinearLayer,
    collect_autotp_universal_checkpoint_info,
    set_autotp_mode,
)
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError

COLUMN, ROW, SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
OF_EXPERTS = frozenset({"packed_colwise", "moe_tp_experts"})
"""Styles of experts, which are divided by the axis ``expert``."""


def tensor_settings(ranks: int) -> dict[str, Any]:
    """What DeepSpeed has to know of a model whose network :func:`shard_tensor` has cut."""
    return {"tensor_parallel": {"autotp_size": ranks}}


def shard_tensor(model: Any, network: Any, group: dist.ProcessGroup) -> None:
    """Cut the linear maps of ``network``, a part of ``model``, between the ranks of ``group``.

    These have the same weights, and must get the same rows. The parameters stay the same objects, under the same names.
    Raises HpcmmError if the network cannot be cut like this.
    """
    _check_heads(network, dist.get_world_size(group))
    set_autotp_mode(training=True)
    inputs: dict[str, SharedInput] = {}
    for name, style in list(_planned(network)):
        module = network.get_submodule(name)
        if style == SUMMED:
            sum_gradients(module.parameters(), group)
            continue
        for path, part, cut in _maps(module, name, style):
            if cut == SUMMED:
                sum_gradients(part.parameters(), group)
            else:
                network.set_submodule(path, _cut(part, path, cut, group))
        if style == COLUMN:
            parent = name.rpartition(".")[0]
            inputs.setdefault(parent, SharedInput(group)).serve(network.get_submodule(name))
    model.universal_checkpoint_info = collect_autotp_universal_checkpoint_info(model)
    model.ds_autotp_parsed = True  # DeepSpeed looks for no more maps by itself


def cut_parameters(module: nn.Module) -> dict[nn.Parameter, int]:
    """The parameters that :func:`shard_tensor` has cut, and the dimension of each that it cut."""
    found: dict[nn.Parameter, int] = {}
    for each in module.modules():
        if isinstance(each, LinearLayer):
            found |= {parameter: 0 for parameter in (each.weight, each.bias) if parameter is not None}
        elif isinstance(each, LinearAllreduce):
            found[each.weight] = 1
    return found


def gathered(part: Tensor, group: Any, dimension: int) -> Tensor:
    """The whole of what the ranks of ``group`` have parts of, along ``dimension``. A collective of these."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dimension)


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Of parameters whose gradient on each rank of ``group`` is a part of the whole: sum the parts."""

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(summed)  # type: ignore[no-untyped-call]


class ColumnMap(LinearLayer):  # type: ignore[misc]
    """AutoTP's map cut by columns, without the sum of its input's gradient, which :class:`SharedInput` does once."""

    def forward(self, given: Tensor) -> Tensor:
        """(..., inputs) to this rank's (..., outputs / ranks)."""
        return functional.linear(given, self.weight, self.bias)


class SharedInput:
    """What the maps of one module that are cut by columns take: those that get the same tensor share the sum of its
    gradient over the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._maps = 0
        self._left = 0
        self._given: Tensor | None = None
        self._entered: Tensor | None = None

    def serve(self, module: nn.Module) -> None:
        """Prepare what ``module`` is called with."""
        self._maps += 1
        module.register_forward_pre_hook(self._enter)

    def _enter(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        given = arguments[0]
        if given is not self._given:
            self._given, self._left = given, self._maps
            self._entered = ColumnParallel.apply(self._group, given)
        entered = self._entered
        self._left -= 1
        if self._left == 0:  # else the row's activations would live on until the next
            self._given = self._entered = None
        return (entered, *arguments[1:])


def _planned(network: Any) -> Iterator[tuple[str, str]]:
    """The modules within the network that its architecture cuts, each with its style."""
    plan: dict[str, str] = getattr(network.config, "base_model_tp_plan", None) or {}
    if not plan:
        raise HpcmmError(
            f"{type(network).__name__} does not say which of its linear maps are cut by rows and which by columns "
            "(base_model_tp_plan): leave parallel.mesh.tensor out."
        )
    unknown = sorted(set(plan.values()) - {COLUMN, ROW, SUMMED} - OF_EXPERTS)
    if unknown:
        raise HpcmmError(
            f"{type(network).__name__} has maps that are to be cut as {unknown[0]!r}, which is not supported: leave "
            "parallel.mesh.tensor out."
        )
    patterns = [
        (re.compile(re.escape(f"{network.base_model_prefix}.{pattern}").replace(r"\*", r"\d+")), style)
        for pattern, style in plan.items()
        if style not in OF_EXPERTS
    ]
    for name, _ in network.named_modules():
        for pattern, style in patterns:
            if pattern.fullmatch(name):
                yield name, style


def _maps(module: Any, name: str, style: str) -> Iterator[tuple[str, nn.Module, str]]:
    """The linear maps that a planned module consists of: itself, or with LoRA the map and its two factors.

    The first factor of a map cut by columns stays whole. It feeds this rank's columns alone, so that its gradient is a
    part of the whole. The second factor of a map cut by rows stays whole, too, behind the sum over the ranks.
    """
    if isinstance(module, nn.Linear):
        yield name, module, style
        return
    base, first = getattr(module, "base_layer", None), getattr(module, "lora_A", None)
    if not isinstance(base, nn.Linear) or not isinstance(first, nn.ModuleDict):
        raise HpcmmError(
            f"{name} is a {type(module).__name__}, and only linear maps, with or without LoRA, can be cut: leave "
            "parallel.mesh.tensor out."
        )
    if getattr(module, "lora_variant", None):
        raise HpcmmError(
            f"{name} has a variant of LoRA, such as DoRA, that looks at whole weights: leave parallel.mesh.tensor out, "
            "or use plain LoRA."
        )
    yield f"{name}.base_layer", base, style
    for adapter in first:
        yield f"{name}.lora_A.{adapter}", first[adapter], SUMMED if style == COLUMN else ROW
        if style == COLUMN:
            yield f"{name}.lora_B.{adapter}", module.lora_B[adapter], COLUMN


def _cut(module: nn.Module, name: str, style: str, group: dist.ProcessGroup) -> nn.Module:
    assert isinstance(module, nn.Linear)
    ranks, size = dist.get_world_size(group), module.out_features if style == COLUMN else module.in_features
    if size % ranks:
        raise HpcmmError(
            f"parallel.mesh.tensor is {ranks}, but {name} has {size} {'outputs' if style == COLUMN else 'inputs'}: "
            "choose a divisor."
        )
    made: nn.Module = (ColumnMap if style == COLUMN else LinearAllreduce)(module, group, name=name)
    return made


def _check_heads(network: Any, ranks: int) -> None:
    """Raises HpcmmError if the heads do not divide; their maps would, through the middle of a head."""
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(network.config, key, None)
        if heads is not None and heads % ranks:
            raise HpcmmError(
                f"parallel.mesh.tensor is {ranks}, but the language model's {key} is {heads}: choose a divisor."
            )
