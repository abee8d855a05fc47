"""Number formats of fewer bits than float32, as DeepSpeed is told of them; and the linear maps of fp8.

fp16: the loss is scaled so that small gradients stay above zero, and a step whose gradients overflow is skipped.

fp8: torchao multiplies in 8 bits what a network's layers spend most of their time on, their linear maps, and their
gradients. Each tensor gets a scale of its own whenever it is multiplied, so that its largest element is the largest
number of its format: E4M3 for inputs and weights, E5M2 for gradients (Micikevicius et al., "FP8 Formats for Deep
Learning", 2022). All else is as in bf16: parameters, gradients, float32 master weights, collectives and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hpcmm.config.recipe import FP8_MULTIPLE
from hpcmm.config.schema import Precision, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.workload import Training

_AT_THE_MINIMUM = "loss scale already at minimum"
"""In DeepSpeed's words."""
_LEAST_CAPABILITY = (9, 4) if torch.version.hip else (8, 9)
"""Compute capability of the first GPUs that multiply in fp8: Ada of NVIDIA's, MI300 of AMD's."""
_ROUTERS = frozenset({"gate", "router"})
"""Names of maps that choose a token's experts, which a rounded product would choose otherwise."""
_NOT_FP8 = "set parallel.precision=bf16"


def sixteen_bits(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's sections on formats of 16 bits. fp8 is bf16 to it: what multiplies in 8 bits, it need not know."""
    return {
        "bf16": {"enabled": config.parallel.precision in (Precision.bf16, Precision.fp8)},
        "fp16": fp16_settings(config),
    }


def fp16_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's section ``fp16``."""
    scale = config.train.loss_scale
    return {
        "enabled": config.parallel.precision is Precision.fp16,
        "loss_scale": 0,  # a dynamic one
        "initial_scale_power": scale.initial_power,
        "loss_scale_window": scale.window,
        "min_loss_scale": scale.least,
        "hysteresis": 1,  # each overflow halves it
    }


def check_fp16(config: RunConfig) -> None:
    """Raises HpcmmError if the run asks for fp16 and this rank has no GPU: few processors can, and these slowly."""
    if config.parallel.precision is Precision.fp16 and get_accelerator().device_name() == "cpu":
        raise _needs_a_gpu(Precision.fp16)


def _needs_a_gpu(precision: Precision) -> HpcmmError:
    return HpcmmError(
        f"parallel.precision is {precision}, which needs a GPU, and this rank trains on the processor: choose "
        "parallel.precision=bf16 or fp32."
    )


def noted(engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> dict[str, float]:
    """For the metrics of a step in fp16: the scale of the next one, and how many steps of the run were skipped."""
    if config.parallel.precision is not Precision.fp16:
        return {}
    return {"loss_scale": float(engine.optimizer.loss_scale), "skipped_steps": engine.skipped_steps}


@contextmanager
def said_clearly(config: RunConfig) -> Iterator[None]:
    """Raises HpcmmError in place of DeepSpeed's exception when no smaller scale is left."""
    try:
        yield
    except Exception as error:
        if _AT_THE_MINIMUM not in str(error):
            raise
        raise HpcmmError(
            f"The gradients overflow fp16 even at the smallest scale of the loss, {config.train.loss_scale.least}: the "
            "training diverges. Lower train.learning_rate, or train in parallel.precision=bf16 or fp32."
        ) from error


def multiply_in_fp8(training: Training, config: RunConfig, device: torch.device, *, emulated: bool = False) -> int:
    """Let the linear maps of the language model's layers multiply in fp8, as far as they train. Returns how many do.

    In place, with the same parameters under the same names: call it before a recipe cuts the model, or shards its
    parameters. Embedding and output map, encoders, routers, grouped experts, the factors of LoRA, what is frozen, and
    maps whose widths 16 does not divide stay as they are in bf16.

    ``emulated``: round as a GPU would, and multiply in float32, which any device can; for tests.
    Raises HpcmmError if this rank has no GPU for it, its Python no torchao, or the model no such map.
    """
    if not emulated:
        _check_gpu(device)
    structure = training.structure()
    layers = nn.Module() if structure is None else structure.network.model.layers
    chosen = {name for name, module in layers.named_modules() if _multiplies_in_fp8(name, module)}
    if not chosen:
        raise HpcmmError(
            "parallel.precision is fp8, but the model has no language model in whose layers a linear map trains whose "
            f"widths {FP8_MULTIPLE} divides: {_NOT_FP8}."
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415 -- for fp8 alone
    except ImportError as error:
        raise HpcmmError(
            "parallel.precision is fp8, which takes the package torchao, and this rank's Python cannot import it "
            f"({error}): install it there by `pip install 'torchao>=0.16'`, or {_NOT_FP8}."
        ) from error
    # A gradient of weights sums over tokens, whose number 16 must divide, too: zeros are put behind them.
    settings = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    convert_to_float8_training(layers, config=settings, module_filter_fn=lambda _module, name: name in chosen)
    if config.parallel.zero_stage == 3 and not config.parallel.activation_checkpointing:  # which saves no weights
        for name in chosen:
            _save_no_copy(layers.get_submodule(name))
    return len(chosen)


def _multiplies_in_fp8(name: str, module: nn.Module) -> bool:
    if type(module) is not nn.Linear or not module.weight.requires_grad:
        return False
    parts = name.split(".")
    apart = not _ROUTERS.isdisjoint(parts) or any(part.startswith("lora_") for part in parts)
    return not apart and module.in_features % FP8_MULTIPLE == 0 and module.out_features % FP8_MULTIPLE == 0


def _check_gpu(device: torch.device) -> None:
    """Raises HpcmmError if this rank's device does not multiply in fp8."""
    if device.type != "cuda":
        raise _needs_a_gpu(Precision.fp8)
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        has, least = (".".join(map(str, each)) for each in (capability, _LEAST_CAPABILITY))
        raise HpcmmError(
            f"parallel.precision is fp8, which takes a GPU of compute capability {least} or later, and this rank's "
            f"{torch.cuda.get_device_name(device)} has {has}: {_NOT_FP8}, or choose other GPUs."
        )


def _save_no_copy(linear: nn.Module) -> None:
    """Let a map save its parameter for the backward pass, and not the tensor that is in it.

    ZeRO stage 3 gathers a parameter for the forward pass, lets go of it, and gathers it again for the backward pass.
    torchao saves the transposed view, which would keep all gathered weights until then.
    """
    forward: Any = linear.forward

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.untyped_storage().data_ptr() == _weight(linear).untyped_storage().data_ptr() else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return _weight(linear).t() if kept is None else kept

    def saving_no_copy(given: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            found: Tensor = forward(given)
        return found

    linear.forward = saving_no_copy


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight
