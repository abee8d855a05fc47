"""The state of what a user asked for, from the first source that knows it: squeue, sacct, the run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hpcmm.jobs.find_run import Target, is_local_cluster, job_ids_of, run_of_command, settings, slurm_environment
from hpcmm.jobs.local_state import local_job
from hpcmm.jobs.run_records import points_without_end, records_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.commands import SilentError
from hpcmm.slurm.queue import Answer, Job, find_jobs

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
    clusters: dict[str, dict[str, str]] = {}
    asked: dict[str, list[str]] = {}
    for target in targets:
        if not is_local(target.run):
            mine = slurm_environment(target.run, dict(environ))
            key = mine.get("SLURM_CONF", "")
            clusters[key] = mine
            asked.setdefault(key, []).extend(target.job_ids)
    answers = {key: _answer(asked[key], clusters[key], needs_slurm=needs_slurm) for key in asked}
    return [
        _local_state(target)
        if is_local(target.run)
        else _state(target, answers[slurm_environment(target.run, dict(environ)).get("SLURM_CONF", "")])
        for target in targets
    ]


def silence(error: SilentError, environ: Mapping[str, str]) -> str:
    """One sentence for a Slurm that does not answer."""
    cure = "; make cluster-up starts the local cluster" if is_local_cluster(environ.get("SLURM_CONF", "")) else ""
    return f"Slurm does not answer ({error.reason}{cure}), so this is what the run directory tells."


def recorded_jobs(runs: Sequence[RunDir]) -> list[Job]:
    """The newest job of each run whose end is noted there."""
    newest = [(run, job_id) for run in runs if not is_local(run) for job_id in job_ids_of(run)[-1:]]
    return [job for run, job_id in newest for job in records_of(run, job_id)]


@dataclass(frozen=True)
class _Silent(Answer):
    """No answer, with a note that says why."""


def _answer(ids: Sequence[str], environ: Mapping[str, str], *, needs_slurm: bool) -> Answer:
    try:
        return find_jobs(ids, environ)
    except SilentError as error:
        if needs_slurm:
            raise
        return _Silent([], [silence(error, environ)])


def _state(target: Target, answer: Answer) -> State:
    jobs: dict[str, Job] = {}
    for job_id in target.job_ids:
        found = [job for job in answer.jobs if job_id in {job.job_id, job.raw_id, job.job_id.split("_")[0]}]
        if not found and target.run is not None:
            found = records_of(target.run, job_id)
        jobs |= {job.job_id: job for job in found}
    silent = isinstance(answer, _Silent)
    notes = list(answer.notes)
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
