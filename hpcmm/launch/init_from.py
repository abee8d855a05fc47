"""``train.init_from=RUN``: from a run's name or folder to the folder that the ranks read."""

from __future__ import annotations

from pathlib import Path

from hpcmm.config import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.run_dir import RunDir


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


def _trained(run: RunDir, config: RunConfig) -> RunDir:
    if config.after is None and not run.has_checkpoint():
        raise HpcmmError(
            f"train.init_from={config.train.init_from}: {run.checkpoints} holds no finished checkpoint: name a run "
            "that has trained to its end, or, where it still waits or runs, start when its job has completed with after=JOB."
        )
    return run
