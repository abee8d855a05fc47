"""hpcmm's training loop beside bare DeepSpeed calls: the same engine, the same data, the same model, by turns.

    python benchmarks/loop.py [--ranks 2] [--steps 30] [--turns 5] [--json FILE] [KEY=VALUE ...]

Each rank builds model, data and one engine, and then runs ``--steps`` steps of hpcmm's loop (annotation, agreement on a
stop, metrics file, progress line) and as many of a bare loop (next batch, forward, backward, step), by turns. A turn's
time is that of its steps after the first, in which either loader starts; checkpoints and evaluation are left out.
Prints the medians, and hpcmm's speed as a share of the bare loop's: the median of the turns' shares.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import measuring
from measuring import Row, summary

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.mesh import Mesh
from hpcmm.config.validate import validate
from hpcmm.runs.run_dir import RunDir

if TYPE_CHECKING:
    from hpcmm.train.loop import Session

Times = tuple[float, float]
"""Seconds by the clock, and of this process on a processor."""

CONFIGURATION = ("cluster=local", "task=anomaly", "train.evaluate=false", "train.schedule=constant")


def run(options: argparse.Namespace) -> None:
    """Prepare a run directory and start the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *CONFIGURATION,
            f"cluster.ranks_per_node={options.ranks}",
            f"train.steps={options.steps * (options.turns + 1) + 1}",
            f"runs_root={folder}",
            *options.overrides,
        ]
        config = compose_run(overrides)
        validate(config)
        run_dir = RunDir(Path(folder) / "run")
        run_dir.create()
        config_file.dump(config, run_dir.config)
        subprocess.run([sys.executable, "-m", "hpcmm.worker", "prepare", str(run_dir.root)], check=True)
        program = [__file__, f"--steps={options.steps}", f"--turns={options.turns}", f"--rank-of={run_dir.root}"]
        program += [f"--json={options.json}"] if options.json else []
        failed = measuring.run_ranks(program, options.ranks)
        if any(failed):
            sys.exit(f"ranks ended with {failed}")


def run_rank(options: argparse.Namespace) -> None:
    """One rank: both loops by turns; rank 0 prints, and writes the file."""
    session = open_session(RunDir(Path(options.rank_of)))
    with session.metrics:
        session.metrics.start(**session.rank_env.identity())
        in_hpcmm(session, 0, options.steps)  # warm
        bare(session, 0, options.steps)
        turns = []
        for turn in range(options.turns):
            loops = (bare, in_hpcmm) if turn % 2 else (in_hpcmm, bare)
            times = {loop: loop(session, options.steps * (turn + 1), options.steps) for loop in loops}
            turns.append((times[bare], times[in_hpcmm]))
    if session.rank_env.rank == 0:
        report(turns, options.steps - 1)
        measuring.write(options.json, "loop", rows(turns, options.steps - 1))
    session.engine.destroy()
    from hpcmm.worker.distributed import leave_group  # noqa: PLC0415

    leave_group()


def open_session(run_dir: RunDir) -> Session:
    """Join the group, and build what a rank's steps need."""
    from hpcmm.node.cache import extensions_dir  # noqa: PLC0415
    from hpcmm.runs.metrics import MetricsWriter  # noqa: PLC0415
    from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415
    from hpcmm.worker.environment import RankEnvironment  # noqa: PLC0415

    config = config_file.load(run_dir.config)
    select_accelerator()
    load_ops(extensions_dir(config.cluster))
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import deepspeed  # noqa: PLC0415

    from hpcmm.config.workload import workload_of  # noqa: PLC0415
    from hpcmm.train.checkpoint import Checkpoints  # noqa: PLC0415
    from hpcmm.train.loop import Session  # noqa: PLC0415
    from hpcmm.train.recipes import build  # noqa: PLC0415
    from hpcmm.train.throughput import Throughput  # noqa: PLC0415
    from hpcmm.train.watching import Watch  # noqa: PLC0415

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = dist.get_rank()
    rank_env = RankEnvironment(
        rank=rank,
        local_rank=rank,
        local_world_size=dist.get_world_size(),
        world_size=dist.get_world_size(),
        job_id="benchmark",
        node=socket.gethostname(),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )
    workload = workload_of(config)
    assert workload is not None
    training = workload.training(config, torch.device("cpu"))
    throughput = Throughput(training, workload.model_shape(config), config)
    engine = build(training, config, Mesh.of({}, dist.get_world_size()), rank)
    throughput.attach(engine, rank)
    metrics = MetricsWriter(run_dir.rank_metrics(rank))
    checkpoints = Checkpoints(run_dir, rank_env, 1)
    watch = Watch(config, training, engine, metrics, None)
    return Session(config, run_dir, rank_env, training, engine, checkpoints, metrics, throughput, watch)


def in_hpcmm(session: Session, first: int, steps: int) -> Times:
    """Seconds of hpcmm's loop (clock, processor) from the end of step ``first`` on; it saves nothing, as in the midst
    of a run."""
    from hpcmm.train import loop  # noqa: PLC0415

    session.config.train.steps = first + steps
    loop._checkpoint_due = lambda _step, _config: False
    clock = Clock(session.engine.deepspeed)
    loop._run_steps(session, first, {})
    return clock.stop()


def bare(session: Session, first: int, steps: int) -> Times:
    """Seconds of a loop without hpcmm, over the same steps."""
    training, engine = session.training, session.engine.deepspeed
    batches = training.batches(session.rank_env.rank, session.rank_env.world_size, first)
    clock = Clock(engine)
    for _ in range(steps):
        loss, _ = training.loss(engine, next(batches))
        engine.backward(loss)
        engine.step()
    return clock.stop()


class Clock:
    """From the end of an engine's next step to the call of :meth:`stop`."""

    def __init__(self, engine: object) -> None:
        self._began: Times | None = None
        self._engine, self._step = engine, engine.step  # type: ignore[attr-defined]
        engine.step = self._first_step  # type: ignore[attr-defined]

    def _first_step(self) -> None:
        self._step()
        self._began = (time.perf_counter(), time.process_time())
        del self._engine.step  # type: ignore[attr-defined]

    def stop(self) -> Times:
        assert self._began is not None
        now = (time.perf_counter(), time.process_time())
        return now[0] - self._began[0], now[1] - self._began[1]


def report(turns: list[tuple[Times, Times]], steps: int) -> None:
    """``turns``: the bare loop's and hpcmm's times of each."""
    for which, clock in enumerate(("clock", "processor")):
        pairs = [(theirs[which], ours[which]) for theirs, ours in turns]
        medians = [statistics.median(times) / steps * 1000 for times in zip(*pairs, strict=True)]
        shares = sorted(theirs / ours for theirs, ours in pairs)
        print(
            f"{clock}: bare DeepSpeed {medians[0]:.1f} ms a step, hpcmm {medians[1]:.1f} ms; hpcmm is "
            f"{statistics.median(shares):.3f} times as fast ({shares[0]:.3f} to {shares[-1]:.3f} in {len(turns)} turns "
            f"of {steps} steps)"
        )


def rows(turns: list[tuple[Times, Times]], steps: int) -> list[Row]:
    """The same as numbers: seconds a step, and hpcmm's speed as a share of the bare loop's."""
    found: list[Row] = []
    for which, clock in enumerate(("clock", "processor")):
        bare_s, ours_s = ([times[loop][which] / steps for times in turns] for loop in (0, 1))
        shares = [theirs / ours for theirs, ours in zip(bare_s, ours_s, strict=True)]
        row: Row = {"by": clock, "turns": len(turns), "steps": steps}
        row |= summary(bare_s, "s", "bare_step") | summary(ours_s, "s", "hpcmm_step")
        found.append(row | {"times_as_fast": statistics.median(shares), "least": min(shares), "most": max(shares)})
    return found


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=measuring.positive, default=5)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    run_rank(options) if options.rank_of else run(options)


if __name__ == "__main__":
    main()
