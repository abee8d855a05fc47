"""What state a run is in: from Slurm, from its own records, or from its processes on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil

from hpcmm.config.untyped_config import read_untyped_config
from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import (
    Target,
    is_local_cluster,
    run_of_command,
    scripts_of,
    settings,
    shared_folder,
    slurm_environment,
    take_over_unless_locked,
    target_of,
)
from hpcmm.ranges import is_task_of, tasks_in
from hpcmm.runs.attempts import attempts_of, raw_id_of
from hpcmm.runs.exit_status import COMPLETED, FAILED, STOPPED, outcome_of
from hpcmm.runs.ledger import array_of
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir
from hpcmm.runs.submission import identity_of, job_ids_of
from hpcmm.slurm.commands import SilentError, on_cluster
from hpcmm.slurm.jobs import Answer, Job, Wanted, find_jobs, is_same_job, jobs_of_scripts, other_job, rows_of
from hpcmm.slurm.polling import LONGEST_S, Poller
from hpcmm.text import printable


def record_of(run: RunDir, job_id: str) -> Job | None:
    """The job as the run directory tells of its end; None if that tells none, or a stop after which the job goes on.

    ``job_id`` may be Slurm's own number of an array's task.
    """
    job_id = next((each.job_id for each in attempts_of(run) if each.raw_id == job_id), job_id)
    outcome = outcome_of(run, job_id)
    if outcome is None or outcome.state == STOPPED:
        return None
    name = str(read_untyped_config(run.config).get("name", ""))
    exit_code = "" if outcome.exit_status is None else f"{outcome.exit_status}:0"
    command, raw_id = str(run.submission_script), raw_id_of(run, job_id)
    return Job(job_id, raw_id, name, state=outcome.state, exit_code=exit_code, command=command, source="run directory")


def local_job(run: RunDir, job_id: str, name: str, ranks: int) -> Job:
    """The run as a job: it runs while its controlling process does, and completed when each rank left a result.

    One that stopped as asked has completed too: nobody queues it again. submitit's number of a local job is that
    process' own; it may be another's by now, so its command and its user are looked at.
    """
    if job_id.isdecimal() and _runs(int(job_id), run):
        state = "RUNNING"
    else:
        outcome = outcome_of(run, job_id, ranks)
        state = outcome.state if outcome is not None else COMPLETED if run.stopped.exists() else FAILED
    return Job(job_id, job_id, name=name, state=state, node_count="1", source="run directory")


def _runs(pid: int, run: RunDir) -> bool:
    try:
        process = psutil.Process(pid)
        # Another user's process can name any folder among its words. One that has just called exec has none yet.
        is_ours = process.uids().real == run.root.stat().st_uid
        return is_ours and (str(run.submitit) in (words := process.cmdline()) or (not words and bool(process.exe())))
    except (psutil.Error, OverflowError, OSError):
        return False


_MOST_POINTS = 5
"""Of the points of a sweep whose state nobody tells, as many are named."""
_MOST_ARRAYS, _MOST_ARRAYS_OF_OTHERS = 1000, 20
"""Of a sweep that Slurm is asked for."""


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
        """The run directory, also where only a job's number was given; of several points the folder of their sweep."""
        if self.target.run is not None:
            return self.target.run
        commands = {job.command: job for job in self.jobs}  # the tasks of an array have one
        run = next((run for job in reversed(commands.values()) if (run := run_of_command(job)) is not None), None)
        place = SweepDir.of_point(run) if run is not None and self.is_array else None
        return place[0].shared if place is not None else run

    @property
    def is_array(self) -> bool:
        """Whether this is a sweep or an array, which has a state for each task."""
        return self.target.sweep is not None or len({job.job_id for job in self.jobs if "_" in job.job_id}) > 1

    def run_of(self, job: Job) -> RunDir | None:
        """The run directory of one of the jobs: of a task its point's, of several tasks their sweep's."""
        point = self.target.tasks.get(job.job_id)
        if point is not None:
            return point.run
        several = self.target.sweep is not None and not JOB_ID.fullmatch(job.job_id)
        return self.run if several else run_of_command(job) or self.run

    @cached_property
    def unsubmitted(self) -> list[Target]:
        """Points of the sweep that no job was ever submitted for."""
        return [point for point in self.target.points if not point.job_ids]

    @cached_property
    def unknown(self) -> list[Target]:
        """Points whose newest job Slurm does not know, and whose end is not noted."""
        known = {job.job_id for job in self.jobs}
        ranges = [job.job_id for job in self.jobs if "_[" in job.job_id]
        return [
            point
            for task, point in self.target.tasks.items()
            if task not in known and not any(is_task_of(task, each) for each in ranges)
        ]

    @property
    def newest(self) -> Job:
        """The newest job; of the components of one the first, which has the script, or the first that went badly."""
        newest = self.jobs[-1]
        whole, plus, _ = newest.job_id.partition("+")
        parts = [job for job in self.jobs if plus and job.job_id.startswith(f"{whole}+")]
        return min(parts or [newest], key=lambda job: (job.state == "COMPLETED", job.job_id))

    @property
    def active(self) -> list[Job]:
        return [job for job in self.jobs if job.active]


def states_of(
    targets: Sequence[Target], environ: Mapping[str, str] = os.environ, *, needs_slurm: bool = True
) -> list[State]:
    """The states of all targets, with one call of squeue, and at most one of sacct, for each cluster they are on.

    If no record names a job of a run or a point, squeue is asked once more for each cluster, by the runs' scripts.
    Raises HpcmmError when squeue does not answer; unless ``needs_slurm``, what run directories tell is taken then,
    which is nothing of a job that waits or runs.
    """
    return _states(_with_unnoted_jobs(targets, environ, needs_slurm=needs_slurm), environ, needs_slurm=needs_slurm)


def _states(targets: Sequence[Target], environ: Mapping[str, str], *, needs_slurm: bool) -> list[State]:
    clusters: dict[tuple[str, str], dict[str, str]] = {}
    asked: dict[tuple[str, str], list[Wanted]] = {}
    tasks: dict[tuple[str, str], list[str]] = {}
    parts: list[list[tuple[Wanted, tuple[str, str]]]] = []
    """Of each target its jobs, each with the key of the cluster that has it."""
    for target in targets:
        parts.append([])
        found = {} if is_local(target.run) else slurm_environment(target.run, dict(environ))
        for job_id in () if is_local(target.run) else _asked_of(target):
            known = None if target.run is None else identity_of(target.run, job_id)
            mine = on_cluster(known.cluster, found) if known is not None else found
            key = (mine.get("SLURM_CONF", ""), mine.get("SLURM_CLUSTERS", ""))
            wanted = job_id if known is None or target.by_number else known
            clusters[key] = mine
            asked.setdefault(key, []).append(wanted)
            tasks.setdefault(key, []).extend(task for task in target.tasks if array_of(task) == job_id)
            parts[-1].append((wanted, key))
    answers = {key: _answer(asked[key], tasks[key], clusters[key], needs_slurm=needs_slurm) for key in asked}
    return [
        _local_state(target)
        if is_local(target.run)
        else _state(target, [(wanted, answers[key]) for wanted, key in part])
        for target, part in zip(targets, parts, strict=True)
    ]


def _with_unnoted_jobs(targets: Sequence[Target], environ: Mapping[str, str], *, needs_slurm: bool) -> list[Target]:
    """The targets with the jobs that Slurm has of them though no record names one, as a killed launch leaves them."""
    asked: dict[tuple[str, str], dict[Path, RunDir]] = {}
    """By cluster the runs, or the sweeps' folders."""
    clusters: dict[tuple[str, str], dict[str, str]] = {}
    for target in targets:
        if target.run is not None and _may_lack_a_job(target):
            mine = slurm_environment(target.run, dict(environ))
            key = (mine.get("SLURM_CONF", ""), mine.get("SLURM_CLUSTERS", ""))
            shared = shared_folder(target.run)
            clusters[key] = mine
            asked.setdefault(key, {})[shared.root] = shared
    taken: set[Path] = set()
    for key, runs in asked.items():
        try:
            rows = jobs_of_scripts([script for run in runs.values() for script in scripts_of(run)], clusters[key])
            taken.update(root for root, run in runs.items() if take_over_unless_locked(run, rows, clusters[key]))
        except HpcmmError as error:
            if needs_slurm:
                raise
            if not isinstance(error, SilentError):
                print(f"hpcmm.jobs: {printable(str(error))}", file=sys.stderr)
            elif not any(target.job_ids for target in targets):  # else the next question tells it
                print(f"hpcmm.jobs: {printable(silence(error, clusters[key]))}", file=sys.stderr)
    return [
        replace(target_of(target.run), asked=target.asked)
        if target.run is not None and not target.by_number and shared_folder(target.run).root in taken
        else target
        for target in targets
    ]


def _may_lack_a_job(target: Target) -> bool:
    if target.by_number or target.user is not None or is_local(target.run):
        return False
    was_killed = target.run is not None and SweepDir(shared_folder(target.run).root).may_lack_a_job
    return was_killed or not target.job_ids or not all(point.job_ids for point in target.points)


def _asked_of(target: Target) -> Sequence[str]:
    """The numbers that Slurm is asked for: of a sweep the arrays of its points' newest jobs."""
    if target.sweep is None or target.array is not None:
        return target.job_ids
    most = _MOST_ARRAYS if target.user is None else _MOST_ARRAYS_OF_OTHERS
    return list(dict.fromkeys(array_of(task) for task in target.tasks))[-most:] or target.job_ids


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
    complete = [] if known is None else list(targets)

    def ask() -> list[State]:
        if not complete:  # once is enough: a launch notes what it submits later
            complete.extend(_with_unnoted_jobs(targets, os.environ, needs_slurm=True))
        return _states(complete, os.environ, needs_slurm=True)

    return Poller(ask, _changing, known=known, longest_s=longest_s, tell=tell)


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
    targets = [target_of(run) for run in runs if not is_local(run)]
    return [job for target in targets for job in _recorded(target)]


def _recorded(target: Target) -> list[Job]:
    """What the run directories tell of the newest job, or of the newest of each point."""
    newest = target.tasks if target.sweep is not None else dict.fromkeys(target.job_ids[-1:], target)
    found = (record_of(each.run, job_id) for job_id, each in newest.items() if each.run is not None)
    return [job for job in found if job is not None]


@dataclass(frozen=True)
class _Silent(Answer):
    """No answer, with a note that says why."""


def _answer(wanted: Sequence[Wanted], tasks: Sequence[str], environ: Mapping[str, str], *, needs_slurm: bool) -> Answer:
    try:
        return find_jobs(wanted, environ, tasks)
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
        found = [_narrowed(job, job_id) for job in rows_of(wanted, answer.jobs)]
        if found and target.by_number and target.run is not None:
            known = identity_of(target.run, job_id)
            is_mine = all(is_same_job(known, job) for job in found)
            target = target if is_mine else replace(target, run=None, sweep=None, array=None)
        if (other := other_job(wanted, answer.jobs)) is not None:
            notes.append(f"{other}, so this is what the run directory of {target.asked} tells.")
        if not found and target.run is not None and target.sweep is None:
            record = record_of(target.run, job_id)
            found = [record] if record is not None else []
        jobs |= {job.job_id: job for job in found}
    if target.sweep is not None:
        jobs = _of_points(target, jobs)
    silent = any(isinstance(answer, _Silent) for _, answer in answers)
    state = State(target, list(jobs.values()), notes, silent)
    if state.unknown and jobs:
        named = ", ".join(point.asked.rpartition("/")[2] for point in state.unknown[:_MOST_POINTS])
        more = " and more" if len(state.unknown) > _MOST_POINTS else ""
        points = "point" if len(state.unknown) == 1 else "points"
        hint = "" if silent else " Slurm keeps no record of a task that was cancelled while it waited."
        state.notes.append(f"No end is noted of {len(state.unknown)} {points} of {target.asked}: {named}{more}.{hint}")
    return state


def _narrowed(job: Job, job_id: str) -> Job:
    """Of tasks that wait together the one that is meant."""
    is_one_of_them = "_[" in job.job_id and job_id != job.job_id and is_task_of(job_id, job.job_id)
    return replace(job, job_id=job_id) if is_one_of_them else job


def _of_points(target: Target, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Of all tasks of a sweep's arrays the newest of each point; what Slurm forgot is as the points tell it."""
    newest = target.tasks
    found: dict[str, Job] = {}
    told: set[str] = set()
    for job in jobs.values():
        tasks = tasks_in(job.job_id)
        mine = [task for task in tasks if task in newest]
        told.update(mine)
        found |= {job.job_id: job} if len(mine) == len(tasks) else {task: replace(job, job_id=task) for task in mine}
    for task, point in newest.items():
        if task not in told and point.run is not None and (record := record_of(point.run, task)) is not None:
            found[task] = record
    # squeue has one row, without tasks, for all that were cancelled together while they waited.
    for job in (job for job in jobs.values() if "_" not in job.job_id):
        rest = [task for task in newest if array_of(task) == job.job_id and task not in told and task not in found]
        found |= {task: replace(job, job_id=task) for task in rest}
    places = {task: place for place, task in enumerate(newest)}
    return dict(sorted(found.items(), key=lambda row: min(places[task] for task in tasks_in(row[0]))))


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


_NEVER = "It never starts as it is: python -m hpcmm.jobs cancel JOB, and launch it again"
_OVER = "Launch it again"
"""In place of it if the job is over: there is nothing to cancel any more."""
DEPENDENCY_FAILED = "DependencyNeverSatisfied"
"""Slurm's reason for a job whose ``after=`` failed."""
_IN_TURN: tuple[tuple[str, str], ...] = (
    ("Resources", "It waits until enough nodes are free."),
    ("Priority", "Jobs with a higher priority are before it in the queue."),
    ("BeginTime", "It is not to begin before a set time, or Slurm lets some time pass before it starts it again."),
    ("Dependency", "It waits for the end of the job that it is to run after."),
    ("Cleaning|Prolog|Configuring", "Slurm cleans or prepares its nodes."),
    ("JobArrayTaskLimit", "As many points of the sweep run as may at once; the others follow."),
    ("Licenses", "All licences that it asks for are in use."),
    ("Reservation", "It waits for its reservation to begin."),
    ("SchedDefer|None", "Slurm has not looked at it yet."),
)
"""Slurm's reasons to wait for one's turn, as patterns, and what they mean. They tell nothing of a job that is over."""
_WAITS = (
    *_IN_TURN,
    (
        DEPENDENCY_FAILED,
        f"The job that it is to run after did not end as it should. {_NEVER} without after=, or after another job.",
    ),
    ("JobHeldUser", "Its user holds it: `scontrol release JOB` lets it go."),
    ("JobHeldAdmin", "An administrator holds it: ask the site, or `scontrol release JOB` if that is you."),
    (
        "JobHoldMaxRequeue|MaxRequeue",
        "It went back into the queue as often as Slurm allows, and is held: find out what ended it, then "
        "`scontrol release JOB`.",
    ),
    (
        "launch[ _]failed[ _]requeued[ _]held",
        "Slurm could not start it, put it back and holds it: a node could not run its prolog or its script. Tell the "
        "site, then `scontrol release JOB`.",
    ),
    ("(?:job[ _])?requeued[ _]in[ _]held[ _]state", "It was put back and is held: `scontrol release JOB` lets it go."),
    (
        "ReqNodeNotAvail.*|NodeDown|FrontEndDown",
        "Nodes that it needs are down, or reserved for others, as for maintenance: see `sinfo -R` and `scontrol show "
        "reservation`. A shorter cluster.time_limit_min may fit before a maintenance.",
    ),
    (
        "BadConstraints",
        f"No nodes fit what it asks for (nodes, CPUs, memory, GPUs, cluster.constraint). {_NEVER} for what `sinfo -o "
        "'%P %D %c %m %G %f'` shows.",
    ),
    ("PartitionDown|PartitionInactive", "Its partition is closed at present: see `sinfo -s`, or choose another one."),
    ("PartitionNodeLimit|PartitionConfig", f"It breaks a limit of its partition. {_NEVER} smaller, or in another one."),
    (
        "PartitionTimeLimit",
        f"Its time limit is above that of its partition. {_NEVER} with less time (`sinfo -o '%P %l'`).",
    ),
    ("AccountNotAllowed|InvalidAccount", f"Its account may not be used there. {_NEVER} with another cluster.account."),
    ("QOSNotAllowed|InvalidQOS", f"Its QOS may not be used there. {_NEVER} with another cluster.qos."),
    ("ReservationDeleted", f"Its reservation was deleted. {_NEVER} without it."),
    ("DeadLine", f"It cannot end before its deadline. {_NEVER} with a later one."),
    (
        "(?:QOS|Assoc).*(?:PerJob|PerNode|MaxWall|Min).*",
        f"It asks for more, or less, than its account or QOS allows for one job (`sacctmgr show qos`). {_NEVER} with "
        "less.",
    ),
    (
        "(?:QOS|Assoc).*",
        "A limit of its account or QOS is reached: it starts when other jobs of that account or user have ended "
        "(`sacctmgr show qos`, `squeue --me`).",
    ),
)
"""All reasons to wait."""


def why_it_waits(job: Job) -> str:
    """What Slurm's reason means for a job that waits, or was over before it started; empty if that is not known."""
    found = next((said for reason, said in _WAITS if re.fullmatch(reason, job.reason)), "")
    return (found if job.active else found.replace(_NEVER, _OVER)).replace("JOB", job.job_id)


def reason_of_end(job: Job) -> str:
    """Slurm's reason for the end of a job that is over. sacct gives in its place why the job waited last."""
    waited = any(re.fullmatch(reason, job.reason) for reason, _ in (_WAITS if job.nodes else _IN_TURN))
    by = re.match(r"by \d+", job.reason)
    return by[0] if by else "" if waited else job.reason
