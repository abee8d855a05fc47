"""From Hydra overrides to a queued job, on a login node: no torch, deepspeed or transformers is imported here.

>>> from hpcmm.launch import launch
>>> submission = launch(["experiment=anomaly_demo"])
>>> submission.run.root, submission.job_id
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpcmm import config as run_config
from hpcmm.config import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.compose import compose_run
from hpcmm.launch.script import render_script
from hpcmm.launch.submit import Submission, link_latest, submit
from hpcmm.launch.validate import validate
from hpcmm.run_dir import RunDir

__all__ = ["Submission", "compose_run", "launch", "plan", "render_script", "validate"]


def plan(overrides: Sequence[str]) -> tuple[RunConfig, RunDir]:
    """Compose and validate a run and name its directory, without touching the disk. Raises HpcmmError."""
    config = compose_run(overrides)
    validate(config)
    name = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return config, RunDir(Path(config.runs_root).expanduser().absolute() / name)


def launch(overrides: Sequence[str]) -> Submission:
    """Compose, validate, write the run directory and submit; returns once the job is accepted.

    Raises HpcmmError when anything is wrong. A run directory that Slurm refused stays, with its script, to be read.
    """
    config, run = plan(overrides)
    return queue(config, run)


def queue(config: RunConfig, run: RunDir) -> Submission:
    """Write the run directory and submit its script."""
    script = render_script(config, run)
    try:
        run.create()
        run_config.dump(config, run.config)
        run.submission_script.write_text(script, encoding="utf-8")
        run.submission_script.chmod(0o700)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HpcmmError(
            f"The run directory {run.root} cannot be written ({reason}): free some space there, or set runs_root."
        ) from error
    submission = submit(config, run)
    if not link_latest(run):
        print(
            f"hpcmm: {run.root.parent / 'latest'} does not point to this run; it is no link of ours.", file=sys.stderr
        )
    return submission
