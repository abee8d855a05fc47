"""From what a user writes, a run's name or directory or a job's number, to the run and its jobs."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hpcmm.config.schema import cluster_variables
from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, other_writer, read_json_object
from hpcmm.ranges import MAX_WORLD_SIZE, is_task_of
from hpcmm.resources import resource
from hpcmm.runs.attempts import attempts_of
from hpcmm.runs.ledger import array_of, jobs_of_points, read_ledger
from hpcmm.runs.ownership import exchangeable, is_mine, other_user, settle
from hpcmm.runs.run_dir import JOB_ID, RUNS, RunDir, SweepDir, first_point_of, is_run, runs_in
from hpcmm.runs.submission import JobIdentity, job_ids_of, noted_jobs, write_submission
from hpcmm.slurm.commands import CONFIGURATIONS, clusters_asked
from hpcmm.slurm.jobs import Job, is_same_job, jobs_of_scripts
from hpcmm.text import visible

_MOST_RUNS = 20
_MOST_POINTS_OF_OTHERS = 100
_NUMBER = re.compile(r"[0-9]{1,9}")
_WORD = re.compile(r"[^/]*(/[0-9]{1,9})?/?")
"""A run's name, or a point of a sweep: one's own come before another user's folder of that name in the current one."""
_COMPONENT = re.compile(r"[0-9]{1,12}\+[0-9]{1,4}")
"""Of a heterogeneous job, as Slurm writes it: ``12+1``."""
_ADDED = re.compile(r"-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}$")
"""What a launch adds to a run's name: date, time and a random part."""


class NoSuchRunError(HpcmmError):
    """No run has that name, and it is no job's number."""


@dataclass(frozen=True)
class Target:
    """What a user means: a run, a point of a sweep, a sweep, or a job by number with the run that it belongs to."""

    asked: str
    job_ids: tuple[str, ...]
    """Newest last; a run that was submitted again by hand has several, a point has its newest, a sweep its arrays."""
    run: RunDir | None
    """Of a sweep the folder that holds the points."""
    sweep: SweepDir | None = None
    """If a whole sweep is meant, or one of its arrays."""
    array: str | None = None
    """The array, if one was named by its number."""
    by_number: bool = False
    """A number was given: the job that Slurm knows by it now is meant, and ``run`` is only one that had it too."""
    namesake: str = ""
    """The newest run that was launched with this number as its name, which a number does not mean."""

    @cached_property
    def points(self) -> tuple[Target, ...]:
        """Of a sweep its points, each with its newest job (none if it was never submitted); of an array its tasks."""
        if self.sweep is None:
            return ()
        jobs = sorted(jobs_of_points(self.sweep).items())[: None if self.user is None else _MOST_POINTS_OF_OTHERS]
        if self.array is None:
            return tuple(_point(self.sweep, index, tasks) for index, tasks in jobs)
        mine = ((index, [task for task in tasks if array_of(task) == self.array][-1:]) for index, tasks in jobs)
        return tuple(Target(task, (task,), self.sweep.point(index)) for index, tasks in mine for task in tasks)

    @cached_property
    def tasks(self) -> dict[str, Target]:
        """The points that were submitted, by their newest job. No other job of a sweep counts."""
        return {point.job_ids[-1]: point for point in self.points if point.job_ids}

    @property
    def namesake_hint(self) -> str:
        """A sentence, with a blank before it, on the run that has the number as its name; empty if there is none."""
        if not self.namesake:
            return ""
        return f" A number means a job; the run of that name is {self.namesake}: give its whole name."

    @property
    def user(self) -> str | None:
        """The other user whose run this is; None if it is this user's, or no run is known."""
        return other_user(self.run.root) if self.run is not None else None


def find_targets(asked: str, runs_root: Path) -> list[Target]:
    """The runs or the job that ``asked`` names, newest first; several where it is the common start of runs' names.

    A point of a sweep is ``SWEEP/0003``, its directory, or its job ``12_3``. Runs that were never submitted come last.

    Raises NoSuchRunError, with the nearest names, if there is none, and HpcmmError for a point that a sweep lacks.
    """
    named = _path(asked)
    if named is not None and is_run(named) and (is_mine(named) or not _WORD.fullmatch(asked)):
        return [_target(asked, named)]
    if JOB_ID.fullmatch(asked) or _COMPONENT.fullmatch(asked):
        return [_target_of_job(asked, runs_root)]
    name, _, point = asked.rstrip("/").rpartition("/")
    if name and _NUMBER.fullmatch(point) and (sweeps := _named(name, runs_root)):
        return _targets_of_point(asked, sweeps, int(point))
    found = _named(asked.rstrip("/"), runs_root)
    if not found:
        raise NoSuchRunError(_no_such_run(asked, runs_root, runs_in(runs_root)))
    targets = [_target(asked, run.root) for run in found]
    return sorted(targets, key=lambda target: not target.job_ids)


def take_over(run: RunDir, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Note the jobs that Slurm has of this run, or sweep, and no record names; returns their numbers.

    A launch that was killed while it submitted leaves such jobs, and one that lost sbatch's answer. Of a sweep they are
    looked for among the points: who calls this keeps the ledger locked. Raises HpcmmError if squeue does not answer.
    """
    return _note_jobs(run, jobs_of_scripts(list(scripts_of(run)), environ), environ)


def scripts_of(run: RunDir) -> dict[str, int]:
    """The scripts that jobs of a run, or of a sweep, are submitted with, each with the first point that it runs."""
    sweep = SweepDir(run.root)
    firsts = sweep.first_points() if sweep.is_there() else [0]
    return {str(sweep.submission_script(first)): first for first in firsts}


def take_over_unless_locked(run: RunDir, rows: Sequence[Job], environ: Mapping[str, str]) -> bool:
    """As :func:`take_over`, with squeue's answer; False if there is nothing to note, or a launch is at work, which
    notes its own jobs.

    A ledger is locked only to be written, never while squeue is waited for: a launch meanwhile would be refused.
    """
    if not _unnoted_jobs(run, rows):
        return False
    sweep = SweepDir(run.root)
    with ExitStack() as stack:
        try:
            if sweep.is_there():
                lock = stack.enter_context(read_ledger(sweep.root).locked())
                stack.callback(os.ftruncate, lock, 0)  # the mark that a launcher left there
        except (HpcmmError, OSError):
            return False
        return bool(_note_jobs(run, rows, environ))


def shared_folder(run: RunDir) -> RunDir:
    """The folder whose records name the run's jobs: of a point its sweep's."""
    place = SweepDir.of_point(run)
    return place[0].shared if place is not None else run


def _unnoted_jobs(run: RunDir, rows: Sequence[Job]) -> dict[tuple[str, str], list[Job]]:
    """Of squeue's rows, which may be of other runs too, those of jobs that no record of the run names.

    By their number and their script. The records are read now: a launch may note its job while squeue answers.
    """
    noted, scripts, found = noted_jobs(run), scripts_of(run), dict[tuple[str, str], list[Job]]()
    for row in rows:
        known = (JobIdentity(row.number, scripts=(each,), uid=int(row.uid)) for each in scripts)
        script = next((each.scripts[0] for each in known if is_same_job(each, row)), None)
        if script is not None and row.number not in noted:
            found.setdefault((row.number, script), []).append(row)
    return found


def _note_jobs(run: RunDir, rows: Sequence[Job], environ: Mapping[str, str]) -> list[str]:
    """Note what :func:`_unnoted_jobs` finds in ``rows``; returns the numbers. Of a sweep the ledger is locked.

    Raises HpcmmError if a job cannot be noted.
    """
    sweep, scripts, taken = SweepDir(run.root), scripts_of(run), []
    for (job_id, script), mine in _unnoted_jobs(run, rows).items():
        row = mine[-1]
        submitted_s, cluster = row.submitted_unix_s, row.cluster or clusters_asked(environ)
        job = JobIdentity(job_id, cluster, row.user, row.name, (script,), submitted_s, submitted_s, int(row.uid))
        try:
            if sweep.is_there() and not _note_points(sweep, scripts[script], job_id, mine):
                continue
            analysis = read_json_object(run.submission, within=run.root).get("analysis_job_id")
            analysis_job_id = analysis if isinstance(analysis, str) else None
            write_submission(run, job, job_id=job_id, analysis_job_id=analysis_job_id)
        except OSError as error:
            raise HpcmmError(
                f"squeue shows job {job_id} of {run.root}, but that cannot be noted there ({error.strerror}): free "
                "some space."
            ) from error
        taken.append(job_id)
    return taken


def _note_points(sweep: SweepDir, first: int, job_id: str, rows: Sequence[Job]) -> bool:
    """Note the points that an array runs, or ran; False if there are none, or it is over and they have later jobs."""
    ledger, single = read_ledger(sweep.root), {row.job_id for row in rows}
    ranges = [each for each in single if "_[" in each]
    points = [
        point
        for point in ledger.points
        if (task := f"{job_id}_{point.index - first}") in single
        or any(is_task_of(task, each) for each in ranges)
        or task in job_ids_of(ledger.run(point), ())
    ]
    if not points or not (any(row.active for row in rows) or not any(point.jobs for point in points)):
        return False
    ledger.note_array(job_id, points, first)
    return True


def target_of(run: RunDir) -> Target:
    """A run, point or sweep by its directory."""
    return _target(run.root.name, run.root)


def find_folder(given: Path) -> Path:
    """``given`` if that exists, else the directory of the run, point or sweep in ``./runs`` that it names.

    Of what a plain word names, another user's comes after all that is this user's; a line says whose it is. What names
    none is given back. Raises HpcmmError for a point that a sweep lacks.
    """
    is_there = os.path.lexists(given)
    theirs = is_there and other_user(given) is not None
    found = None
    if not is_there or (theirs and _WORD.fullmatch(str(given))):
        with suppress(NoSuchRunError, OSError):  # such as a name that is too long
            found = find_targets(str(given), RUNS)[0].run
    if found is not None and (not is_there or is_mine(found.root)):
        given = found.root
    if (user := other_user(given)) is not None:
        print(f"hpcmm: {visible(str(given))} is of user {user}, who may have written anything there.", file=sys.stderr)
    return given


def run_of_command(job: Job) -> RunDir | None:
    """The run whose script this job was submitted with, by what Slurm noted of it; of an array's task its point."""
    run = folder_of_command(job)
    return run if run is not None and is_run(run.root) else None


def folder_of_command(job: Job) -> RunDir | None:
    """As :func:`run_of_command`, also if the folder is gone."""
    start = job.command.find("/")
    script = Path(job.command[start:]) if start >= 0 else None
    first = first_point_of(script) if script is not None else None
    if script is None or first is None:
        return None
    _, _, task = job.job_id.partition("_")
    sweep = SweepDir(script.parent)
    return sweep.point(first + int(task)) if _NUMBER.fullmatch(task) and sweep.is_there() else sweep.shared


def settings(run: RunDir) -> dict[str, Any]:
    """The run's frozen configuration as plain values, of whatever version of hpcmm; empty if there is none.

    Of a sweep that of its first point, for all that the points share.
    """
    return read_untyped_config(_with_config(run).config)


def world_size_of(run: RunDir) -> int:
    """The ranks of a run, as its configuration says; 0 if that says no number, or one beyond any run's."""
    cluster = settings(run).get("cluster")
    given = [cluster.get(key) for key in ("nodes", "ranks_per_node")] if isinstance(cluster, dict) else []
    sizes = [each for each in given if isinstance(each, int) and 0 < each <= MAX_WORLD_SIZE]
    size = sizes[0] * sizes[1] if len(sizes) == 2 else 0
    return size if size <= MAX_WORLD_SIZE else 0


def _with_config(run: RunDir) -> RunDir:
    sweep = SweepDir(run.root)
    return sweep.point(0) if sweep.is_there() else run


def slurm_environment(run: RunDir | None, environ: dict[str, str] | None = None) -> dict[str, str]:
    """This process' environment, and in it how the run's configuration finds the cluster.

    Only a configuration that no other user can have written counts: SLURM_CONF chooses the code that squeue loads.
    """
    environ = dict(os.environ) if environ is None else environ
    if run is None:
        return environ
    cluster = read_untyped_config(_with_config(run).config, own=True).get("cluster")
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
    if any(Path(place).exists() for place in CONFIGURATIONS):
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


def _path(asked: str) -> Path | None:
    """``asked`` as a path to a run's folder, or to the ledger in it; None for an empty word."""
    if not asked:
        return None
    try:
        path = Path(asked).expanduser()
    except RuntimeError:  # no such user
        path = Path(asked)
    return path.parent if path.name == SweepDir(path).ledger.name else path


def _settled(folder: Path) -> Path:
    """One's own run by its real path, which no other user can lead elsewhere; another user's as it is named."""
    place = settle(folder)
    return place.real if place is not None and place.uid == os.geteuid() else folder.absolute()


def _named(name: str, runs_root: Path) -> list[RunDir]:
    """The run of this name in ``runs_root``, else those whose names begin with it, newest first.

    What other users named like that comes after all that is this user's.
    """
    if name in {"", ".", ".."} or "/" in name:
        folder = _path(name) if "/" in name else None
        return [RunDir(folder)] if folder is not None and is_run(folder) else []
    within = runs_root / name
    if is_mine(within) and is_run(within):
        return [RunDir(within)]
    if found := [run for run in runs_in(runs_root) if _begins_with(run, name)]:
        return found
    theirs = [RunDir(folder) for folder in (Path(name), within) if is_run(folder)]
    return theirs or [run for run in runs_in(runs_root, of_others=True) if _begins_with(run, name)]


def _begins_with(run: RunDir, start: str) -> bool:
    """Whether ``start`` is the name that a user gave, or that and a part of what a launch adds: ``demo-2026``."""
    name = run.root.name
    added = _ADDED.search(name)
    return name.startswith(f"{start}-") or (added is not None and len(start) > added.start() and name.startswith(start))


def _target(asked: str, folder: Path) -> Target:
    run = RunDir(_settled(folder))
    sweep = SweepDir(run.root)
    if sweep.is_there():
        return Target(asked, job_ids_of(run), run, sweep)
    if (place := SweepDir.of_point(run)) is not None:
        return replace(_point(*place, None), asked=asked)
    return Target(asked, job_ids_of(run), run)


def _point(sweep: SweepDir, index: int, tasks: Sequence[str] | None) -> Target:
    """A point with its newest job alone. ``tasks``: what the ledger notes of it; None: it is read."""
    run = sweep.point(index)
    return Target(f"{sweep.root.name}/{run.root.name}", job_ids_of(run, tasks)[-1:], run)


def _targets_of_point(asked: str, runs: Sequence[RunDir], index: int) -> list[Target]:
    """The point of each of these sweeps that has it."""
    found = []
    sweeps = [SweepDir(_settled(run.root)) for run in runs]
    for sweep in sweeps:
        known = jobs_of_points(sweep)
        if index in known or (sweep.is_there() and is_run(sweep.point(index).root)):
            found.append(replace(_point(sweep, index, known.get(index, [])), asked=asked))
    if found:
        return found
    newest = sweeps[0]
    if not newest.is_there():
        raise HpcmmError(f"{asked}: {newest.root} is a single run, which has no points: name the run alone.")
    known = jobs_of_points(newest)
    points = f"its points are {min(known):04d} to {max(known):04d}" if known else "its ledger is damaged"
    raise HpcmmError(f"{asked}: {newest.root} has no point {index:04d}; {points}.")


def _target_of_job(job_id: str, runs_root: Path) -> Target:
    """The job, with the user's own run that it belongs to. What other users' runs claim counts for nothing."""
    runs = runs_in(runs_root)
    array = array_of(job_id)
    for run in runs:
        sweep = SweepDir(run.root)
        known = job_ids_of(run)
        if not sweep.is_there():
            if job_id in known:
                return Target(job_id, (job_id,), run, by_number=True)
        elif array not in known:
            continue
        elif job_id == array:
            return Target(job_id, (job_id,), run, sweep, array, by_number=True)
        else:
            tasks = jobs_of_points(sweep)
            found = next((index for index, each in tasks.items() if job_id in each), None)
            return Target(job_id, (job_id,), None if found is None else sweep.point(found), by_number=True)
    namesake = next((run.root.name for run in runs if _begins_with(run, job_id)), "")
    return Target(job_id, (job_id,), _point_that_ran(job_id, runs), by_number=True, namesake=namesake)


def _point_that_ran(job_id: str, runs: Sequence[RunDir]) -> RunDir | None:
    """The point of a newer sweep that ran as this job: as an array's task that was submitted by hand, or by Slurm's
    own number of the task."""
    for sweep in [each for run in runs[:_MOST_RUNS] if (each := SweepDir(run.root)).is_there()]:
        for index in jobs_of_points(sweep):
            point = sweep.point(index)
            if any(job_id in {each.job_id, each.raw_id} for each in attempts_of(point)):
                return point
    return None


def _no_such_run(asked: str, runs_root: Path, runs: list[RunDir]) -> str:
    names = [run.root.name for run in runs]
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    known = "give a job's number, a run's name or its directory, or a point of a sweep (SWEEP/0003)."
    hint = f"did you mean {close[0]}?" if close else known
    return f"{asked!r} is not a run in {runs_root.absolute()}, no run directory and no job's number: {hint}"
