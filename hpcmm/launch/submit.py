"""Run directory -> queued job: submitit's task, in hpcmm's script on Slurm or by submitit's local executor."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission

from hpcmm.config.schema import Executor, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.script import rank_command
from hpcmm.node.ports import find_free_port
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import write_submission
from hpcmm.slurm.commands import job_variables
from hpcmm.slurm.sbatch import sbatch, warn_where_it_cannot_start
from hpcmm.worker.task import RankTask


@contextmanager
def uninterrupted() -> Iterator[list[str]]:
    """Within, a first SIGINT is kept, and raised as KeyboardInterrupt at the end; a second one is raised at once.

    Jobs that were submitted are to be appended to the list, which the KeyboardInterrupt then names.
    """
    submitted: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield submitted  # signals are the main thread's
        return
    came = False
    before = signal.getsignal(signal.SIGINT)

    def keep(signum: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signum, before)

    if callable(before):  # else it is ignored already
        signal.signal(signal.SIGINT, keep)
    try:
        yield submitted
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        commands = " and ".join(f"python -m hpcmm.jobs cancel {job_id}" for job_id in submitted)
        raise KeyboardInterrupt(f"what is submitted stays; to take it back: {commands}" if commands else "")


@dataclass(frozen=True)
class Submission:
    """A job that the scheduler has accepted."""

    run: RunDir
    job_id: str
    job: submitit.Job[Any]
    """submitit's handle, with the ranks' results."""
    analysis_job_id: str | None = None
    """The job that analyses the run when it is over."""


class _WrappedLocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor, with hpcmm's wrapper in front of each rank."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        super().__init__(run.submitit)
        self._rank_command = shlex.join(rank_command(config, run))
        self.update_parameters(
            timeout_min=config.cluster.time_limit_min,
            tasks_per_node=config.cluster.ranks_per_node,
            gpus_per_node=config.cluster.gpus_per_node,
        )

    @property
    def _submitit_command_str(self) -> str:
        return self._rank_command


def submit(config: RunConfig, run: RunDir, python_path: tuple[str, ...] = ()) -> Submission:
    """Hand the job over and return at once. Raises HpcmmError when the scheduler refuses it."""
    task = pickle_task(run)
    if config.cluster.executor is Executor.local:
        return _submit_locally(config, run, task, python_path)
    with uninterrupted() as submitted:
        job_id = sbatch(config, run.submission_script)
        submitted.append(job_id)
        note_submission(run, job_id=job_id, analysis_job_id=None)
        # Also of a run that failed: its reports may say why.
        analysis_job_id = submit_analysis(config, run, job_id, f"--dependency=afterany:{job_id}")
        submitted.extend([analysis_job_id] if analysis_job_id else [])
    warn_where_it_cannot_start(config, job_id)
    job = submitit.SlurmJob(folder=run.submitit, job_id=job_id, tasks=list(range(config.world_size)))
    return Submission(run, job_id, job, analysis_job_id)


def submit_analysis(config: RunConfig, run: RunDir, job_id: str, *options: str) -> str | None:
    """Queue the analysis behind job ``job_id``, where one was asked for. Returns its job's id.

    Raises HpcmmError, which also says that job ``job_id`` is queued, when Slurm refuses it.
    """
    if not run.analysis_script.is_file():
        return None
    try:
        analysis_job_id = sbatch(config, run.analysis_script, *options)
    except HpcmmError as error:
        raise HpcmmError(f"Job {job_id} is submitted and stays, but its analysis is not. {error}") from error
    note_submission(run, job_id=job_id, analysis_job_id=analysis_job_id)
    return analysis_job_id


def pickle_task(run: RunDir) -> RankTask:
    """Write, and return, what submitit starts on every rank."""
    task = RankTask(str(run.root))
    DelayedSubmission(task).dump(run.submitit / "task.pkl")
    return task


def note_submission(run: RunDir, **jobs: str | None) -> None:
    """Write ``submission.json``; says so where that cannot be, for the job is queued already."""
    try:
        write_submission(run, **jobs)
    except OSError as error:
        print(
            f"hpcmm: job {jobs['job_id']} is submitted, but {run.submission} cannot be written ({error.strerror}).",
            file=sys.stderr,
        )


def _submit_locally(config: RunConfig, run: RunDir, task: RankTask, python_path: tuple[str, ...]) -> Submission:
    for name in job_variables(os.environ):  # of a job that this is launched from, whose rank 0 is none of ours
        del os.environ[name]
    os.environ.update(config.cluster.environment)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(find_free_port("127.0.0.1")))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*python_path, os.environ.get("PYTHONPATH")]))
    job = _WrappedLocalExecutor(config, run).submit(task)
    note_submission(run, job_id=job.job_id)
    return Submission(run, job.job_id, job)
