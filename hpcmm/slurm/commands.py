"""Ask Slurm through its commands: bounded in time, in a clean environment, with one clear sentence when it fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence

from hpcmm.errors import HpcmmError

_TIMEOUT_S = 30
_DEFAULTS_OF_COMMANDS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_")
_OF_THE_CLUSTER = frozenset({"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"})
"""How Slurm's commands find and enter the cluster."""


class SilentError(HpcmmError):
    """Slurm cannot be asked at all: no command, no daemon, no answer in time."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        """A few words, for a sentence of one's own."""


_SILENCE = {
    "munge": "munge does not answer here",
    "unable to contact": "Unable to contact slurm controller",
    "configuration source": "no Slurm configuration is found",
    "configuration file": "no Slurm configuration is found",
    "timed out": "the Slurm controller timed out",
    "connection refused": "the connection was refused",
    "authentication error": "its authentication does not work here",
}
"""Words by which Slurm's commands, on several lines, complain of a cluster that is down, and what they come to."""


def run_command(
    command: Sequence[str], environ: Mapping[str, str], timeout_s: float, *, process_group: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's to its end, with its words whatever their encoding.

    Raises OSError (ValueError for an environment that no program can be given) if it cannot be started, and
    subprocess.TimeoutExpired. ``process_group=0``: in a process group of its own, which Ctrl-C does not reach.
    """
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=timeout_s,
        process_group=process_group,
        env=dict(environ),
    )


def ask(
    *command: str, absent: str | None = None, timeout_s: float = _TIMEOUT_S, environ: Mapping[str, str] = os.environ
) -> str:
    """The command's output; nothing if it complains of what ``absent`` says.

    Raises SilentError when Slurm cannot be asked, and another HpcmmError when the command fails otherwise.
    """
    # The commands take defaults, such as for their formats, from the user's environment, and these must not apply.
    clean = {name: value for name, value in environ.items() if not name.startswith(_DEFAULTS_OF_COMMANDS)}
    try:
        done = run_command(command, clean | {"SLURM_TIME_FORMAT": ""}, timeout_s)
    except FileNotFoundError as error:
        sentence = f"{command[0]} not found: run this on a Slurm login node."
        raise SilentError(sentence, f"{command[0]} is not found here") from error
    except (OSError, ValueError) as error:  # no program, or an environment that no program can be given
        reason = f"{command[0]} cannot be run"
        raise SilentError(f"{reason} ({error}): see `which {command[0]}`.", reason) from error
    except subprocess.TimeoutExpired as error:
        reason = f"{command[0]} gave no answer within {timeout_s:g} s"
        raise SilentError(f"{reason}; the job itself is not affected.", reason) from error
    if done.returncode == 0:
        return done.stdout
    if absent is not None and absent in done.stderr:
        return ""
    complaint = " ".join(done.stderr.split())
    silence = next((reason for words, reason in _SILENCE.items() if words in complaint.lower()), None)
    if silence is not None:
        raise SilentError(f"{command[0]} failed ({silence}); the job itself is not affected.", silence)
    raise HpcmmError(f"{command[0]} failed ({complaint}); the job itself is not affected.")


def job_variables(environ: Mapping[str, str], keep: Collection[str] = ()) -> list[str]:
    """Variables by which the shell would change a new job: options of sbatch and srun, and what an outer job left.

    ``SBATCH_PARTITION`` overrides a script's own ``#SBATCH`` line, and ``SLURM_CPUS_PER_TASK`` of the job that one
    launches from reaches the new job's srun. Those in ``keep`` were set on purpose.
    """
    return sorted(
        name for name in environ if name.startswith(_OF_JOBS) and name not in _OF_THE_CLUSTER and name not in keep
    )


def outside_of_jobs(environ: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """``environ`` as it would be in a plain shell of a login node, without :func:`job_variables`."""
    dropped = set(job_variables(environ, keep))
    return {name: value for name, value in environ.items() if name not in dropped}
