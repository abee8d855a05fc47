"""The training loop of one rank: annotated steps over a DeepSpeed engine."""

from __future__ import annotations

import logging
import signal
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from rich.progress import Progress as Bar
from torch import nn

from hpcmm import annotate
from hpcmm.annotate.ranges import close_window
from hpcmm.annotate.stopping import StopRequest
from hpcmm.config.recipe import recipe_of
from hpcmm.config.schema import Precision, RunConfig
from hpcmm.config.workload import Workload
from hpcmm.errors import HpcmmError
from hpcmm.runs.metrics import MetricsWriter, Settled, write_scores, write_settled
from hpcmm.runs.run_dir import RunDir
from hpcmm.train import precision
from hpcmm.train.checkpoint import Checkpoints
from hpcmm.train.engine import Engine
from hpcmm.train.group_names import name_process_groups
from hpcmm.train.recipes import build
from hpcmm.train.throughput import Throughput, note_device
from hpcmm.train.watching import Watch, score
from hpcmm.train.workload import Training
from hpcmm.worker.environment import RankEnvironment

log = logging.getLogger("hpcmm.train")


def train(
    workload: Workload,
    config: RunConfig,
    run: RunDir,
    rank_env: RankEnvironment,
    device: torch.device,
    metrics: MetricsWriter,
) -> dict[str, float]:
    """Train ``workload`` until ``config.train.steps`` steps are done, from the newest checkpoint on if there is one.

    Returns the scores before and after training; none when it was asked to stop before its last step.
    """
    with metrics.startup("model and data"):
        training = _checked(workload.training(config, device))
        checkpoints = Checkpoints(run, rank_env, config.train.keep_checkpoints)
        checkpoints.keep_carried(training.model)
    throughput = Throughput(training, workload.model_shape(config), config)
    with metrics.startup("engine"):
        engine = _built(training, workload, config, rank_env, device)
    throughput.attach(engine, rank_env.rank)
    note_device(metrics, device, config.parallel.precision)
    metrics.groups(str(engine.mesh), name_process_groups(engine.mesh))
    try:
        resumed = checkpoints.load_newest(engine)
        if resumed is None:
            first, scores, watched = 0, _score(training, engine, config, rank_env, "before"), None
        else:
            first, scores, watched = resumed["steps_done"], resumed["scores"], resumed.get("watched")
            log.info("resumed from the checkpoint after step %d of %d", first, config.train.steps)
        metrics.resume(first)
        watch = Watch(config, training, engine, metrics, watched)
        session = Session(config, run, rank_env, training, engine, checkpoints, metrics, throughput, watch)
        steps_done = _run_steps(session, first, scores)
        close_window()
        training.finish(rank_env.rank, rank_env.world_size)
        if steps_done < config.train.steps and watch.settled is None:
            log.info("stopped as asked after step %d of %d, with a checkpoint", steps_done, config.train.steps)
            if rank_env.rank == 0:
                run.stopped.touch()
            return {}
        scores |= _score(training, engine, config, rank_env, "after")
        if rank_env.rank == 0 and scores:
            write_scores(run, scores)
        metrics.end(**scores)
        return scores
    finally:
        engine.destroy()


@dataclass(frozen=True)
class Session:
    """What the steps of one rank need."""

    config: RunConfig
    run: RunDir
    rank_env: RankEnvironment
    training: Training
    engine: Engine
    checkpoints: Checkpoints
    metrics: MetricsWriter
    throughput: Throughput
    watch: Watch


def _run_steps(session: Session, first: int, scores: dict[str, float]) -> int:
    """Train from step ``first`` on. Returns how many steps are done in all, fewer than asked for after a stop, and if
    the run has settled."""
    config, rank_env, engine, watch = session.config, session.rank_env, session.engine, session.watch
    steps = config.train.steps
    done = first * config.train.gradient_accumulation_steps
    batches = session.throughput.watched(session.training.batches(engine.data_rank, engine.mesh.data, done))
    stop_request = StopRequest(session.run.root)
    signal.signal(signal.SIGUSR1, lambda *_: stop_request.ask())
    with Progress(config, first=first, shown=rank_env.rank == 0) as progress:
        watch.evaluate(first)  # which a stop had no time for
        if watch.settled:
            _note_settled(session, first)
            return first
        for step in range(first, steps):
            began = time.perf_counter()
            with annotate.step(step):
                with session.throughput.step(), precision.said_clearly(config):
                    values = engine.step(batches)
                with annotate.phase("agree"):
                    stop = watch.agree(stop_request, step + 1, values)
                if not stop:
                    watch.evaluate(step + 1)
                if stop or watch.settled or _checkpoint_due(step, config):
                    with annotate.phase("checkpoint"):
                        session.training.merge_rank_state()
                        session.checkpoints.save(session.engine, step + 1, {"scores": scores, "watched": watch.state})
            step_s = time.perf_counter() - began
            values |= precision.noted(engine.deepspeed, config)
            session.metrics.step(step, **values, **session.throughput.take(engine.device), step_s=step_s)
            progress.advance(step, values["loss"], step_s)
            if watch.settled:
                _note_settled(session, step + 1)
            if stop or watch.settled:
                return step + 1
    return steps


def _note_settled(session: Session, steps_done: int) -> None:
    """Its checkpoint is whole: from now on the run counts as finished."""
    session.watch.note_settled(steps_done)
    if session.rank_env.rank == 0:
        write_settled(session.run, Settled(steps_done, session.watch.settled or ""))


def _built(
    training: Training, workload: Workload, config: RunConfig, rank_env: RankEnvironment, device: torch.device
) -> Engine:
    """Raises HpcmmError for what the login node could not know, such as the sizes of a model that it does not see."""
    recipe = recipe_of(config)
    if problems := list(recipe.problems(config, workload.axes(config), workload.model_shape(config))):
        raise HpcmmError("\n".join(problems))
    if config.parallel.precision is Precision.fp8:
        maps = precision.multiply_in_fp8(training, config, device)
        if rank_env.rank == 0:
            log.info("%d linear maps of the language model multiply in fp8, all else in bf16", maps)
    own = recipe.engine(training, config, rank_env.rank, device)
    return build(training, config, recipe.mesh(config), rank_env.rank) if own is None else own


def _checkpoint_due(step: int, config: RunConfig) -> bool:
    every = config.train.checkpoint_every
    return step + 1 == config.train.steps or (every > 0 and (step + 1) % every == 0)


def _checked(training: object) -> Training:
    """Raises HpcmmError if a workload's half with torch is not what the loop drives."""
    if not isinstance(training, Training):
        raise HpcmmError(
            f"{_full_name(training)} is not a subclass of hpcmm.train.workload.Training, which training_class() must "
            "return."
        )
    if not isinstance(getattr(training, "model", None), nn.Module):
        raise HpcmmError(f"{_full_name(training)}.__init__ must set self.model to a torch.nn.Module.")
    return training


def _full_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _score(
    training: Training, engine: Engine, config: RunConfig, rank_env: RankEnvironment, when: str
) -> dict[str, float]:
    if not config.train.evaluate:
        return {}
    scores = score(training, engine, final=when == "after")
    if rank_env.rank == 0:
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("%s training, on held-out data: %s", when, said)
    return {f"{name}_{when}": value for name, value in scores.items()}


class Progress:
    """A bar where a person watches, and a line an interval in the log. Shown by one rank; the others' does nothing."""

    def __init__(self, config: RunConfig, *, first: int, shown: bool) -> None:
        """``first``: the step that this attempt begins with."""
        self._steps = config.train.steps
        self._batch = config.global_batch_size
        self._every = config.train.log_every
        self._first = first
        self._shown = shown
        self._bar = Bar(disable=not (shown and sys.stderr.isatty()))
        self._task = self._bar.add_task("training", total=self._steps, completed=first)
        self._interval_began = time.perf_counter()
        self._interval_steps = 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._interval_began = time.perf_counter()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, loss: float, step_s: float) -> None:
        """After each step, with this rank's loss."""
        self._interval_steps += 1
        self._bar.advance(self._task)
        if not self._shown or ((step + 1) % self._every and step not in (self._first, self._steps - 1)):
            return
        now = time.perf_counter()
        elapsed_s, done = now - self._interval_began, self._interval_steps
        self._interval_began, self._interval_steps = now, 0
        log.info(
            "step %d/%d: loss %.4f on this rank, %.1f samples/s, %.3f s a step, the last %.3f s",
            step + 1,
            self._steps,
            loss,
            done * self._batch / elapsed_s,
            elapsed_s / done,
            step_s,
        )
