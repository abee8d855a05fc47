"""From what a user writes, a run's name or directory or a job's number, to the run and its jobs."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.config.schema import cluster_variables
from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, other_writer
from hpcmm.resources import resource
from hpcmm.runs.ownership import exchangeable, is_mine, other_user
from hpcmm.runs.run_dir import JOB_ID, RunDir, is_run, runs_in
from hpcmm.runs.submission import job_ids_of
from hpcmm.slurm.jobs import Job

_MOST_RUNS = 20
_SLURM_S_OWN_PLACES = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")


@dataclass(frozen=True)
class Target:
    """What a user means: a run, a job by number, or both."""

    asked: str
    job_ids: tuple[str, ...]
    """Newest last; a run that was submitted again by hand has several."""
    run: RunDir | None
    by_number: bool = False
    """A number was given: the job that Slurm knows by it now is meant, and ``run`` is only one that had it too."""

    @property
    def user(self) -> str | None:
        """The other user whose run this is; None if it is this user's, or no run is known."""
        return other_user(self.run.root) if self.run is not None else None


def find_targets(asked: str, runs_root: Path) -> list[Target]:
    """The runs or the job that ``asked`` names, newest first; several where it is the common start of runs' names.

    Runs that were never submitted come last.

    Raises HpcmmError, with the nearest names, if there is none.
    """
    named, within = _expanded(asked), runs_root / asked
    is_plain = asked not in {"", ".", ".."} and "/" not in asked
    if is_run(named) and (is_mine(named) or not is_plain):
        return [_target(asked, named)]
    if JOB_ID.fullmatch(asked):
        run = run_of_job(asked, runs_root)
        return [Target(asked, (asked,), run, by_number=True)]
    if is_plain and is_mine(within) and is_run(within):
        return [_target(asked, within)]
    runs = runs_in(runs_root)
    found = [run for run in runs if asked and run.root.name.startswith(f"{asked}-")]
    if asked and not found:  # what other users named like that comes after all that is this user's
        found = _of_others(asked, runs_root, named, within if is_plain else named)
    if not found:
        raise HpcmmError(_no_such_run(asked, runs_root, runs))
    targets = [_target(asked, run.root) for run in found]
    return sorted(targets, key=lambda target: not target.job_ids)


def run_of_job(job_id: str, runs_root: Path) -> RunDir | None:
    """The user's own run in ``runs_root`` that this job belongs to; what other users' runs claim counts for nothing."""
    return next((run for run in runs_in(runs_root) if job_id in job_ids_of(run)), None)


def run_of_command(job: Job) -> RunDir | None:
    """The run whose script this job was submitted with, by what Slurm noted of it."""
    run = folder_of_command(job)
    return run if run is not None and is_run(run.root) else None


def folder_of_command(job: Job) -> RunDir | None:
    """As :func:`run_of_command`, also if the folder is gone."""
    start = job.command.find("/")
    script = Path(job.command[start:]) if start >= 0 else None
    return RunDir(script.parent) if script is not None and script.name == "submission.sh" else None


def settings(run: RunDir) -> dict[str, Any]:
    """The run's frozen configuration as plain values, of whatever version of hpcmm; empty if there is none."""
    return read_untyped_config(run.config)


def slurm_environment(run: RunDir | None, environ: dict[str, str] | None = None) -> dict[str, str]:
    """This process' environment, and in it how the run's configuration finds the cluster.

    Only a configuration that no other user can have written counts: SLURM_CONF chooses the code that squeue loads.
    """
    environ = dict(os.environ) if environ is None else environ
    if run is None:
        return environ
    cluster = read_untyped_config(run.config, own=True).get("cluster")
    given = cluster.get("submit_environment") if isinstance(cluster, dict) else None
    return environ | cluster_variables(given) if isinstance(given, dict) else environ


def default_environment(runs_root: Path, environ: dict[str, str] | None = None) -> dict[str, str]:
    """This process' environment with a Slurm cluster in it, for jobs whose run is not known.

    What the shell says of it counts first (SLURM_CONF), then the newest run that does, then Slurm's own place, and at
    last the local cluster, where ``cluster=local_slurm`` has it.
    """
    environ = dict(os.environ) if environ is None else environ
    if "SLURM_CONF" in environ:
        return environ
    for run in runs_in(runs_root)[:_MOST_RUNS]:
        found = slurm_environment(run, environ)
        if "SLURM_CONF" in found:
            return found
    if any(Path(place).exists() for place in _SLURM_S_OWN_PLACES):
        return environ
    local = _local_slurm_conf()
    return environ | {"SLURM_CONF": str(local)} if local is not None else environ


def is_local_cluster(slurm_conf: str) -> bool:
    """Whether this is the configuration of a cluster of ``slurm/local/up``, which may be down."""
    if not slurm_conf:
        return False
    try:
        made_by_us = is_regular(Path(slurm_conf).parent.parent / "cluster.json")
    except ValueError:
        made_by_us = False
    return made_by_us or Path(slurm_conf) == _local_cluster_conf()


def _local_cluster_conf() -> Path:
    from omegaconf import OmegaConf  # noqa: PLC0415 -- only where nothing else tells of a cluster

    preset = OmegaConf.load(resource("conf/cluster/local_slurm.yaml"))
    return Path(str(OmegaConf.select(preset, "submit_environment.SLURM_CONF")))


def _local_slurm_conf() -> Path | None:
    conf = _local_cluster_conf()
    try:
        return conf if other_writer(conf, conf.parent) is None and exchangeable(conf) is None else None
    except OSError:
        return None


def _expanded(asked: str) -> Path:
    try:
        return Path(asked).expanduser()
    except RuntimeError:  # no such user
        return Path(asked)


def _of_others(asked: str, runs_root: Path, *exact: Path) -> list[RunDir]:
    """The runs of other users that a name may mean, newest first."""
    there = [RunDir(folder) for folder in dict.fromkeys(exact) if is_run(folder)]
    return there or [run for run in runs_in(runs_root, of_others=True) if run.root.name.startswith(f"{asked}-")]


def _target(asked: str, folder: Path) -> Target:
    """Links to the run are followed, but for one of another user, by which the run is shown as theirs."""
    run = RunDir(folder.resolve() if other_user(folder) is None else folder.absolute())
    return Target(asked, job_ids_of(run), run)


def _no_such_run(asked: str, runs_root: Path, runs: list[RunDir]) -> str:
    names = [run.root.name for run in runs]
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "give a job's number, a run's name or its directory."
    return f"{asked!r} is not a run in {runs_root.absolute()}, no run directory and no job's number: {hint}"
