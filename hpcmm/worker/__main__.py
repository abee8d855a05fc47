"""``python -m hpcmm.worker RUN_DIR -- COMMAND...``: the start of every rank, in front of submitit's entry point.

It runs COMMAND, under the profiler where the run's configuration asks for this rank, and records how it ended.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from hpcmm.config import config_file
from hpcmm.config.schema import Executor, RunConfig
from hpcmm.config.workload import workload_of
from hpcmm.errors import HpcmmError, ProfilerUnusableError
from hpcmm.node import startup
from hpcmm.node.recorder import rank_of
from hpcmm.ranges import profiled_ranks
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.environment import RankEnvironment
from hpcmm.worker.signal_forwarding import end_as, record_exit, run_watched


def start_rank(run: RunDir, command: list[str]) -> int:
    """Run the rank's command. Returns its exit status, negative for a signal."""
    os.environ[startup.CAPTURE_BEGAN] = f"{startup.process_began_s():.3f}"
    config = config_file.load(run.config)
    rank = RankEnvironment.read().rank
    if config.cluster.executor is Executor.local:
        _write_to(run.rank_log(rank))
        from hpcmm.worker.prepare import prepare  # noqa: PLC0415 -- its imports would delay every rank on Slurm

        prepare(config)  # on Slurm the batch script does it before the ranks start
    if _is_profiled(config, rank) and not is_finished(config, run):
        from hpcmm.worker.nsys_rank import run_profiled  # noqa: PLC0415 -- only where a profiler runs

        try:
            return run_profiled(config, run, rank, command)
        except ProfilerUnusableError as unusable:
            if config.profile.required:
                raise HpcmmError(f"{unusable}. Set profile.required=false to train without.") from unusable
            print(f"hpcmm: {unusable}; rank {rank} trains without.", file=sys.stderr)
    os.environ[startup.COMMAND_BEGAN] = f"{time.time():.3f}"
    return run_watched(command, run, rank)


def _is_profiled(config: RunConfig, rank: int) -> bool:
    profile = config.profile
    return profile.tool is not None and rank in profiled_ranks(
        profile.ranks, config.world_size, config.cluster.ranks_per_node
    )


def is_finished(config: RunConfig, run: RunDir) -> bool:
    """Whether the run has trained all of its steps: started once more, it has nothing to record.

    Its reports would be replaced by empty ones.
    """
    workload = workload_of(config)
    return workload is not None and workload.is_finished(config, run)


def _write_to(log: Path) -> None:
    """Send this process' and its children's output to the rank's log, as srun does on Slurm."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m hpcmm.worker RUN_DIR -- COMMAND...", file=sys.stderr)
        return 2
    run_dir, _, *command = arguments
    try:
        return end_as(start_rank(RunDir(Path(run_dir)), command))
    except HpcmmError as error:
        print(f"hpcmm: {error}", file=sys.stderr, flush=True)
        record_exit(1, RunDir(Path(run_dir)), rank_of(os.environ))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
