"""``train.init_from=RUN``: from a run's name or folder to the folder that the ranks read."""

from __future__ import annotations

import sys
from pathlib import Path

from hpcmm.config.schema import RunConfig, TaskName
from hpcmm.config.untyped_config import read_frozen_config
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir


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
    if config.task.name is not TaskName.anomaly or config.data.root is not None:
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
