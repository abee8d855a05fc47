"""What a run needs of other runs: the job that must have completed first, and the weights that training starts from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hpcmm.config.schema import RunConfig
from hpcmm.config.untyped_config import read_frozen_config
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import submitted_job
from hpcmm.slurm.jobs import find_job

_JOB_ID = re.compile(r"[1-9][0-9]*(?:_[0-9]+)?")


def job_to_wait_for(named: str, runs_root: Path) -> str:
    """The id of the job: ``named`` itself, or what the run directory of that name beside this one was submitted as.

    Raises HpcmmError where there is no such run, or Slurm never accepted it.
    """
    if _JOB_ID.fullmatch(named):
        return named
    run = RunDir(runs_root / named)
    if "\0" in named or not run.root.is_dir():
        raise HpcmmError(f"after={named} is no job id, and {runs_root} holds no run of that name.")
    job_id = submitted_job(run)
    if job_id is None:
        raise HpcmmError(f"after={named}: {run.submission} does not tell that run's job, so it was not submitted.")
    if not _JOB_ID.fullmatch(job_id):
        raise HpcmmError(f"after={named}: {run.submission} holds {job_id[:40]!r}, which is no job id.")
    return job_id


def still_to_wait_for(job_id: str) -> bool:
    """Whether Slurm has yet to see job ``job_id`` complete; False when it has.

    Slurm 22.05 starts a job at once whose dependency names a job that it does not know (any more), so this asks before.
    Raises HpcmmError where the job has failed, or nobody knows it.
    """
    state = find_job(job_id)
    if not state.active and state.state != "COMPLETED":
        raise HpcmmError(f"after={job_id}: that job ended as {state.state}, so a job after it would never start.")
    return state.active


def run_to_start_from(config: RunConfig) -> str | None:
    """The run's absolute folder, with links such as ``latest`` followed now, for they point elsewhere later.

    A name is looked for in ``runs_root`` first. Raises HpcmmError where there is no run directory, or no finished
    checkpoint in it and ``after`` names no job that may bring one.
    """
    named = config.train.init_from
    if named is None:
        return None
    if named and "\0" not in named:
        for folder in (Path(config.runs_root).expanduser() / named, Path(named).expanduser()):
            if (folder / "config.yaml").is_file():
                return str(_trained(RunDir(folder.resolve()), config).root)
    raise HpcmmError(
        f"train.init_from={named}: neither {config.runs_root} holds a run of that name, nor is it a run's folder."
    )


def note_other_standins(config: RunConfig, start: RunDir) -> None:
    """Say so where ``start``, the run to start from, had other stand-in images, for the seed makes them."""
    if config.task._target_ is None or config.data.root is not None:
        return
    before = read_frozen_config(start.config)
    data, train = before.get("data"), before.get("train")
    if not isinstance(data, dict) or not isinstance(train, dict) or data.get("root") is not None:
        return
    seed = train.get("seed")
    if isinstance(seed, int) and seed != config.train.seed:
        print(
            f"hpcmm: {start.root} trained with train.seed={seed} and this run has {config.train.seed}, so its stand-in "
            f"images are others: add train.seed={seed} to go on with the same.",
            file=sys.stderr,
        )


def _trained(run: RunDir, config: RunConfig) -> RunDir:
    if config.after is None and not run.has_checkpoint():
        raise HpcmmError(
            f"train.init_from={config.train.init_from}: {run.checkpoints} holds no finished checkpoint: name a run "
            "that has trained to its end, or, where it still waits or runs, start this one after it with after=JOB."
        )
    return run
