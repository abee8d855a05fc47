"""The one place that calls ``sbatch``: bounded in time, and with its words whatever their encoding."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.slurm.accounting import queue_state
from hpcmm.slurm.commands import job_variables, outside_of_jobs
from hpcmm.slurm.refusals import CANNOT_START, cannot_start, is_certain, refusal
from hpcmm.text import visible

_TIMEOUT_S = 120


class RefusedError(HpcmmError):
    """Nothing was queued, for certain."""


def sbatch(config: RunConfig, script: Path, *options: str) -> str:
    """Submit ``script``. Returns the job's id. Raises RefusedError, with a cure, when Slurm refuses it, and another
    HpcmmError where the job may be queued all the same.

    The job is what the script says: variables of the user's shell that would change it do not reach sbatch.
    """
    check_slurm_is_here()
    keep = config.cluster.submit_environment
    _say_what_is_ignored(job_variables(os.environ, keep))
    try:
        # In a process group of its own, which Ctrl-C does not reach.
        done = subprocess.run(
            ["sbatch", *options, str(script)],
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
            process_group=0,
            env=outside_of_jobs(os.environ, keep),
        )
    except subprocess.TimeoutExpired as error:
        raise HpcmmError(
            f"sbatch gave no answer within {_TIMEOUT_S} s: see in squeue whether the job is there."
        ) from error
    except OSError as error:
        raise RefusedError(f"sbatch cannot be run ({error.strerror}): see `which sbatch`.") from error
    complaint, answer = done.stderr.decode(errors="replace"), done.stdout.decode(errors="replace")
    if done.returncode != 0:
        kind = RefusedError if is_certain(done.returncode, complaint, answer) else HpcmmError
        raise kind(refusal(config, complaint))
    if complaint.strip():
        print(visible(complaint.strip(), " "), file=sys.stderr)
    accepted = re.search(r"Submitted batch job ([0-9]+)", answer)
    if accepted is None:
        said = visible(answer.strip().splitlines()[0], " ") if answer.strip() else "nothing was said"
        raise HpcmmError(f"sbatch gave no job id, so the job may or may not run, see squeue ({said}).")
    return accepted[1]


def _say_what_is_ignored(variables: Sequence[str]) -> None:
    """Of those that a user sets; what an outer job left is nobody's wish."""
    options = [name for name in variables if name.startswith(("SBATCH_", "SRUN_"))]
    if options:
        print(
            f"hpcmm: {', '.join(options)} of your environment {'is' if len(options) == 1 else 'are'} not used, for the "
            "configuration alone decides: set keys of cluster, or name the variable in cluster.submit_environment.",
            file=sys.stderr,
        )


def check_slurm_is_here() -> None:
    """Raises RefusedError without Slurm's commands, or its configuration."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise RefusedError(
            f"{' and '.join(missing)} not found: launch on a Slurm login node, or run here with cluster=local."
        )
    check_slurm_conf()


def check_slurm_conf() -> None:
    """Raises RefusedError where SLURM_CONF names no file, for which Slurm's commands would wait a minute."""
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).is_file():
        raise RefusedError(
            f"SLURM_CONF is {configuration}, which is no file: is the cluster up (make cluster-up starts the local)?"
        )


def warn_where_it_cannot_start(config: RunConfig, job_id: str) -> None:
    """Say so when Slurm has accepted a job that breaks a limit: many sites let such a job wait for ever."""
    try:
        state = queue_state(job_id)
    except HpcmmError:
        return  # it is accepted, which is what counts
    if state.state == "PENDING" and state.reason in CANNOT_START:
        print(
            f"hpcmm: job {job_id} is queued but cannot start as it is ({state.reason}). "
            f"{cannot_start(config, state.reason)} To take it back: python -m hpcmm.jobs cancel {job_id}",
            file=sys.stderr,
        )
