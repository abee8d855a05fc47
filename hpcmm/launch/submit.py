"""Run directory -> queued job, through submitit's Slurm and local executors."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from hpcmm.bootstrap.free_port import find_free_port
from hpcmm.config import Executor, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.script import rank_command
from hpcmm.launch.task import RankTask
from hpcmm.run_dir import RunDir

_SUBMIT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Submission:
    """A job that the scheduler has accepted."""

    run: RunDir
    job_id: str
    job: submitit.Job[Any]
    """submitit's handle, with the ranks' results."""


class _ScriptExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's Slurm executor, submitting the script that was rendered from hpcmm's template."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        super().__init__(run.submitit)
        self._script = run.submission_script
        self.update_parameters(
            job_name=config.name,
            time=config.cluster.time_limit_min,
            nodes=config.cluster.nodes,
            ntasks_per_node=config.cluster.ranks_per_node,
        )

    def _submit_command(self, command: str) -> submitit.Job[Any]:  # noqa: ARG002 -- submitit's signature
        """As submitit does, but bounded in time and with sbatch's words whatever their encoding."""
        submission = self._make_submission_command(self._script)
        done = subprocess.run(submission, capture_output=True, check=False, timeout=_SUBMIT_TIMEOUT_S)
        complaint = done.stderr.decode(errors="replace")
        if done.returncode != 0:
            raise FailedJobError(complaint)
        print(complaint, end="", file=sys.stderr)
        job_id = self._get_job_id_from_submission_command(done.stdout.decode(errors="replace"))
        return self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))


class _WrappedLocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor, with hpcmm's wrapper in front of each rank."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        super().__init__(run.submitit)
        self._rank_command = rank_command(run)
        self.update_parameters(
            timeout_min=config.cluster.time_limit_min,
            tasks_per_node=config.cluster.ranks_per_node,
            gpus_per_node=config.cluster.gpus_per_node,
        )

    @property
    def _submitit_command_str(self) -> str:
        return self._rank_command


def submit(config: RunConfig, run: RunDir) -> Submission:
    """Hand the job over and return at once. Raises HpcmmError when the scheduler refuses it."""
    os.environ.update(config.cluster.submit_environment)
    task = RankTask(str(run.root))
    DelayedSubmission(task).dump(run.submitit / "task.pkl")
    complaints = io.StringIO()
    try:
        executor = _executor(config, run)
        with contextlib.redirect_stderr(complaints):
            job = executor.submit(task)
    except FailedJobError as error:
        raise HpcmmError(_refusal(config, str(error))) from error
    except FailedSubmissionError as error:
        answer = _printable(str(error).splitlines()[0])
        raise HpcmmError(f"sbatch gave no job id, so the job may or may not run, see squeue ({answer}).") from error
    except subprocess.TimeoutExpired as error:
        raise HpcmmError(
            f"sbatch gave no answer within {_SUBMIT_TIMEOUT_S} s: see in squeue whether the job is there."
        ) from error
    if complaints.getvalue().strip():
        print(_printable(complaints.getvalue().strip()), file=sys.stderr)
    return Submission(run, job.job_id, job)


def _executor(config: RunConfig, run: RunDir) -> submitit.Executor:
    if config.cluster.executor is Executor.local:
        os.environ.update(config.cluster.environment)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(find_free_port("127.0.0.1")))
        return _WrappedLocalExecutor(config, run)
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise HpcmmError(
            f"{' and '.join(missing)} not found: launch on a Slurm login node, or run here with cluster=local."
        )
    return _ScriptExecutor(config, run)


def _refusal(config: RunConfig, complaint: str) -> str:
    lines = [
        _printable(line).removeprefix("sbatch: ").removeprefix("error: ").strip() for line in complaint.splitlines()
    ]
    said = " ".join(line for line in lines if line) or "sbatch said nothing"
    return f"Slurm refused the job ({said}). {_cure(config, said)}"


def _cure(config: RunConfig, complaint: str) -> str:
    """What to do about the refusals that sites see most; sbatch's own words are quoted beside it."""
    cluster = config.cluster
    cures = {
        "invalid partition": f"cluster.partition is {cluster.partition}: `sinfo -s` lists the partitions.",
        "account": f"cluster.account is {cluster.account}: `sacctmgr show associations user=$USER` lists yours.",
        "qos": f"cluster.qos is {cluster.qos}: `sacctmgr show qos` lists them.",
        "memory specification": f"cluster.memory_gb is {cluster.memory_gb}: `sinfo -o '%n %m'` shows what nodes have.",
        "node configuration is not available": (
            f"No nodes have {cluster.ranks_per_node} ranks of {cluster.cpus_per_rank} CPUs and {cluster.gpus_per_node} "
            f"GPUs, or there are not {cluster.nodes} of them: `sinfo -o '%D %c %G'` shows what there is."
        ),
        "time limit": f"cluster.time_limit_min is {cluster.time_limit_min}: `sinfo -o '%P %l'` shows the limits.",
        "munge": "The cluster is not up, or munge is not running here (make cluster-up starts the local cluster).",
        "unable to contact": "The Slurm controller does not answer: is SLURM_CONF right, and slurmctld up?",
        "configuration source": "No Slurm configuration is found: is SLURM_CONF right, and the cluster up?",
    }
    lowered = complaint.lower()
    return next((cure for said, cure in cures.items() if said in lowered), "Change the cluster settings and try again.")


def link_latest(run: RunDir) -> bool:
    """Point ``latest`` beside the run directory to it, replacing an older link in one step.

    Returns False, and changes nothing, where ``latest`` is something else or cannot be made: the job is queued already.
    """
    link = run.root.parent / "latest"
    if link.exists() and not link.is_symlink():
        return False
    fresh = run.root.parent / f".latest-{run.root.name}"
    try:
        fresh.symlink_to(run.root.name)
        fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)
        return False
    return True


def _printable(text: str) -> str:
    """``text`` without the control characters that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
