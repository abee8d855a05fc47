"""What is watched of a run while it trains: its scores on held-out data, and whether its metric has settled."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from hpcmm import annotate
from hpcmm.annotate.stopping import StopRequest
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.train.checkpoint import random_state, restore_random_state
from hpcmm.train.engine import Engine
from hpcmm.train.settling import Settling
from hpcmm.train.workload import Training

log = logging.getLogger("hpcmm.train")
_LOSS = "loss"


def score(training: Training, engine: Engine, *, final: bool) -> dict[str, float]:
    """The scores on held-out data, of which rank 0's count. All ranks call it together."""
    with annotate.phase("evaluate"):
        training.merge_rank_state()
        return training.evaluate(engine.model, engine.data_rank, engine.mesh.data, final=final)


class Watch:
    """The scores of ``train.evaluate_every``, and ``train.until``. All ranks call each method together."""

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        engine: Engine,
        metrics: MetricsWriter,
        state: dict[str, Any] | None = None,
    ) -> None:
        """``state``: what :attr:`state` was when the checkpoint was saved that the run goes on from."""
        self._train = config.train
        self._training = training
        self._engine = engine
        self._metrics = metrics
        known = state or {}
        self._settling = Settling(config.train.until, known.get("settling"))
        self._evaluated = int(known.get("evaluated", 0))

    @property
    def settled(self) -> str | None:
        """Why the run has settled; None if it has not."""
        return self._settling.reason

    @property
    def state(self) -> dict[str, Any]:
        """All that is known, for a checkpoint."""
        return {"settling": self._settling.state, "evaluated": self._evaluated}

    def agree(self, request: StopRequest, steps_done: int, values: dict[str, float]) -> bool:
        """Whether the ranks are asked to stop; and see what the step's metric is over all ranks, if it is asked for."""
        metric = self._train.until.metric
        if metric is None or self.settled is not None or metric not in values:
            self._check_metric(metric, values)
            return request.agreed()
        weight = values.get("tokens", 1.0)
        stop, (total, weights) = request.agreed_with([values[metric] * weight, weight])
        self._settling.see_step(steps_done, total / weights if weights else float("nan"))
        return stop

    def _check_metric(self, metric: str | None, values: dict[str, float]) -> None:
        if metric is not None and metric not in values and not self._train.evaluate_every:
            parts = ", ".join(sorted({_LOSS, *values} - {"tokens"}))
            raise HpcmmError(
                f"train.until.metric is {metric}, but the steps have {parts}: choose one of these, or set "
                "train.evaluate_every if it is a score on held-out data."
            )

    def evaluate(self, steps_done: int) -> None:
        """Score the held-out data, if that is due after so many steps and not done. Random numbers go on as before."""
        every = self._train.evaluate_every
        comes_anyway = self._train.evaluate and steps_done == self._train.steps
        if not every or steps_done == 0 or steps_done % every or comes_anyway or self._evaluated == steps_done:
            return
        before = random_state()
        shared = [score(self._training, self._engine, final=False)]
        restore_random_state(before)
        dist.broadcast_object_list(shared, src=0)
        scores = {name: float(value) for name, value in shared[0].items()}
        self._evaluated = steps_done
        self._metrics.evaluated(steps_done, **scores)
        if dist.get_rank() == 0:
            said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            log.info("after step %d, on held-out data: %s", steps_done, said or "no scores")
        self._see(steps_done, scores)

    def _see(self, steps_done: int, scores: dict[str, float]) -> None:
        metric = self._train.until.metric
        if metric in scores:
            self._settling.see_score(steps_done, scores[metric])

    def note_settled(self, steps_done: int) -> None:
        """Say that the run ends here."""
        self._metrics.settled(steps_done, self.settled or "")
        if dist.get_rank() == 0:
            log.info("settled after step %d: %s", steps_done, self.settled)
