"""Model -> engine: DeepSpeed with ZeRO, precision, optimizer and learning-rate schedule, and one step of it."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcmm import annotate
from hpcmm.config.mesh import DATA, Mesh
from hpcmm.config.schema import Offload, ParallelConfig, RunConfig, Schedule, TrainConfig
from hpcmm.train.optimizers import build_optimizer
from hpcmm.train.precision import check_fp16, sixteen_bits
from hpcmm.train.weights import buffers, load_trained, trained_weights
from hpcmm.train.workload import Training, trained_parameters

_COMPILER_OFF = "TORCHDYNAMO_DISABLE"


def build_engine(
    model: nn.Module,
    config: RunConfig,
    groups: Sequence[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    mpu: Any = None,
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine over the parameters of ``model`` that are to be trained.

    ``groups``: these parameters as an optimizer takes them, see :meth:`Training.parameter_groups`; None: in one group.
    ``settings``: what is added to DeepSpeed's configuration. ``mpu``: who shares what, as DeepSpeed takes it.
    """
    check_fp16(config)
    trained = trained_parameters(model)
    train = config.train
    optimizer = build_optimizer(config, model, [{"params": trained}] if groups is None else groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(train))
    with _no_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config={**deepspeed_config(config), **(settings or {})},
            mpu=mpu,
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
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clip,
        "zero_allow_untested_optimizer": True,  # hpcmm.config.optimizer refuses those that ZeRO would change
        "zero_force_ds_cpu_optimizer": False,  # any of these may be offloaded
        "steps_per_print": 2**62,  # the loop prints
        **sixteen_bits(config),
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.allgather_bucket_size,
            "overlap_comm": parallel.overlap_comm,
            "contiguous_gradients": True,
            **_offload(parallel),
        },
    }


def _offload(parallel: ParallelConfig) -> dict[str, Any]:
    """Where ZeRO keeps what it has divided. The loop's optimizer works on it there."""
    places = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_parameters}
    pinned = {"pin_memory": torch.cuda.is_available()}
    path = {} if parallel.nvme_path is None else {"nvme_path": parallel.nvme_path}
    return {key: {"device": str(place), **pinned, **path} for key, place in places.items() if place is not Offload.none}


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


class Engine(ABC):
    """What the loop drives: a model that a recipe has spread over the ranks. All ranks call each method together."""

    deepspeed: deepspeed.DeepSpeedEngine
    """For its checkpoints, and its optimizer."""
    mesh: Mesh

    def __init__(self, training: Training, config: RunConfig, mesh: Mesh, rank: int) -> None:
        self.training = training
        self.mesh = mesh
        self.rounds = config.train.gradient_accumulation_steps
        self.data_rank = mesh.coordinates(rank)[DATA]
        """Which part of each global batch this rank sees; the ranks that share a model see the same."""

    @abstractmethod
    def step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over the next micro-batches, annotated. Returns the loss and its parts.

        The loss is the mean over this rank's examples, or its tokens, whichever :meth:`Training.tokens` counts; these
        are in ``tokens`` then, those of one data rank.
        """

    @property
    @abstractmethod
    def model(self) -> Any:
        """What runs the model for scores: it is called as the model is, and has ``eval()`` and ``train()``."""

    @property
    def parameter_names(self) -> dict[nn.Parameter, str]:
        """The names of this rank's parameters in the workload's own model."""
        return {parameter: name for name, parameter in self.deepspeed.module.named_parameters()}

    @property
    def device(self) -> torch.device:
        """The rank's."""
        return torch.device(self.deepspeed.device)

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole, in float32, and the buffers, by their names in the workload's own model.

        A collective of all ranks. Rank 0 has all of them.
        """
        return {**dict(trained_weights(self.parameter_names)), **dict(buffers(self.deepspeed.module))}

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from what DeepSpeed saved in ``folder``. Returns what the loop saved with it. A collective."""
        _, state = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name, custom_load_fn=load_trained)
        return dict(state)

    def destroy(self) -> None:
        """Let go of DeepSpeed's threads and groups; without it gloo's threads may abort the process at its end."""
        self.deepspeed.destroy()


class WholeEngine(Engine):
    """The model as one module on each rank: each runs forward and backward, then all step."""

    def __init__(  # noqa: PLR0913 -- what recipes differ in
        self,
        training: Training,
        config: RunConfig,
        mesh: Mesh,
        rank: int,
        *,
        settings: dict[str, Any] | None = None,
        mpu: Any = None,
        sequence_group: dist.ProcessGroup | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """``settings``: what a recipe adds to DeepSpeed's configuration. ``mpu``: its groups, as DeepSpeed takes them.

        ``groups``: the parameters in groups for the optimizer, if they differ from the training's.
        ``sequence_group``: the ranks that divide this rank's sequences. They are data ranks to DeepSpeed.
        """
        super().__init__(training, config, mesh, rank)
        self.deepspeed = build_engine(
            training.model, config, training.parameter_groups() if groups is None else groups, settings, mpu
        )
        self._averaged = mesh.data * mesh.sequence  # what DeepSpeed divides the sum of the ranks' gradients by
        self._sequence_group = sequence_group

    @property
    def model(self) -> Any:
        """DeepSpeed's engine."""
        return self.deepspeed

    def step(self, batches: Iterator[Any]) -> dict[str, float]:
        """See :class:`Engine`."""
        batch = self._next(batches)
        if self.training.tokens(batch) is None:
            return self._step_of_means(batch, batches)
        return self._step_of_sums([batch, *(self._next(batches) for _ in range(self.rounds - 1))])

    def _next(self, batches: Iterator[Any]) -> Any:
        with annotate.phase("data"):
            return next(batches)

    def _step_of_means(self, batch: Any, batches: Iterator[Any]) -> dict[str, float]:
        """Each micro-batch counts the same, and is asked for when the one before is done."""
        totals: dict[str, float] = {}
        for number in range(self.rounds):
            batch = batch if number == 0 else self._next(batches)
            with annotate.phase("forward", batch):
                loss, parts = self.training.loss(self.deepspeed, batch)
            self._update(loss)
            for name, value in {"loss": loss.detach(), **parts}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / self.rounds
        return totals

    def _step_of_sums(self, micro_batches: list[Any]) -> dict[str, float]:
        """Each token of the global batch counts the same, whichever rank and micro-batch it is in."""
        tokens = sum(self.training.tokens(batch) or 0 for batch in micro_batches)
        counted = CountedTokens(tokens, self.mesh, self.device)
        total, sums = 0.0, dict[str, float]()
        for batch in micro_batches:
            with annotate.phase("forward", batch):
                loss, parts = self.training.loss(self.deepspeed, batch)
                # DeepSpeed divides by the micro-batches of a step and by the ranks.
                share = loss * (self.rounds * self._averaged / counted.over_ranks())
            self._update(share)
            total += float(loss.detach())
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / self.rounds
        return {"loss": self._over_sequence(total) / max(1, tokens), **sums, "tokens": tokens}

    def _over_sequence(self, total: float) -> float:
        """The sum of what the ranks that divide a sequence have of its loss."""
        if self._sequence_group is None:
            return total
        with annotate.phase("agree"):
            whole = torch.tensor(total, dtype=torch.float64, device=self.device)
            dist.all_reduce(whole, group=self._sequence_group)
            return whole.item()

    def _update(self, loss: Tensor) -> None:
        with annotate.phase("backward"):
            self.deepspeed.backward(loss)
        with annotate.phase("optimizer"):
            self.deepspeed.step()


class CountedTokens:
    """The labelled tokens of a step over all ranks: asked for at once, and waited for when they are needed."""

    def __init__(self, tokens: int, mesh: Mesh, device: torch.device) -> None:
        """``tokens``: those of this rank's micro-batches, which the ranks that share a model all have."""
        self._sharing = mesh.model_parallel
        self._sum = torch.tensor(float(tokens), dtype=torch.float64, device=device)
        self._work = dist.all_reduce(self._sum, async_op=True)

    def over_ranks(self) -> Tensor:
        """A scalar, at least 1: no token at all makes a loss of 0, not of nan."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._sum = (self._sum / self._sharing).clamp_(min=1).float()
        return self._sum
