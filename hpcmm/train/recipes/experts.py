"""Expert parallelism: data ranks share the experts of a mixture-of-experts network, and send each token to its experts.

DeepSpeed's AutoEP exchanges the network's feed-forward blocks. Here it is told where they are, and its parameters get
back the names and shapes that they have in the model.

Bytes: a layer sends each token to its K experts and back, and in the backward pass the gradients the same way. For a
row of S tokens of width W on P ranks, e bytes an element, that is four all-to-alls of ``S K W e (P-1)/P`` bytes if the
tokens are spread evenly, and in the forward pass one of the number of tokens for each expert, 4 bytes each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from transformers.utils import output_capturing

from hpcmm import annotate
from hpcmm.errors import HpcmmError

EXPERTS = ".mlp.experts"
"""How the names of a layer's experts end."""
_OF_EXPERTS = re.compile(r"(layer_\d+_expert|expp_rank)_\d+_")
"""How DeepSpeed names the files of a checkpoint that hold experts."""
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""How ``transformers`` names the maps of a layer's experts: (experts, 2 inner, width) and (experts, width, inner)."""


def expert_settings(network: Any, network_name: str, ranks: int) -> dict[str, Any]:
    """What makes DeepSpeed exchange the experts' blocks of ``network``, which the model has as ``network_name``.

    Raises HpcmmError if AutoEP does not know the architecture, or leaves out something that it has.
    """
    config = network.config
    preset = preset_name_for_hf_model_type(config.model_type)
    if preset is None or not hasattr(_first_experts(network), GATE_UP):
        raise HpcmmError(
            f"parallel.mesh.expert is {ranks}, but DeepSpeed's AutoEP does not know the experts of a "
            f"{config.model_type}: leave it out."
        )
    if getattr(config, "router_jitter_noise", 0.0):
        raise HpcmmError(
            "The language model has router_jitter_noise, which DeepSpeed's AutoEP leaves out: set it to 0 in its "
            "config.json, or leave parallel.mesh.expert out."
        )
    if updated := next(_updated_routers(network), None):
        raise HpcmmError(
            f"{updated} has LoRA, which DeepSpeed's AutoEP leaves out: give LoRA other maps than the router's, or "
            "leave parallel.mesh.expert out."
        )
    layers = rf"{re.escape(f'{network_name}.{network.base_model_prefix}')}\.layers\.\d+\.mlp"
    return {
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ranks,
            "preset_model": preset,
            "moe_layer_pattern": layers,
        }
    }


def _first_experts(network: Any) -> nn.Module | None:
    return next((module for name, module in network.named_modules() if name.endswith(EXPERTS)), None)


def _updated_routers(network: Any) -> Iterator[str]:
    """The parts of blocks with experts that LoRA stands beside."""
    blocks = tuple(name.removesuffix("experts") for name, _ in network.named_modules() if name.endswith(EXPERTS))
    for name, module in network.named_modules():
        if name.startswith(blocks) and hasattr(module, "base_layer"):
            yield name


def expert_groups(groups: Sequence[dict[str, Any]], network: Any, ranks: int) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer with the experts in groups of their own, which DeepSpeed asks for.

    Only those ranks that hold the same experts average their gradients.
    """
    experts = {
        parameter
        for name, module in network.named_modules()
        if name.endswith(EXPERTS)
        for parameter in module.parameters()
    }
    split = []
    for group in groups:
        own = [parameter for parameter in group["params"] if parameter in experts]
        others = [parameter for parameter in group["params"] if parameter not in experts]
        split += [{**group, "params": others}] if others else []
        split += [{**group, "params": own, "moe": True, "name": f"ep_size_{ranks}"}] if own else []
    return split


def expert_layers(module: nn.Module) -> Iterator[tuple[str, AutoEPMoELayer]]:
    """The blocks that AutoEP has put into a model, by their names."""
    for name, each in module.named_modules():
        if isinstance(each, AutoEPMoELayer):
            yield name, each


def tell_tokens(module: nn.Module) -> None:
    """Let each rank tell a profiler how many tokens its experts of a layer get, for the analysis' expert imbalance.

    AutoEP rounds each expert's number up to a multiple of 8, as its grouped maps need it.
    """

    def telling(layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def tell(_experts: nn.Module, arguments: tuple[Any, ...]) -> None:
            annotate.expert_tokens(arguments[1], layer)  # behind the tokens, sorted by expert, their numbers

        return tell

    for name, layer in expert_layers(module):
        layer.experts.register_forward_pre_hook(telling(name))


def own_names(module: nn.Module) -> dict[nn.Parameter, tuple[str, int | None]]:
    """Parameters that AutoEP has renamed: each one's name in the model, and which half of that tensor it is.

    The maps of gate and up are the two halves of one tensor, along its dimension 1.
    """
    found: dict[nn.Parameter, tuple[str, int | None]] = {}
    for name, layer in expert_layers(module):
        experts = layer.experts
        found |= {
            experts.w1: (f"{name}.experts.{GATE_UP}", 0),
            experts.w3: (f"{name}.experts.{GATE_UP}", 1),
            experts.w2: (f"{name}.experts.{DOWN}", None),
            layer.router.gate.weight: (f"{name}.gate.weight", None),
        }
    return found


def expert_parameters(module: nn.Module) -> dict[nn.Parameter, Any]:
    """The parameters of which each rank has those of its own experts, along dimension 0, and the group of all."""
    return {
        parameter: layer.ep_group
        for _, layer in expert_layers(module)
        for parameter in (layer.experts.w1, layer.experts.w2, layer.experts.w3)
    }


def count_all_experts(optimizer: Any, experts: set[nn.Parameter]) -> None:
    """Let the norm of the gradients have the experts of all ranks of a tensor group.

    ZeRO stages 1 and 2 count what is not cut on the first of these ranks alone, but each has other experts.
    """
    direct = getattr(optimizer, "get_grad_norm_direct", None)
    if direct is None:
        return

    def with_all(gradients: Any, parameters: Sequence[nn.Parameter], *rest: Any, **options: Any) -> Any:
        counted: list[Any] = [parameter for parameter in parameters if parameter in experts]
        for parameter in counted:
            parameter.model_parallel = True  # meanwhile: AutoEP would treat its gradient in another way, too
        try:
            return direct(gradients, parameters, *rest, **options)
        finally:
            for parameter in counted:
                del parameter.model_parallel

    optimizer.get_grad_norm_direct = with_all


def write_experts_once(engine: Any, tensor: int, experts: int, rank: int) -> None:
    """Let one rank alone write each file of experts in a checkpoint.

    A file is named by a rank's place on the tensor axis and among the ranks that share the experts, and both repeat
    after ``lcm(tensor, experts)`` ranks. DeepSpeed lets ranks behind these write the same file at the same time, which
    may damage it.
    """
    if rank < lcm(tensor, experts):
        return
    save = engine.checkpoint_engine.save

    def save_own(state_dict: Any, path: str) -> Any:
        if _OF_EXPERTS.match(Path(path).name):
            return True
        return save(state_dict, path)

    engine.checkpoint_engine.save = save_own


@contextmanager
def no_expert_trains() -> Iterator[None]:
    """Let ZeRO stages 1 and 2 take a model meanwhile whose experts are frozen, which they hold for a mistake."""
    settings = "_configure_moe_settings"
    before = getattr(DeepSpeedZeroOptimizer, settings)

    def none_of_experts(self: DeepSpeedZeroOptimizer) -> None:
        self.is_moe_param_group = [False] * len(self.optimizer.param_groups)

    setattr(DeepSpeedZeroOptimizer, settings, none_of_experts)
    try:
        yield
    finally:
        setattr(DeepSpeedZeroOptimizer, settings, before)


@contextmanager
def text_keys() -> Iterator[None]:
    """Let ``transformers``' registry of recorded outputs take a class by its name meanwhile, as AutoEP asks it.

    Since 5.23 it takes models alone. Without it AutoEP fails, or the router's logits are not recorded.
    """
    registry: Any = getattr(output_capturing, "_CAN_RECORD_REGISTRY", {})
    if type(registry) is dict or "default" in inspect.signature(registry.get).parameters:
        yield
        return
    before = type(registry)
    registry.__class__ = _with_text_keys(before)
    try:
        yield
    finally:
        registry.__class__ = before


def _with_text_keys(registry: type[dict[str, Any]]) -> type[dict[str, Any]]:
    class Registry(registry):  # type: ignore[misc,valid-type]
        def get(self, key: Any, default: Any = None) -> Any:
            name = key if isinstance(key, str) else str(key.__class__)
            return dict.get(self, name) or ({} if default is None else default)

        def __setitem__(self, key: Any, outputs: Any) -> None:
            dict.__setitem__(self, key if isinstance(key, str) else str(key.__class__), outputs)

    return Registry
