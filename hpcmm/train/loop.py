"""The training loop of one rank: annotated steps over a DeepSpeed engine."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch

from hpcmm import annotate
from hpcmm.bootstrap.environment import RankEnvironment
from hpcmm.bootstrap.metrics import MetricsWriter
from hpcmm.config import RunConfig
from hpcmm.run_dir import RunDir
from hpcmm.train.anomaly import AnomalyTask
from hpcmm.train.engine import build_engine
from hpcmm.train.progress import Progress

log = logging.getLogger("hpcmm.train")


def train(
    config: RunConfig, run: RunDir, place: RankEnvironment, device: torch.device, metrics: MetricsWriter
) -> dict[str, float]:
    """Train ``config.train.steps`` steps, save a checkpoint that loads again. Returns the scores before and after."""
    with metrics.startup("model and data"):
        task = AnomalyTask(config, device)
    with metrics.startup("engine"):
        engine = build_engine(task.model, config)
    try:
        scores = _score(task, engine, config, place, "before")
        _run_steps(task, engine, config, run, place, metrics)
        scores |= _score(task, engine, config, place, "after")
        if place.rank == 0 and scores:
            run.evaluation.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        metrics.end(**scores)
        return scores
    finally:
        engine.destroy()  # or gloo's threads may abort the process at its end


def _run_steps(
    task: AnomalyTask,
    engine: deepspeed.DeepSpeedEngine,
    config: RunConfig,
    run: RunDir,
    place: RankEnvironment,
    metrics: MetricsWriter,
) -> None:
    batches = task.batches(place.rank, place.world_size)
    with Progress(config, shown=place.rank == 0) as progress:
        for step in range(config.train.steps):
            began = time.perf_counter()
            with annotate.step(step):
                values = _step(task, engine, batches, config)
                if _checkpoint_due(step, config):
                    with annotate.phase("checkpoint"):
                        save_checkpoint(engine, run, step + 1)
            step_s = time.perf_counter() - began
            metrics.step(step, **values, step_s=step_s)
            progress.advance(step, values["loss"], step_s)


def _step(
    task: AnomalyTask, engine: deepspeed.DeepSpeedEngine, batches: Iterator[Any], config: RunConfig
) -> dict[str, float]:
    """One optimizer step. Returns this rank's mean loss over its micro-batches, and the loss' parts."""
    totals: dict[str, float] = {}
    rounds = config.train.gradient_accumulation_steps
    for _ in range(rounds):
        with annotate.phase("data"):
            batch = next(batches)
        with annotate.phase("forward", batch):
            loss, parts = task.loss(engine, batch)
        with annotate.phase("backward"):
            engine.backward(loss)
        with annotate.phase("optimizer"):
            engine.step()
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0.0) + float(value) / rounds
    return totals


def _checkpoint_due(step: int, config: RunConfig) -> bool:
    every = config.train.checkpoint_every
    return step + 1 == config.train.steps or (every > 0 and (step + 1) % every == 0)


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, run: RunDir, steps_done: int) -> None:
    """All ranks save their part; the frozen encoders, which come from their own files, are left out."""
    engine.save_checkpoint(
        str(run.checkpoints),
        tag=f"step_{steps_done:06d}",
        client_state={"steps_done": steps_done},
        exclude_frozen_parameters=True,
    )


def _score(
    task: AnomalyTask, engine: deepspeed.DeepSpeedEngine, config: RunConfig, place: RankEnvironment, when: str
) -> dict[str, float]:
    if not config.train.evaluate:
        return {}
    with annotate.phase("evaluate"):
        scores = task.evaluate(engine, place.rank, place.world_size)
    if place.rank == 0:
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("%s training, on held-out images: %s", when, said)
    return {f"{name}_{when}": value for name, value in scores.items()}
