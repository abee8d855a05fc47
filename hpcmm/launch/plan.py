"""Points -> a plan: each name, folder and job that a launch needs, resolved once. Nothing is on disk yet.

A single run is a sweep of one point. The steps of every launch, each one function:
:func:`~hpcmm.config.sweep.compose_points`, :func:`plan`, :func:`~hpcmm.launch.write.write`,
:func:`~hpcmm.launch.submit.submit`.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.annotate.stopping import RUN_DIR
from hpcmm.config.command import note_on_outputs, note_on_rank, what_runs
from hpcmm.config.parts import targets_of
from hpcmm.config.schema import Executor, RunConfig
from hpcmm.config.sweep import Point, RefusedPoint, compose_points, divided, text_of_refused
from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.config.validate import validate
from hpcmm.config.workload import workload_of
from hpcmm.errors import HpcmmError
from hpcmm.files import is_file_here, is_regular, read_followed
from hpcmm.launch.interpreter import Interpreter, ask, check, check_environment_from, require_packages, with_python
from hpcmm.launch.job_imports import scripts_named, used_packages
from hpcmm.launch.script import Job, arrays_of, rank_comment, render_script
from hpcmm.launch.snapshot import CodePlan, plan_code
from hpcmm.ranges import tasks_in
from hpcmm.runs.ledger import array_of, jobs_of_points
from hpcmm.runs.ownership import Exchangeable, check_runs_root, is_mine, real_and_trusted, require_mine
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import identity_of, job_ids_of, submitted_job
from hpcmm.slurm.commands import SilentError, clusters_asked
from hpcmm.slurm.jobs import find_job
from hpcmm.slurm.sbatch import enter_cluster, most_array_tasks
from hpcmm.text import printable, printable_lines

if TYPE_CHECKING:
    from hpcmm.launch.submit import Submission

_MOST_ARRAYS = 100
_JOB_ID = re.compile(r"[1-9][0-9]*(?:_[0-9]+)?")


@dataclass(frozen=True)
class PlannedPoint:
    """One point: what sets it apart, and what its ranks run."""

    overrides: tuple[str, ...]
    """Empty for a single run."""
    run: RunDir
    config: RunConfig
    """As the ranks read it: with the script where its copy will lie, and the run to start from by its folder."""


@dataclass(frozen=True)
class Plan:
    """A launch that is checked and named."""

    points: tuple[PlannedPoint, ...]
    job: Job
    arrays: tuple[Job, ...]
    """The job itself; of a sweep that no array of this cluster can hold, several."""
    code: CodePlan
    overrides: tuple[str, ...]
    """As they were given."""
    exchangeable: Exchangeable | None
    """Who could exchange the run's directory, as it was said."""
    interpreter: Interpreter
    """The job's Python."""
    packages: frozenset[str] | None
    """What the user's code imports; None if the task is hpcmm's own, or if nothing tells."""
    refused: tuple[RefusedPoint, ...] = ()
    """Points of the sweep that cannot run."""

    @property
    def run(self) -> RunDir:
        """Where script, code and provenance lie: the run directory, or the folder that holds those of the points."""
        return self.job.run

    @property
    def config(self) -> RunConfig:
        """For what all points share."""
        return self.points[0].config

    @property
    def project(self) -> Path | None:
        """The user's project that is to be copied, if one is."""
        return self.code.project

    @property
    def is_sweep(self) -> bool:
        """Whether this is a job array with a ledger; a sweep may have a single point too."""
        return self.job.points is not None


def launch(overrides: Sequence[str]) -> Submission:
    """Compose, plan, write and submit a run or a sweep, as :func:`plan`, ``write`` and ``submit`` do; no stages."""
    from hpcmm.launch.submit import submit  # noqa: PLC0415 -- submitit, which a dry run does not need
    from hpcmm.launch.write import write  # noqa: PLC0415

    points = compose_points(overrides)
    if any(point.config.stages for point in points):
        raise HpcmmError("stages are for the command line: run `hpcmm launch`.")
    planned = plan(points, overrides)
    require_packages(planned.config, planned.interpreter)
    write(planned)
    return submit(planned)


def plan(points: Sequence[Point], overrides: Sequence[str], follows: Plan | None = None) -> Plan:
    """Validate every point, and resolve what the job needs; points with overrides of their own are a sweep.

    ``follows``: a run of this launch to start from, not there yet. Unless this is a dry run, Slurm is asked for the job
    to wait for and the size of the array. Points of a sweep that cannot run are named and left out, as long as one can.
    Raises HpcmmError for wrong values, and for a script, job or run not there.
    """
    here = Path.cwd()
    points, refused, starts = _validated([replace(each, config=with_python(each.config, here)) for each in points])
    if follows is not None:
        starts[None] = str(follows.run.root)
    first, is_sweep = points[0].config, bool(points[0].overrides)
    if is_sweep:
        _check_can_be_array(first)
        print(printable_lines(text_of_refused(refused, len(points))), end="", file=sys.stderr)
    run = _named(first)
    found = _check_folders(first, run)
    codes = _codes(points, run, here)
    code = codes[what_runs(first.task, here)]
    interpreter = ask(first.cluster)
    for said in filter(None, (note_on_rank(first), *check(first, interpreter, _packages(code, code.scripts)))):
        print(f"hpcmm: {printable(said)}", file=sys.stderr)
    if any(os.pathsep in folder for folder in code.python_path):
        raise HpcmmError(
            f"{run.root.parent} holds a colon, at which PYTHONPATH is split: set runs_root to another folder."
        )
    if (start := starts[first.train.init_from]) is not None:
        _compare_with_start(first, RunDir(Path(start)), follows)
    _note_same_outputs(points, codes[what_runs(first.task, here)], here)
    named = None if first.after is None else _job_or_folder(first.after, run.root.parent)
    after = None if named is None else job_to_wait_for(named, run.root.parent)
    if not first.dry_run:
        check_environment_from(first)
        enter_cluster(first)
        if after is not None and named is not None:
            waited = None if _JOB_ID.fullmatch(named) else RunDir(run.root.parent / named)
            after = _still_to_wait_for(after, str(first.after), waited)
    most_tasks = most_array_tasks() if is_sweep and not first.dry_run else None
    job = Job(run, code.python_path, points=len(points) if is_sweep else None, after=after, working_directory=here)
    arrays = arrays_of(job, most_tasks, first.launch.parallel_points)
    _check_arrays(arrays, most_tasks)
    planned = tuple(
        PlannedPoint(
            point.overrides,
            SweepDir(run.root).point(index) if is_sweep else run,
            _frozen(point.config, codes[what_runs(point.config.task, here)], starts[point.config.train.init_from]),
        )
        for index, point in enumerate(points)
    )
    packages = _packages_of_all(first, code)
    return Plan(planned, arrays[0], arrays, code, tuple(overrides), found, interpreter, packages, tuple(refused))


def _check_folders(config: RunConfig, run: RunDir) -> Exchangeable | None:
    """Raises HpcmmError for folders in which another user could exchange what the job runs or loads."""
    if config.cluster.cache_dir is not None:
        from hpcmm.node.cache import check_cache_dir  # noqa: PLC0415 -- importlib.metadata, 20 ms

        check_cache_dir(config.cluster)
    return check_runs_root(run.root)


def _validated(points: Sequence[Point]) -> tuple[list[Point], list[RefusedPoint], dict[str | None, str | None]]:
    """The points that can run, those that cannot, and the folder of each run that one names to start from.

    Raises HpcmmError if none can.
    """
    starts: dict[str | None, str | None] = {}

    def check(point: Point) -> None:
        validate(point.config)
        if (named := point.config.train.init_from) not in starts:
            starts[named] = run_to_start_from(point.config)

    return *divided(points, check), starts


def _check_can_be_array(config: RunConfig) -> None:
    if config.cluster.executor is Executor.local:
        raise HpcmmError("A sweep is a Slurm job array, and cluster=local has no Slurm: choose another cluster.")


def _check_arrays(arrays: Sequence[Job], most_tasks: int | None) -> None:
    if len(arrays) > _MOST_ARRAYS:
        raise HpcmmError(
            f"This sweep would be {len(arrays)} job arrays, for one may have {most_tasks} tasks here (MaxArraySize), "
            f"and hpcmm submits {_MOST_ARRAYS} at most: split it into smaller sweeps."
        )


def _named(config: RunConfig) -> RunDir:
    """A new run directory, by name and time."""
    name = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return RunDir(Path(config.runs_root).expanduser().absolute() / name)


def _codes(points: Sequence[Point], run: RunDir, working_directory: Path) -> dict[tuple[str | None, ...], CodePlan]:
    """The code of each script that is swept; all must lie in one project, since one copy is made."""
    codes: dict[tuple[str | None, ...], CodePlan] = {}
    first = what_runs(points[0].config.task, working_directory)
    targets = {target for point in points for target in targets_of(point.config)}
    for point in points:
        what = what_runs(point.config.task, working_directory)
        if what not in codes:
            codes[what] = plan_code(point.config, run, working_directory, targets)
            if codes[what].project != codes[first].project:
                named, before = (next(filter(None, each), None) for each in (what, first))
                raise HpcmmError(
                    f"task.path={named} lies in another project than {before}: "
                    "a sweep shares one copy of the code, so launch these one by one."
                )
    codes[first] = codes[first].joined(codes.values(), (point.config.task for point in points))
    return codes


def _note_same_outputs(points: Sequence[Point], code: CodePlan, working_directory: Path) -> None:
    """Say if points that run a program of the user's may write the same; a workload writes to its run directory."""
    tasks = [point.config.task for point in points]
    if len(tasks) > 1 and all(task._target_ is None for task in tasks):
        reads_run_dir = any(RUN_DIR.encode() in read_followed(script) for script in filter(is_regular, code.scripts))
        if (said := note_on_outputs(tasks, reads_run_dir, working_directory)) is not None:
            print(f"hpcmm: {printable(said)}", file=sys.stderr)


_SHELL_BYTES = 100_000
"""So much of a shell script is looked at."""


def _packages(code: CodePlan, scripts: Collection[Path]) -> frozenset[str]:
    return used_packages([*scripts], {*code.searched, *(each.parent for each in scripts)}, code.words)


def _packages_of_all(config: RunConfig, code: CodePlan) -> frozenset[str] | None:
    """Also of what a program is told to run, maybe by another Python; None if nothing tells what is imported."""
    shells = (each for each in code.scripts if each.suffix != ".py")
    shell = [read_followed(each, _SHELL_BYTES).decode(errors="replace") for each in shells if is_file_here(each)]
    named = scripts_named([*code.words, *shell], code.working_directory)
    if not code.scripts and not named and config.task.program is None:
        return None
    return _packages(replace(code, words=(*code.words, *shell)), dict.fromkeys((*code.scripts, *named)))


def _frozen(config: RunConfig, code: CodePlan, start: str | None) -> RunConfig:
    task, train = code.frozen(config.task), replace(config.train, init_from=start)
    stage = [str(Path(source).expanduser().absolute()) for source in config.launch.stage]
    return replace(config, task=task, train=train, launch=replace(config.launch, stage=stage))


# The run to start from: train.init_from.


def run_to_start_from(config: RunConfig) -> str | None:
    """The run's absolute folder, with links such as ``latest`` followed now, for they point elsewhere later.

    A name is looked for in ``runs_root`` first. Raises HpcmmError if there is not a run directory, or no finished
    checkpoint in it and ``after`` names no job that may bring one.
    """
    named = config.train.init_from
    if named is None:
        return None
    runs_root = Path(config.runs_root).expanduser()
    if named and "\0" not in named:
        places = (runs_root / named, Path(named).expanduser())
        for folder in filter(is_mine, places):  # another user may have left a run of the same name
            if is_regular(folder / "config.yaml"):
                return str(_trained(_readable(folder, config), config).root)
    if (run := _run_named(named, runs_root)) is None:
        raise HpcmmError(
            f"train.init_from={named}: neither {config.runs_root} holds a run of that name, nor is it a run's folder."
        )
    if SweepDir(run.root).is_there():
        raise HpcmmError(
            f"train.init_from={named}: {run.root} is a sweep: name one of its points, such as {run.root.name}/0000."
        )
    return str(_trained(_readable(run.root, config), config).root)


def _run_named(named: str, runs_root: Path) -> RunDir | None:
    """The run, point or sweep that is meant by the start of a name, a job's number or a folder."""
    from hpcmm.jobs.find_run import NoSuchRunError, find_targets  # noqa: PLC0415 -- few launches name another run

    try:
        return find_targets(named, runs_root)[0].run
    except NoSuchRunError:
        return None


def _readable(named: Path, config: RunConfig) -> RunDir:
    """A checkpoint is a pickle, which the ranks refuse to read if another user than root could have written it."""
    root, reason = real_and_trusted(named, RunDir(named).checkpoints.name)
    if reason:
        raise HpcmmError(
            f"train.init_from={config.train.init_from}: {reason}, and reading a checkpoint runs code from it: take it "
            "over (chown, chmod go-w) if you trust it."
        )
    return RunDir(root)


def _trained(run: RunDir, config: RunConfig) -> RunDir:
    if config.after is None and not run.has_checkpoint():
        raise HpcmmError(
            f"train.init_from={config.train.init_from}: {run.checkpoints} holds no finished checkpoint: name a run "
            "that has trained to its end, or, where it still waits or runs, start this one after it with after=JOB."
        )
    return run


def _compare_with_start(config: RunConfig, start: RunDir, follows: Plan | None) -> None:
    """Say what the workload finds to differ from ``start``. Raises HpcmmError if its weights do not fit this run."""
    if (workload := workload_of(config)) is not None:
        own = follows.config if follows and follows.run.root == start.root else None
        before = read_untyped_config(start.config) if own is None else asdict(own)
        if problems := [f"train.init_from: {start.root} {each}" for each in workload.problems_on_start(config, before)]:
            raise HpcmmError("\n".join(problems))
        for difference in workload.notes_on_start(config, before):
            print(f"hpcmm: {printable(f'{start.root} {difference}')}", file=sys.stderr)


# What is asked of Slurm before anything is written.


def _job_or_folder(named: str, runs_root: Path) -> str:
    """A job's number as it is; else the absolute folder of the run, point or sweep; what names none is given back."""
    if _JOB_ID.fullmatch(named) or "\0" in named:
        return named
    run = _run_named(named, runs_root)
    return named if run is None else str(run.root)


def job_to_wait_for(named: str, runs_root: Path) -> str:
    """The id of the job: ``named`` itself, or that of the newest job in the run directory of that name.

    Of a sweep those of its arrays, with colons, as an option of sbatch takes them. Raises HpcmmError if there is no
    such run, or Slurm never accepted it.
    """
    if _JOB_ID.fullmatch(named):
        return named
    run = RunDir(runs_root / named)
    if "\0" in named or not run.root.is_dir():
        raise HpcmmError(f"after={named} is not a job id, and {runs_root} holds no run of that name.")
    run = RunDir(require_mine(run.root, f"after={named} waits for a run of yours, or for a job's number"))
    if job_ids := job_ids_of(run):
        return ":".join(job_ids) if SweepDir(run.root).is_there() else job_ids[-1]
    if (job_id := submitted_job(run)) is None:
        raise HpcmmError(f"after={named}: {run.submission} tells no job: see python -m hpcmm.jobs status {named}.")
    if not _JOB_ID.fullmatch(job_id):
        raise HpcmmError(f"after={named}: {run.submission} holds {job_id[:40]!r}, which is not a job id.")
    return job_id


def _still_to_wait_for(job_id: str, named: str, run: RunDir | None) -> str | None:
    """``job_id``, or None if that job has completed. ``run``: whose it is; None if it is ``named`` by its number.

    Slurm 22.05 starts a job at once whose dependency names a job that it does not know (any more), so this asks before.
    Raises HpcmmError if the job has failed, nobody knows it, or another job has its number.
    """
    if run is not None and SweepDir(run.root).is_there():
        return _points_to_wait_for(run, named)
    state = find_job(job_id) if run is None else None
    ended = state.state if state is not None else run and _end_of_run(job_id, named, run)
    if ended is None or (state is not None and state.active):
        return job_id
    if ended != "COMPLETED":
        raise HpcmmError(f"after={named}: that job ended as {ended}, so a job after it would never start.")
    print(f"hpcmm: job {job_id} has completed, so there is nothing to wait for.", file=sys.stderr)
    return None


def _end_of_run(job_id: str, named: str, run: RunDir) -> str | None:
    """How the run's own job ended, by Slurm, else by its run directory; None if it waits or runs."""
    known = identity_of(run, job_id)
    _check_cluster(job_id, named, known.cluster)
    try:
        job = find_job(known)
    except SilentError:
        raise
    except HpcmmError as error:  # Slurm knows it no longer, or keeps no accounts
        from hpcmm.runs.exit_status import outcome_of  # noqa: PLC0415 -- as above

        if (outcome := outcome_of(run, job_id)) is None:
            raise HpcmmError(f"after={named}: {error} {run.root} notes no end of it either.") from error
        return outcome.state
    return None if job.active else job.state


def _check_cluster(job_id: str, named: str, cluster: str) -> None:
    """Raises HpcmmError if the job is on another cluster than that of this launch."""
    here = clusters_asked(os.environ)
    if cluster and here and not {*cluster.split(",")} & {*here.split(",")}:
        raise HpcmmError(
            f"after={named}: job {job_id} is on cluster {cluster}, and this launch goes to {here}: no job can "
            "wait for one of another cluster."
        )


def _points_to_wait_for(sweep: RunDir, named: str) -> str | None:
    """The arrays whose points wait or run, with colons; of an array whose points partly ran again its tasks.

    None if all have completed. Raises HpcmmError if the newest job of a point did not complete.
    """
    from hpcmm.jobs.find_run import target_of  # noqa: PLC0415 -- as above
    from hpcmm.jobs.state import states_of  # noqa: PLC0415

    (state,) = states_of([target_of(sweep)])
    for job in state.active:
        _check_cluster(job.job_id, named, job.cluster)
    active = [task for job in state.active for task in tasks_in(job.job_id)]
    ended = {job.job_id: job.state for job in state.jobs if not job.active and job.state != "COMPLETED"}
    ended |= {point.job_ids[-1]: "a job without a noted end" for point in state.unknown}
    ended |= {point.asked: "a point that was never submitted" for point in state.unsubmitted}
    if ended:
        job_id, word = next(iter(ended.items()))
        more = f" and {len(ended) - 1} more" if len(ended) > 1 else ""
        raise HpcmmError(
            f"after={named}: {job_id}{more} ended as {word}, so a job after it would never start: submit it once "
            f"more with python -m hpcmm.launch resubmit {shlex.quote(str(sweep.root))}, or wait for single points."
        )
    if not active:
        print(f"hpcmm: the points of {sweep.root} have completed, so there is nothing to wait for.", file=sys.stderr)
        return None
    superseded = {array_of(task) for tasks in jobs_of_points(SweepDir(sweep.root)).values() for task in tasks[:-1]}
    waited = (task if array_of(task) in superseded else array_of(task) for task in active)
    return ":".join(dict.fromkeys(waited))


# What a dry run prints.


def dry_run_text(planned: Plan) -> str:
    """The points of a sweep, the job's script, and what each rank runs."""
    points = [f"# point {index}: {shlex.join(point.overrides)}\n" for index, point in enumerate(planned.points)]
    listed = "".join(points) if planned.is_sweep else ""
    return listed + render_script(planned.config, planned.job) + rank_comment(planned.config, planned.job)
