"""Model -> DeepSpeed engine: ZeRO, precision, optimizer and learning-rate schedule, as the configuration says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from hpcmm.config.schema import Precision, RunConfig, Schedule, TrainConfig
from hpcmm.train.workload import trained_parameters

_COMPILER_OFF = "TORCHDYNAMO_DISABLE"


def build_engine(
    model: nn.Module, config: RunConfig, groups: Sequence[dict[str, Any]] | None = None
) -> deepspeed.DeepSpeedEngine:
    """The engine over the parameters of ``model`` that are to be trained.

    ``groups``: these parameters as an optimizer takes them, see :meth:`Training.parameter_groups`; None: in one group.
    """
    trained = trained_parameters(model)
    train = config.train
    optimizer = torch.optim.AdamW(
        [{"params": trained}] if groups is None else groups,
        lr=train.learning_rate,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(train))
    with _no_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
    return engine


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Keep ``torch.compile`` off meanwhile.

    DeepSpeed decorates an optimizer with it that no run here uses, and would import PyTorch's whole compiler for it:
    1.8 s of each rank's 6 s start, measured.
    """
    before = os.environ.get(_COMPILER_OFF)
    os.environ[_COMPILER_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_COMPILER_OFF]
        else:
            os.environ[_COMPILER_OFF] = before


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration of this run."""
    parallel, train = config.parallel, config.train
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clip,
        "steps_per_print": 2**62,  # the loop prints
        "bf16": {"enabled": parallel.precision is Precision.bf16},
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.allgather_bucket_size,
            "overlap_comm": parallel.overlap_comm,
            "contiguous_gradients": True,
        },
    }


def learning_rate_factor(train: TrainConfig) -> Callable[[int], float]:
    """What the learning rate is multiplied by at a step: a linear warm-up to 1, then the schedule down to 0.

    Cosine as in Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.
    """

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        if train.schedule is Schedule.constant:
            return 1.0
        done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor
