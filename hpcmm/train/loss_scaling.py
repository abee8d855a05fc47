"""fp16: the loss is scaled so that small gradients stay above zero, and a step whose gradients overflow is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from hpcmm.config.schema import Precision, RunConfig
from hpcmm.errors import HpcmmError

_AT_THE_MINIMUM = "loss scale already at minimum"
"""In DeepSpeed's words."""


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
        raise HpcmmError(
            "parallel.precision is fp16, which needs a GPU, and this rank trains on the processor: choose "
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
