"""What state a run is in: from Slurm, from its own records, or from its processes on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil

from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.files import is_regular, names_in
from hpcmm.jobs.find_run import Target, is_local_cluster, run_of_command, settings, slurm_environment
from hpcmm.runs.attempts import raw_id_of
from hpcmm.runs.exit_status import STOPPED, outcome_of
from hpcmm.runs.ledger import jobs_of_points
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import identity_of, job_ids_of
from hpcmm.slurm.commands import SilentError, on_cluster
from hpcmm.slurm.jobs import Answer, Job, Wanted, find_jobs, is_same_job, other_job, rows_of
from hpcmm.slurm.polling import LONGEST_S, Poller


def record_of(run: RunDir, job_id: str) -> Job | None:
    """The job as the run directory tells of its end; None if that tells none, or a stop after which the job goes on."""
    outcome = outcome_of(run, job_id)
    if outcome is None or outcome.state == STOPPED:
        return None
    name = str(read_untyped_config(run.config).get("name", ""))
    exit_code = "" if outcome.exit_status is None else f"{outcome.exit_status}:0"
    command, raw_id = str(run.submission_script), raw_id_of(run, job_id)
    return Job(job_id, raw_id, name, state=outcome.state, exit_code=exit_code, command=command, source="run directory")


def records_of(run: RunDir, job_id: str) -> list[Job]:
    """The job as :func:`record_of` has it; of a sweep's array, those of its points whose end is noted."""
    if not is_regular(SweepDir(run.root).ledger):
        record = record_of(run, job_id)
        return [record] if record is not None else []
    folders = map(run.root.joinpath, names_in(run.root, within=run.root))
    points = {int(folder.name): RunDir(folder) for folder in folders if _is_point(folder)}
    found = (record_of(points[index], f"{job_id}_{index}") for index in sorted(points))
    return [record for record in found if record is not None]


def points_without_end(run: RunDir) -> list[str]:
    """Names of a sweep's points of whose newest job no end is noted; empty for a single run and a damaged ledger."""
    sweep = SweepDir(run.root)
    return [
        sweep.point(index).root.name
        for index, jobs in jobs_of_points(sweep).items()
        if jobs and record_of(sweep.point(index), f"{jobs[-1]}_{index}") is None
    ]


def _is_point(folder: Path) -> bool:
    return folder.name.isdecimal() and SweepDir(folder.parent).point(int(folder.name)).root == folder


def local_job(run: RunDir, job_id: str, name: str, ranks: int) -> Job:
    """The run as a job: it runs while its controlling process does, and completed when each rank left a result.

    submitit's number of a local job is that process' own; it may be another's by now, so its command is looked at.
    """
    if job_id.isdecimal() and _runs(int(job_id), run.submitit):
        state = "RUNNING"
    else:
        outcome = outcome_of(run, job_id, ranks)
        state = outcome.state if outcome is not None else "FAILED"
    return Job(job_id, job_id, name=name, state=state, node_count="1", source="run directory")


def _runs(pid: int, folder: Path) -> bool:
    try:
        return str(folder) in psutil.Process(pid).cmdline()
    except (psutil.Error, OverflowError):
        return False


_MOST_POINTS = 5
"""Of the points of a sweep without a noted end, as many are named."""


@dataclass(frozen=True)
class State:
    """A target with its jobs, newest last."""

    target: Target
    jobs: list[Job]
    notes: list[str]
    silent: bool = False
    """Slurm did not answer: the jobs are those whose end the run directory knows."""

    @cached_property
    def run(self) -> RunDir | None:
        """The run directory, also where only a job's number was given."""
        if self.target.run is not None:
            return self.target.run
        commands = {job.command: job for job in self.jobs}  # the tasks of an array have one
        return next((run for job in reversed(commands.values()) if (run := run_of_command(job)) is not None), None)

    @property
    def active(self) -> list[Job]:
        return [job for job in self.jobs if job.active]


def states_of(
    targets: Sequence[Target], environ: Mapping[str, str] = os.environ, *, needs_slurm: bool = True
) -> list[State]:
    """The states of all targets, with one call of squeue, and at most one of sacct, for each cluster they are on.

    Raises HpcmmError when squeue does not answer; unless ``needs_slurm``, what run directories tell is taken then,
    which is nothing of a job that waits or runs.
    """
    clusters: dict[tuple[str, str], dict[str, str]] = {}
    asked: dict[tuple[str, str], list[Wanted]] = {}
    parts: list[list[tuple[Wanted, tuple[str, str]]]] = []
    """Of each target its jobs, each with the key of the cluster that has it."""
    for target in targets:
        parts.append([])
        found = {} if is_local(target.run) else slurm_environment(target.run, dict(environ))
        for job_id in () if is_local(target.run) else target.job_ids:
            known = None if target.run is None else identity_of(target.run, job_id)
            mine = on_cluster(known.cluster, found) if known is not None else found
            key = (mine.get("SLURM_CONF", ""), mine.get("SLURM_CLUSTERS", ""))
            wanted = job_id if known is None or target.by_number else known
            clusters[key] = mine
            asked.setdefault(key, []).append(wanted)
            parts[-1].append((wanted, key))
    answers = {key: _answer(asked[key], clusters[key], needs_slurm=needs_slurm) for key in asked}
    return [
        _local_state(target)
        if is_local(target.run)
        else _state(target, [(wanted, answers[key]) for wanted, key in part])
        for target, part in zip(targets, parts, strict=True)
    ]


def environment_of_job(run: RunDir | None, job: Job) -> dict[str, str]:
    """This process' environment, in which Slurm's commands ask the cluster that has this job of ``run``."""
    return on_cluster(job.cluster, slurm_environment(run))


def poller_of(
    targets: Sequence[Target],
    known: list[State] | None = None,
    longest_s: float = LONGEST_S,
    tell: Callable[[str], object] = lambda _: None,
) -> Poller[list[State]]:
    """The states of all targets, to be asked for again and again, at least every ``longest_s`` seconds."""
    return Poller(lambda: states_of(targets), _changing, known=known, longest_s=longest_s, tell=tell)


def all_over(states: Sequence[State]) -> bool:
    """Whether no job of any target waits or runs."""
    return not any(state.active for state in states)


def _changing(states: Sequence[State]) -> list[list[tuple[str, str]]]:
    return [[(job.job_id, job.state) for job in state.jobs] for state in states]


def silence(error: SilentError, environ: Mapping[str, str]) -> str:
    """One sentence for a Slurm that does not answer."""
    remedy = "; make cluster-up starts the local cluster" if is_local_cluster(environ.get("SLURM_CONF", "")) else ""
    return f"Slurm does not answer ({error.reason}{remedy}), so this is what the run directory tells."


def recorded_jobs(runs: Sequence[RunDir]) -> list[Job]:
    """The newest job of each run whose end is noted there."""
    newest = [(run, job_id) for run in runs if not is_local(run) for job_id in job_ids_of(run)[-1:]]
    return [job for run, job_id in newest for job in records_of(run, job_id)]


@dataclass(frozen=True)
class _Silent(Answer):
    """No answer, with a note that says why."""


def _answer(wanted: Sequence[Wanted], environ: Mapping[str, str], *, needs_slurm: bool) -> Answer:
    try:
        return find_jobs(wanted, environ)
    except SilentError as error:
        if needs_slurm:
            raise
        return _Silent([], [silence(error, environ)])


def _state(target: Target, answers: Sequence[tuple[Wanted, Answer]]) -> State:
    """The target with each of its jobs, as the answer of the cluster that has it tells."""
    jobs: dict[str, Job] = {}
    notes = list(dict.fromkeys(note for _, answer in answers for note in answer.notes))
    for wanted, answer in answers:
        job_id = wanted if isinstance(wanted, str) else wanted.job_id
        found = rows_of(wanted, answer.jobs)
        if found and target.by_number and target.run is not None:
            known = identity_of(target.run, job_id)
            target = target if all(is_same_job(known, job) for job in found) else replace(target, run=None)
        if (other := other_job(wanted, answer.jobs)) is not None:
            notes.append(f"{other}, so this is what the run directory of {target.asked} tells.")
        if not found and target.run is not None:
            found = records_of(target.run, job_id)
        jobs |= {job.job_id: job for job in found}
    silent = any(isinstance(answer, _Silent) for _, answer in answers)
    if silent and jobs and target.run is not None and (unknown := points_without_end(target.run)):
        named = ", ".join(unknown[:_MOST_POINTS]) + (" and more" if len(unknown) > _MOST_POINTS else "")
        points = "point" if len(unknown) == 1 else "points"
        notes.append(f"No end is noted of {len(unknown)} {points} of {target.asked}: {named}.")
    return State(target, list(jobs.values()), notes, silent)


def is_local(run: RunDir | None) -> bool:
    """Whether it ran without Slurm, on submitit's local executor."""
    cluster = settings(run).get("cluster") if run is not None else None
    return isinstance(cluster, dict) and cluster.get("executor") == "local"


def _local_state(target: Target) -> State:
    assert target.run is not None
    given = settings(target.run)
    ranks = given["cluster"].get("ranks_per_node")
    ranks = ranks if isinstance(ranks, int) else 1
    newest = job_ids_of(target.run)[-1:]
    return State(target, [local_job(target.run, each, str(given.get("name", "")), ranks) for each in newest], [])
