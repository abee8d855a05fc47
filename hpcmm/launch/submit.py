"""A written plan -> a queued job: submitit's task, in hpcmm's script on Slurm or by submitit's local executor.

A sweep's points are a job array, or several if one cannot hold them, noted in its ledger; those that failed are
submitted once more.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import submitit

from hpcmm.config import config_file
from hpcmm.config.schema import Executor, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, open_checked
from hpcmm.launch.interpreter import check_environment_from
from hpcmm.launch.plan import Plan
from hpcmm.launch.script import parallel_shares, rank_command
from hpcmm.node.network import find_free_port
from hpcmm.ranges import write_ranges
from hpcmm.runs.ledger import Ledger, LedgerPoint, read_ledger
from hpcmm.runs.ownership import check_runs_root
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import JobIdentity, identity_of, write_submission
from hpcmm.slurm.commands import clusters_asked, job_variables, signals_deferred
from hpcmm.slurm.jobs import ENDED, array_states
from hpcmm.slurm.sbatch import (
    RefusedError,
    UncertainError,
    as_slurm_has_it,
    enter_cluster,
    submitted,
    warn_where_it_cannot_start,
)
from hpcmm.text import printable
from hpcmm.worker.task import RankTask


@dataclass(frozen=True)
class Submission:
    """A job that the scheduler has accepted."""

    planned: Plan
    job_id: str
    """Of a sweep of several arrays the first one's."""
    analysis_job_id: str | None = None
    """The job that analyses the run when it is over."""
    array_ids: tuple[str, ...] = ()
    """Of a sweep its arrays, in the order of their points."""
    local_job: submitit.Job[Any] | None = None
    """Of submitit's local executor."""

    @property
    def run(self) -> RunDir:
        """The run directory; of a sweep the folder that holds those of its points."""
        return self.planned.run

    @property
    def job(self) -> submitit.Job[Any]:
        """submitit's handle, with the ranks' results; of a sweep that of its first point."""
        return self.jobs[0]

    @cached_property
    def jobs(self) -> tuple[submitit.Job[Any], ...]:
        """submitit's handle of each point, with the ranks' results."""
        if self.local_job is not None:
            return (self.local_job,)
        return tuple(
            submitit.SlurmJob(folder=point.run.submitit, job_id=job_id, tasks=list(range(point.config.world_size)))
            for point, job_id in zip(self.planned.points, self._job_ids(), strict=True)
        )

    def _job_ids(self) -> list[str]:
        """The job of each point."""
        if not self.planned.is_sweep:
            return [self.job_id]
        arrays = zip(self.array_ids, self.planned.arrays, strict=True)
        return [f"{job_id}_{task}" for job_id, array in arrays for task in range(array.points or 0)]


@dataclass(frozen=True)
class Resubmission:
    """The points of a sweep that had failed, as they were submitted once more."""

    points: Sequence[LedgerPoint]
    job_ids: tuple[str, ...]
    """Their arrays; none if no point had failed."""
    states: Sequence[str]
    """The state of each point that was asked for before."""
    code: Path | None = None
    """The copy of the code that they run, which was made at the launch; None if it made none."""

    def summary(self) -> str:
        """How many points were in which state."""
        from hpcmm.runs.exit_status import COMPLETED, FAILED, IN_QUEUE  # noqa: PLC0415 -- a launch asks for no state

        return ", ".join(f"{self.states.count(each)} {each.lower()}" for each in (COMPLETED, IN_QUEUE, FAILED))


def submit(planned: Plan, *, is_latest: bool = True) -> Submission:
    """Hand the job over and return at once. ``latest`` points to its run then, unless ``is_latest`` is false.

    Raises HpcmmError if the scheduler does not accept it. If Slurm refuses it for certain, the run directory, which
    this launch has made, is removed: else it would be the newest run of its name, which never ran.
    """
    try:
        return _accepted(planned, _Queued(planned.run if is_latest else None))
    except RefusedError:
        shutil.rmtree(planned.run.root, ignore_errors=True)
        raise


@dataclass
class _Queued:
    """The jobs of this launch that are queued, and what is said of them if it is interrupted."""

    latest: RunDir | None
    """The run that ``latest`` is to point to once a job of it is queued; None: no change."""
    ids: list[str] = field(default_factory=list)
    rest: str = ""
    """How to submit what is not."""

    def add(self, job_id: str) -> None:
        self.ids.append(job_id)
        if self.latest is not None and not _link_latest(self.latest):  # the job is queued already, so this is no error
            link = printable(str(self.latest.root.parent / "latest"))
            print(f"hpcmm: {link} does not point to this run; it is no link of ours.", file=sys.stderr)
        self.latest = None

    def told(self) -> str:
        commands = " and ".join(f"python -m hpcmm.jobs cancel {job_id}" for job_id in self.ids)
        return f"what is submitted stays; to take it back: {commands}{self.rest}" if commands else ""


def resubmit(path: Path, indices: Collection[int] | None = None) -> Resubmission:
    """Submit the failed points of a sweep once more, with the same script, code and configurations.

    ``indices``: of these points alone; None: of all. Points that were never submitted count as failed. Raises
    HpcmmError if there is no ledger at ``path``, or the scheduler does not accept the job.
    """
    from hpcmm.jobs.find_run import take_over  # noqa: PLC0415 -- as above
    from hpcmm.runs.exit_status import FAILED  # noqa: PLC0415 -- as above

    with _locked_ledger(path) as found:
        config = config_file.load(found.run(found.points[0]).config)
        check_runs_root(found.sweep.root)
        _check_scripts(found.sweep)
        enter_cluster(config)
        if taken := take_over(found.sweep.shared):
            print(f"hpcmm: squeue shows {_jobs(taken)} of this sweep, which no launch had noted.", file=sys.stderr)
        ledger = replace(read_ledger(path), lock=found.lock)
        ledger.note_sbatch(runs=False)
        states = point_states(ledger)
        asked = [point for point in ledger.points if indices is None or point.index in indices]
        failed = [point for point in asked if states[point.index] == FAILED]
        if failed:
            check_environment_from(config)
        job_ids = tuple(each.known.job_id for each in _submit_arrays(config, ledger, failed, _Queued(None)))
        code = ledger.sweep.shared.code
        states_before = [states[point.index] for point in asked]
        return Resubmission(failed, job_ids, states_before, code if code.is_dir() else None)


def _check_scripts(sweep: SweepDir) -> None:
    """Raises HpcmmError unless what Slurm is given is this user's own, and no link to something else."""
    firsts = sweep.first_points()
    for script in [name(first) for first in firsts for name in (sweep.submission_script, sweep.analysis_script)]:
        try:
            opened = open_checked(script, within=sweep.root)
        except FileNotFoundError:
            continue  # no analysis; without a script for the job, sbatch says so
        except OSError as error:
            raise HpcmmError(f"{script} is not a script of this sweep ({error.strerror}): launch it anew.") from error
        opened.file.close()
        if opened.writer is not None:
            raise HpcmmError(
                f"{opened.writer} can be written by another user, and the job runs it as you: take it over (chown, "
                "chmod go-w) if you trust it."
            )


def point_states(ledger: Ledger) -> dict[int, str]:
    """``COMPLETED``, ``FAILED`` or ``ACTIVE`` of each point, by index, as Slurm and the run directories tell.

    Raises HpcmmError when Slurm does not answer.
    """
    from hpcmm.runs.exit_status import states_of_points  # noqa: PLC0415 -- as above

    arrays = {job_id: identity_of(ledger.sweep.shared, job_id) for job_id in ledger.newest_arrays()}
    told = array_states(arrays)
    active = {task for task, state in told.items() if state not in ENDED}
    return states_of_points(ledger, active, {task: state for task, state in told.items() if task not in active})


def _accepted(planned: Plan, queued: _Queued) -> Submission:
    config, run = planned.config, planned.run
    if config.cluster.executor is Executor.local:
        job = _submit_locally(planned)
        queued.add(job.job_id)
        return Submission(planned, job.job_id, local_job=job)
    if not planned.is_sweep:
        with signals_deferred(queued.told):
            accepted = _submit_script(config, SweepDir(run.root), queued)
        _look_at(config, run, [accepted], queued)
        return Submission(planned, *accepted.ids)
    with _locked_ledger(run.root) as ledger:
        jobs = _submit_arrays(config, ledger, ledger.points, queued)
        return Submission(planned, *jobs[0].ids, array_ids=tuple(each.known.job_id for each in jobs))


@contextmanager
def _locked_ledger(path: Path) -> Iterator[Ledger]:
    """The ledger while nobody else submits points of its sweep."""
    with (ledger := read_ledger(path)).locked() as lock:
        yield replace(read_ledger(ledger.sweep.root), lock=lock)  # as it is now that nobody else writes it


@dataclass(frozen=True)
class _Accepted:
    """A job or an array that Slurm has accepted."""

    known: JobIdentity
    analysis_job_id: str | None

    @property
    def ids(self) -> tuple[str, str | None]:
        """Of the job and of its analysis."""
        return self.known.job_id, self.analysis_job_id


def _submit_arrays(
    config: RunConfig, ledger: Ledger, points: Sequence[LedgerPoint], queued: _Queued
) -> list[_Accepted]:
    """Submit ``points`` in the arrays that their sweep was split into, and note them in the ledger.

    Returns the arrays. Raises HpcmmError if Slurm refuses one; those before it stay.
    """
    firsts = ledger.sweep.first_points()
    groups: dict[int, list[LedgerPoint]] = {}
    for point in points:
        groups.setdefault(firsts[bisect(firsts, point.index) - 1], []).append(point)
    shares = parallel_shares(config.launch.parallel_points, len(groups)) if groups else []
    left = list(points)
    command = f"python -m hpcmm.launch resubmit {shlex.quote(str(ledger.sweep.root))}"
    jobs: list[_Accepted] = []
    for (first, group), share in zip(groups.items(), shares, strict=True):
        tasks = f"--array={write_ranges(point.index - first for point in group)}" + (f"%{share}" if share else "")
        with signals_deferred(queued.told):
            before = len(queued.ids)
            try:
                jobs.append(_submit_script(config, ledger.sweep, queued, tasks, array=(ledger, first, group)))
            except HpcmmError as error:
                left = [point for point in left if len(queued.ids) == before or point not in group]
                if not left or len(left) == len(points):
                    raise
                are_not = "may not be" if isinstance(error, UncertainError) else "are not"
                raise HpcmmError(
                    f"{len(points) - len(left)} of {len(points)} points are submitted and stay, in "
                    f"{_jobs(queued.ids)}; points {write_ranges(point.index for point in left)} {are_not}. {error} To "
                    f"submit what is left: {command}"
                ) from error
            left = [point for point in left if point not in group]
            queued.rest = f"; to submit the other {len(left)} points: {command}" if left else ""
    _look_at(config, ledger.sweep.shared, jobs, queued)
    return jobs


def _jobs(ids: Sequence[str]) -> str:
    return f"job{'' if len(ids) == 1 else 's'} {', '.join(ids)}"


def _submit_script(
    config: RunConfig,
    scripts: SweepDir,
    queued: _Queued,
    *options: str,
    array: tuple[Ledger, int, Sequence[LedgerPoint]] | None = None,
) -> _Accepted:
    """Hand the job's script to Slurm, and that of the analysis behind it.

    ``queued`` gets them once they are noted. ``array``: the ledger, the point that is task 0, and the points.
    """
    run, first = scripts.shared, array[1] if array is not None else 0
    ledger = array[0] if array is not None else Ledger(scripts, [])
    ledger.note_sbatch(runs=True)
    known = submitted(config, scripts.submission_script(first), config.name, *options, lock=ledger.lock)
    job_id = known.job_id
    if array is not None:
        _note_array(*array, job_id)
    _note_submission(run, known, job_id=job_id, analysis_job_id=None)
    queued.add(job_id)
    # Also of a run that failed: its reports may say why. Each point's analysis waits for its own point alone.
    condition = "afterany" if array is None else "aftercorr"
    analysis_job_id = _submit_analysis(
        config, run, scripts.analysis_script(first), known, *options, f"--dependency={condition}:{job_id}"
    )
    queued.ids.extend([analysis_job_id] if analysis_job_id else [])
    return _Accepted(known, analysis_job_id)


def _look_at(config: RunConfig, run: RunDir, jobs: Sequence[_Accepted], queued: _Queued) -> None:
    """Note how Slurm has the job, or each array, and say so if it cannot start."""
    try:
        for place, accepted in enumerate(jobs):
            known, job = as_slurm_has_it(accepted.known)
            if job is not None:
                _note_submission(run, known, job_id=known.job_id, analysis_job_id=accepted.analysis_job_id)
            if job is not None and place == 0:  # the arrays of a sweep are alike
                warn_where_it_cannot_start(config, job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(queued.told()) from None


def _submit_analysis(config: RunConfig, run: RunDir, script: Path, known: JobIdentity, *options: str) -> str | None:
    """Queue the analysis behind the job that is ``known``, if one was asked for. Returns its job's id.

    Raises HpcmmError, which also says that the job is queued, when Slurm refuses it.
    """
    job_id = known.job_id
    if not is_regular(script):
        return None
    if "," in clusters_asked(os.environ) and "," not in known.cluster:
        options = (*options, f"--clusters={known.cluster}")  # of several the one that has the job to wait for
    try:
        without = config.cluster.environment_from
        analysis = submitted(config, script, f"{config.name}-analysis", *options, without=without)
    except UncertainError as error:
        said = f"Job {job_id} is submitted and stays, but its analysis may not be: {error.why}. `squeue --me` shows it."
        raise HpcmmError(said) from error
    except HpcmmError as error:
        raise HpcmmError(f"Job {job_id} is submitted and stays, but its analysis is not. {error}") from error
    _note_submission(run, analysis, job_id=job_id, analysis_job_id=analysis.job_id)
    return analysis.job_id


def _note_array(ledger: Ledger, first: int, points: Sequence[LedgerPoint], job_id: str) -> None:
    try:
        ledger.note_array(job_id, points, first)
    except OSError as error:
        raise HpcmmError(
            f"Job {job_id} is submitted, but {ledger.sweep.ledger} cannot be written ({error.strerror}): free some "
            f"space, and take the job back with `python -m hpcmm.jobs cancel {job_id}` before you launch again."
        ) from error


def _note_submission(run: RunDir, *known: JobIdentity, **jobs: str | None) -> None:
    """Write ``submission.json``; says so if that cannot be, for the job is queued already."""
    try:
        write_submission(run, *known, **jobs)
    except OSError as error:
        print(
            f"hpcmm: job {jobs['job_id']} is submitted, but {printable(str(run.submission))} cannot be written "
            f"({error.strerror}).",
            file=sys.stderr,
        )


def _link_latest(run: RunDir) -> bool:
    """Point ``latest`` beside the run directory to it, in one step. False, and nothing changed, if it is no link."""
    link = run.root.parent / "latest"
    if link.exists() and not link.is_symlink():
        return False
    fresh = run.root.parent / f".latest-{secrets.token_hex(8)}"
    try:
        fresh.symlink_to(run.root.name)
    except OSError:
        return False
    try:
        fresh.replace(link)  # in a folder like /tmp another user's link stays
    except OSError:
        fresh.unlink(missing_ok=True)
        return False
    return True


class _WrappedLocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor, with hpcmm's wrapper in front of each rank."""

    def __init__(self, planned: Plan) -> None:
        config, run = planned.config, planned.run
        super().__init__(run.submitit)
        # The controller's alone: the programs that a rank starts look into their own folders, as on Slurm.
        own = [] if "PYTHONSAFEPATH" in os.environ else ["env", "-u", "PYTHONSAFEPATH"]
        self._rank_command = shlex.join([*own, *rank_command(config, run, planned.job)])
        self.update_parameters(
            timeout_min=config.cluster.time_limit_min,
            tasks_per_node=config.cluster.ranks_per_node,
            gpus_per_node=config.cluster.gpus_per_node,
        )

    @property
    def _submitit_command_str(self) -> str:
        return self._rank_command


def _submit_locally(planned: Plan) -> submitit.Job[Any]:
    config, run = planned.config, planned.run
    for name in job_variables(os.environ):  # of a job that this is launched from, whose rank 0 is none of ours
        del os.environ[name]
    os.environ.update(config.cluster.environment)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(find_free_port("127.0.0.1")))
    python_path = [*planned.job.python_path, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
    executor = _WrappedLocalExecutor(planned)
    with _output_to(run.batch_log), _safe_path():
        job = executor.submit(RankTask(str(run.root)))
    _note_submission(run, job_id=job.job_id)
    return job


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Within, what this process starts writes to ``log``: who reads this command's output need not wait for the job."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with log.open("ab") as file:
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            yield
        finally:
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Within, a Python looks for no modules in the current folder, which others may write: submitit gives no -P."""
    given = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if given is not None:
            os.environ["PYTHONSAFEPATH"] = given
