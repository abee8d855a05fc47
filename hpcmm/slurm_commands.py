"""Ask Slurm through its commands: bounded in time, in a clean environment, with one clear sentence when it fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from hpcmm.errors import HpcmmError

_TIMEOUT_S = 30


def ask(
    *command: str, absent: str | None = None, timeout_s: float = _TIMEOUT_S, environ: Mapping[str, str] = os.environ
) -> str:
    """The command's output; nothing where it complains of what ``absent`` says. Raises HpcmmError when it fails."""
    # squeue and sacct take defaults for their formats from the user's environment, and these must not apply.
    clean = {name: value for name, value in environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
            env=clean | {"SLURM_TIME_FORMAT": ""},
        )
    except FileNotFoundError as error:
        raise HpcmmError(f"{command[0]} not found: run this on a Slurm login node.") from error
    except (OSError, ValueError) as error:  # no program, or an environment that no program can be given
        raise HpcmmError(f"{command[0]} cannot be run ({error}): see `which {command[0]}`.") from error
    except subprocess.TimeoutExpired as error:
        raise HpcmmError(
            f"{command[0]} gave no answer within {timeout_s:g} s; the job itself is not affected."
        ) from error
    if done.returncode == 0:
        return done.stdout
    if absent is not None and absent in done.stderr:
        return ""
    complaint = " ".join(done.stderr.split())
    raise HpcmmError(f"{command[0]} failed ({complaint}); the job itself is not affected.")
