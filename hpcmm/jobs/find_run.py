"""From what a user writes, a run's name or directory or a job's number, to the run and its jobs."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.errors import HpcmmError
from hpcmm.resources import resource
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


def find_targets(asked: str, runs_root: Path) -> list[Target]:
    """The runs or the job that ``asked`` names, newest first; several where it is the common start of runs' names.

    Runs that were never submitted come last.

    Raises HpcmmError, with the nearest names, if there is none.
    """
    named = _expanded(asked)
    if is_run(named):
        return [_target(asked, named.resolve())]
    if JOB_ID.fullmatch(asked):
        run = run_of_job(asked, runs_root)
        return [Target(asked, (asked,), run)]
    within = runs_root / asked
    if asked not in {"", ".", ".."} and "/" not in asked and is_run(within):
        return [_target(asked, within.resolve())]
    runs = runs_in(runs_root)
    found = [run for run in runs if run.root.name.startswith(f"{asked}-")]
    if not found:
        raise HpcmmError(_no_such_run(asked, runs_root, runs))
    targets = [_target(asked, run.root) for run in found]
    return sorted(targets, key=lambda target: not target.job_ids)


def run_of_job(job_id: str, runs_root: Path) -> RunDir | None:
    """The run in ``runs_root`` that this job belongs to."""
    return next((run for run in runs_in(runs_root) if job_id in job_ids_of(run)), None)


def run_of_command(job: Job) -> RunDir | None:
    """The run whose script this job was submitted with, by what Slurm noted of it."""
    start = job.command.find("/")
    script = Path(job.command[start:]) if start >= 0 else None
    if script is None or script.name != "submission.sh" or not is_run(script.parent):
        return None
    return RunDir(script.parent)


def settings(run: RunDir) -> dict[str, Any]:
    """The run's frozen configuration as plain values, of whatever version of hpcmm; empty if there is none."""
    return read_untyped_config(run.config)


def slurm_environment(run: RunDir | None, environ: dict[str, str] | None = None) -> dict[str, str]:
    """This process' environment, and in it what the run's configuration gives to Slurm's commands.

    Only the user's own configuration counts: whoever sets SLURM_CONF chooses the code that squeue loads.
    """
    environ = dict(os.environ) if environ is None else environ
    if run is None:
        return environ
    try:
        trusted = run.config.stat().st_uid in {0, os.geteuid()}
    except OSError:
        return environ
    cluster = settings(run).get("cluster") if trusted else None
    given = cluster.get("submit_environment") if isinstance(cluster, dict) else None
    return environ | {str(key): str(value) for key, value in given.items()} if isinstance(given, dict) else environ


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
        made_by_us = (Path(slurm_conf).parent.parent / "cluster.json").is_file()
    except (OSError, ValueError):
        made_by_us = False
    return made_by_us or Path(slurm_conf) == _local_cluster_conf()


def _local_cluster_conf() -> Path:
    from omegaconf import OmegaConf  # noqa: PLC0415 -- only where nothing else tells of a cluster

    preset = OmegaConf.load(resource("conf/cluster/local_slurm.yaml"))
    return Path(str(OmegaConf.select(preset, "submit_environment.SLURM_CONF")))


def _local_slurm_conf() -> Path | None:
    conf = _local_cluster_conf()
    try:
        return conf if conf.stat().st_uid in {0, os.geteuid()} else None
    except OSError:
        return None


def _expanded(asked: str) -> Path:
    try:
        return Path(asked).expanduser()
    except RuntimeError:  # no such user
        return Path(asked)


def _target(asked: str, folder: Path) -> Target:
    run = RunDir(folder)
    return Target(asked, job_ids_of(run), run)


def _no_such_run(asked: str, runs_root: Path, runs: list[RunDir]) -> str:
    names = [run.root.name for run in runs]
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "give a job's number, a run's name or its directory."
    return f"{asked!r} is not a run in {runs_root.absolute()}, no run directory and no job's number: {hint}"
