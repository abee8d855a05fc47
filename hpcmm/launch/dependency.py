"""``after=JOB``: from a job id or a run's name to the job that must have completed first."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.accounting import queue_state

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
    try:
        job_id = str(json.loads(run.submission.read_text(encoding="utf-8"))["job_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcmmError(
            f"after={named}: {run.submission} does not tell that run's job, so it was not submitted."
        ) from error
    if not _JOB_ID.fullmatch(job_id):
        raise HpcmmError(f"after={named}: {run.submission} holds {job_id[:40]!r}, which is no job id.")
    return job_id


def still_to_wait_for(job_id: str) -> bool:
    """Whether Slurm has yet to see job ``job_id`` complete; False when it has.

    Slurm 22.05 starts a job at once whose dependency names a job that it does not know (any more), so this asks before.
    Raises HpcmmError where the job has failed, or nobody knows it.
    """
    state = queue_state(job_id)
    if not state.active and state.state != "COMPLETED":
        raise HpcmmError(f"after={job_id}: that job ended as {state.state}, so a job after it would never start.")
    return state.active
