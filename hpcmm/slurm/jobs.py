"""The one model of a job, the names of its states, and what squeue, sacct and sinfo answer about jobs."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from hpcmm.errors import HpcmmError
from hpcmm.ranges import count_tasks, is_job_number, is_task_of, tasks_in, without_tasks
from hpcmm.runs.submission import JobIdentity
from hpcmm.slurm.commands import (
    AbsentError,
    ask,
    clusters_asked,
    new_separator,
    on_cluster,
    rows_of_answer,
)
from hpcmm.text import visible

PENDING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "EXPEDITING"}
)
ACTIVE = PENDING | {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""States after which another one comes."""
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
) | {"REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"}
"""States after which none comes. What squeue shows in any other one, also a newer Slurm's, counts as active."""

_SQUEUE = {
    "job_id": "%i", "raw_id": "%A", "name": "%j", "user": "%u", "state": "%T", "reason": "%r", "submitted": "%V",
    "started": "%S", "ended": "%e", "elapsed": "%M", "nodes": "%N", "node_count": "%D", "command": "%o", "uid": "%U",
}  # fmt: skip
_SACCT = {
    "job_id": "JobID", "raw_id": "JobIDRaw", "name": "JobName", "user": "User", "state": "State", "reason": "Reason",
    "submitted": "Submit", "started": "Start", "ended": "End", "elapsed": "Elapsed", "nodes": "NodeList",
    "node_count": "NNodes", "exit_code": "ExitCode", "derived_exit_code": "DerivedExitCode", "command": "SubmitLine",
    "uid": "UID",
}  # fmt: skip
_EMPTY = frozenset({"", "N/A", "Unknown", "None", "None assigned", "(null)"})
_RECORD_FIELDS = (
    "JobID,JobName,State,ExitCode,DerivedExitCode,Reason,NNodes,NTasks,NodeList,"
    "AllocTRES,Submit,Start,End,ElapsedRaw,MaxRSS,User,SubmitLine"
)
_REVOKED = "REVOKED"
"""Of a job in a federation, at a cluster that did not get it."""

Wanted = str | JobIdentity
"""A job by its number, which means whatever job has it now, or one job that is known."""


class UnknownJobError(HpcmmError):
    """Slurm answers, and does not know the job (yet, or any more)."""


@dataclass(frozen=True)
class Job:
    """A job, a task of an array, or the tasks of an array that still wait together. Times are Slurm's, local."""

    job_id: str
    """As a user writes it: ``12``, ``12_7`` or ``12_[8-99]``."""
    raw_id: str
    """Slurm's own number; each task of an array has one."""
    name: str = ""
    user: str = ""
    state: str = "UNKNOWN"
    reason: str = ""
    submitted: str = ""
    started: str = ""
    """Of a job that waits, when it is expected to start; empty if Slurm does not know."""
    ended: str = ""
    elapsed: str = ""
    nodes: str = ""
    """Slurm's host list, such as ``node[1-4]``."""
    node_count: str = ""
    command: str = ""
    uid: str = ""
    """Of its user, whose name Slurm may not know; empty if that is not told."""
    exit_code: str = ""
    """``status:signal`` of the batch script."""
    derived_exit_code: str = ""
    """The highest of its steps."""
    source: str = "squeue"
    cluster: str = ""
    """Slurm's name of the cluster that told of it; empty if that is not known."""

    @property
    def number(self) -> str:
        """Of the job, or of the array that a task belongs to."""
        return re.split("[_+]", self.job_id)[0]

    @property
    def active(self) -> bool:
        return self.state in ACTIVE or (self.source == "squeue" and self.state not in ENDED)

    @property
    def pending(self) -> bool:
        return self.state in PENDING

    @property
    def submitted_unix_s(self) -> float | None:
        """When Slurm took it, or put it back into the queue, in seconds since 1970; None if that is not told."""
        try:
            return time.mktime(time.strptime(self.submitted, "%Y-%m-%dT%H:%M:%S"))
        except (ValueError, OverflowError):
            return None

    @property
    def tasks(self) -> int:
        """How many tasks of an array this stands for; 1 for any other job."""
        return count_tasks(self.job_id)


@dataclass(frozen=True)
class Answer:
    """Jobs, and what could not be asked, one sentence each."""

    jobs: list[Job]
    notes: list[str] = field(default_factory=list)


def is_same_job(known: JobIdentity, row: Job) -> bool:
    """Whether a row of squeue's or sacct's is of the job that is ``known``, and of no other with its number.

    Its user must be the same. Then the script decides if the row names one. If it does not, the name may not differ,
    and the job must not have been submitted before the known one. A later time is no objection, for a requeue sets it
    anew.
    """
    if not _has_number(known.job_id, row) or known.is_of_another_user(row.user, row.uid):
        return False
    named = known.is_named_in(row.command, is_word_of_sbatch=row.source == "sacct")
    if named:
        return True
    if known.name and row.name and known.name != row.name:
        return False
    submitted_s = row.submitted_unix_s
    if named is False:  # a site's own sbatch may hand over a copy of the script: the second tells that it is the same
        is_copy = PurePosixPath(row.command).name not in {PurePosixPath(script).name for script in known.scripts}
        return is_copy and bool(known.user or known.uid is not None) and known.is_of_second(submitted_s)
    return not known.is_after(submitted_s)


def rows_of(wanted: Wanted, rows: Sequence[Job]) -> list[Job]:
    """The rows of a job and of its tasks: squeue's, and of what squeue does not tell sacct's newest."""
    if isinstance(wanted, JobIdentity):
        mine = [row for row in rows if is_same_job(wanted, row)]
        if _is_denied(wanted, rows):
            mine = [row for row in mine if not row.active]
    else:
        mine = [row for row in rows if _has_number(wanted, row)]
    queued = [row for row in mine if row.source == "squeue"]
    same = {(row.name, row.user) for row in queued}
    # sacct has a row for each time that a job was requeued, and for each job that had the number.
    accounted = {row.job_id: row for row in sorted(mine, key=lambda row: row.submitted) if row.source != "squeue"}
    if not queued:
        return _each_task_once(accounted.values())
    siblings = [row for row in accounted.values() if "_" in row.job_id and (row.name, row.user) in same]
    return _each_task_once([*queued, *siblings])


def _each_task_once(rows: Iterable[Job]) -> list[Job]:
    """The rows, squeue's first, without the tasks of arrays that another row tells better.

    A task's own row tells more than one of a range of them, which accounting keeps as the tasks once waited together.
    """
    arrays: dict[tuple[str, ...], list[Job]] = {}
    for row in rows:
        arrays.setdefault((*row.job_id.partition("_")[:2], row.name, row.user), []).append(row)
    return [row for array in arrays.values() for row in _tasks_once(array)]


def _tasks_once(array: Sequence[Job]) -> Sequence[Job]:
    if "_" not in array[0].job_id:
        return array
    ranges = [row for row in array if "_[" in row.job_id]
    waiting = [row for row in ranges if row.source == "squeue"]
    own: dict[str, Job] = {}
    for row in array:
        # What accounting has of an older array with this number is not of a task that waits.
        is_older = row.source != "squeue" and any(
            row.submitted < each.submitted and is_task_of(row.job_id, each.job_id) for each in waiting
        )
        if "_[" not in row.job_id and not is_older:
            own.setdefault(row.job_id, row)
    told, left = list(own), list(own.values())
    for row in ranges:
        rest = without_tasks(row.job_id, told)
        left += [replace(row, job_id=rest)] if rest is not None else []
        told.append(row.job_id)
    return left


def other_job(wanted: Wanted, rows: Sequence[Job]) -> str | None:
    """A clause that says that another job has the number now; None if no row shows one, or one shows the job itself."""
    if not isinstance(wanted, JobIdentity) or rows_of(wanted, rows):
        return None
    others = rows_of(wanted.job_id, rows)
    if not others:
        return None
    return f"Slurm's job {wanted.job_id} is another job now ({who_has(others[-1])})"


def who_has(job: Job) -> str:
    """A job's name and user, for a sentence."""
    return visible(f"{job.name or 'without a name'}, of {job.user or 'a user not told'}", " ")


def find_job(wanted: Wanted, environ: Mapping[str, str] = os.environ) -> Job:
    """The job: squeue is asked, and sacct if squeue does not know it; of a known job, those of its cluster.

    An array as a whole is represented by a task that is active, else by one that did not complete. Raises
    UnknownJobError if neither knows the job, and another HpcmmError if one of them does not answer.
    """
    job_id = _number_of(wanted)
    if isinstance(wanted, JobIdentity):
        environ = on_cluster(wanted.cluster, environ)
    rows = _squeue([f"--jobs={job_id}", "--states=all"], environ)
    if not rows_of(wanted, rows):
        rows += _sacct([f"--jobs={job_id}", "--duplicates"], environ)
    tasks = rows_of(wanted, rows)
    if not tasks:
        other = other_job(wanted, rows)
        raise UnknownJobError(
            f"{other}, and neither squeue nor sacct knows the one that is meant."
            if other
            else f"Neither squeue nor sacct knows job {job_id}: was it of another cluster, or too long ago?"
        )
    return min(tasks, key=lambda task: (not task.active, task.state == "COMPLETED"))


def find_jobs(
    wanted: Sequence[Wanted], environ: Mapping[str, str] = os.environ, tasks: Collection[str] = frozenset()
) -> Answer:
    """Rows of all jobs with these numbers: squeue first, sacct for those that squeue does not know.

    ``tasks``: the wanted ones of arrays, which leave the queue one by one. :func:`rows_of` tells a job's rows.
    Raises HpcmmError when squeue does not answer. Without sacct, what the queue forgot is missing, and a note says so.
    """
    ids = list(dict.fromkeys(map(_number_of, wanted)))
    # Of an array and one of its tasks that wait, squeue would show the task alone.
    whole = [each for each in ids if "_" not in each or each.split("_")[0] not in ids]
    queued = _squeue([f"--jobs={','.join(whole)}", "--states=all"], environ) if ids else []
    by_number = _ByNumber(queued)
    left = {task.split("_")[0] for task in tasks if not by_number.rows(task)}
    missing = list(
        dict.fromkeys(
            job_id
            for each in wanted
            if (job_id := _number_of(each)) in left
            or not rows_of(each, by_number.rows(job_id))  # also if it is another job's now
        )
    )
    if not missing:
        return Answer(queued)
    try:
        return Answer(queued + _sacct([f"--jobs={','.join(missing)}", "--duplicates"], environ))
    except HpcmmError as error:
        return Answer(queued, [_without_sacct(error)])


def own_jobs(user: str | None, since: str | None, environ: Mapping[str, str] = os.environ) -> Answer:
    """The active jobs of ``user`` (None: of all), and with ``since``, a time as sacct reads it, those that are over."""
    whose = [f"--user={user}"] if user else []
    active = _squeue(whose, environ)
    if since is None:
        return Answer(active)
    listed = {job.raw_id for job in active}
    accounted = [f"--user={user}" if user else "--allusers", f"--starttime={since}"]
    try:
        over = _sacct(accounted, environ)
        notes: list[str] = []
    except HpcmmError as error:
        over = _squeue([*whose, "--states=all"], environ)
        notes = [_without_sacct(error) + " Jobs that are over are shown as long as squeue keeps them."]
    told = [job for job in over if job.raw_id not in listed and not job.active]
    return Answer(_each_task_once([*active, *told]), notes)


def jobs_of_scripts(scripts: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[Job]:
    """What squeue shows of this user's jobs that run one of these scripts, the oldest first, whatever their state."""
    uid = os.geteuid()
    asked = JobIdentity("", scripts=tuple(scripts), uid=uid)
    rows = _squeue([f"--user={uid}", "--states=all"], environ)
    mine = [row for row in rows if row.uid == str(uid) and asked.is_named_in(row.command, is_word_of_sbatch=False)]
    return sorted(mine, key=lambda row: row.submitted)


def account_of(jobs: Sequence[Job], environ: Mapping[str, str] = os.environ) -> dict[str, Job]:
    """sacct's row of each of these jobs that squeue told of, by number. Raises HpcmmError if sacct does not answer."""
    asked = list(dict.fromkeys(job.raw_id for job in jobs))
    rows = _ByNumber(_sacct([f"--jobs={','.join(asked)}"], environ) if asked else [])
    found: dict[str, Job] = {}
    for job in jobs:
        scripts, uid = (job.command,) if job.command else (), int(job.uid) if job.uid.isdecimal() else None
        known = JobIdentity(job.job_id, user=job.user, name=job.name, scripts=scripts, uid=uid)
        # A task that waits has the raw number of its array, as another task may have.
        mine = [row for row in rows.rows(job.job_id) if row.job_id == job.job_id and is_same_job(known, row)]
        if mine:
            found[job.job_id] = mine[-1]
    return found


def array_states(arrays: Mapping[str, JobIdentity]) -> dict[str, str]:
    """States of the array tasks that Slurm knows, by ``job_task``; one question to squeue, and one to sacct, a cluster.

    Those of other jobs with these numbers are not in it. Raises HpcmmError when squeue does not answer. Without sacct,
    what the queue forgot is missing, and a line says so.
    """
    found: dict[str, str] = {}
    for cluster in sorted({known.cluster for known in arrays.values()}):
        mine = {job_id: known for job_id, known in arrays.items() if known.cluster == cluster}
        environ, asked = on_cluster(cluster, os.environ), f"--jobs={','.join(sorted(mine))}"
        rows = _squeue(["--array", "--states=all", asked], environ)
        try:
            # What accounting still takes for active, and the queue does not know, died with a controller.
            rows += [row for row in _sacct([asked, "--duplicates"], environ) if row.state in ENDED]
        except HpcmmError as error:
            print(f"hpcmm: {visible(_without_sacct(error))}", file=sys.stderr)
        by_number = _ByNumber(rows)
        for job_id, known in mine.items():
            of_array = rows_of(known, by_number.rows(job_id))
            found |= {task: row.state for row in of_array for task in tasks_in(row.job_id)}
    return found


def job_records(known: JobIdentity, environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """sacct's records: of the job first, then of its steps. Keys are sacct's names of the fields.

    Empty if sacct does not know it (yet), also if it knows another job with its number. Raises HpcmmError if sacct
    gives no answer.
    """
    options = ("--parsable2", "--delimiter=\t", f"--jobs={known.job_id}", f"--format={_RECORD_FIELDS}")
    listed = ask("sacct", *options, environ=on_cluster(known.cluster, environ))
    names, *rows = [line.split("\t") for line in listed.splitlines()] or [[]]
    records = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    return records if records and is_same_job(known, _job_of_record(records[0])) else []


def _job_of_record(record: Mapping[str, str]) -> Job:
    given = {name: record.get(of_sacct, "") for name, of_sacct in _SACCT.items()}
    return Job(**{name: "" if value in _EMPTY else value for name, value in given.items()}, source="sacct")


def _without_sacct(error: HpcmmError) -> str:
    return f"sacct gives no answer, so this is what squeue and the run directory tell: {error}"


def _squeue(options: Sequence[str], environ: Mapping[str, str]) -> list[Job]:
    separator = new_separator()
    wanted = "".join(f"{name}{separator}" for name in _SQUEUE.values())
    whole_ranges = {**environ, "SLURM_BITSTR_LEN": "0"}

    def rows(*more: str) -> list[Job]:
        asked = [*more, *options, f"--format={wanted}"]
        try:
            listed = ask("squeue", *asked, absent="Invalid job id", environ=whole_ranges)
        except AbsentError:
            return []
        return _rows(listed, separator, list(_SQUEUE), "squeue", environ)

    return _of_federation(rows, environ)


def _sacct(options: Sequence[str], environ: Mapping[str, str]) -> list[Job]:
    separator, wanted = new_separator(), ",".join(_SACCT.values())
    whole_ranges = {**environ, "SLURM_BITSTR_LEN": "0"}
    layout = ["--allocations", "--parsable", f"--delimiter={separator}", f"--format={wanted}"]

    def rows(*more: str) -> list[Job]:
        listed = ask("sacct", *layout, *more, *options, environ=whole_ranges)
        return _rows(listed, separator, list(_SACCT), "sacct", environ)

    return _of_federation(rows, environ)


def _of_federation(rows: Callable[..., list[Job]], environ: Mapping[str, str]) -> list[Job]:
    """The rows; those of the whole federation if a job went to another cluster of it than the one that was asked."""
    here = rows()
    revoked = {job.job_id for job in here if job.state == _REVOKED}
    if not revoked or environ.get("SLURM_CLUSTERS"):
        return here
    elsewhere = [replace(job, cluster="") for job in rows("--federation") if job.state != _REVOKED]
    found = {job.job_id for job in elsewhere}
    return [job for job in here if job.job_id not in found] + [job for job in elsewhere if job.job_id in revoked]


def _rows(listed: str, separator: str, names: Sequence[str], source: str, environ: Mapping[str, str]) -> list[Job]:
    rows = rows_of_answer(listed, separator, len(names), clusters_asked(environ), source)
    given = environ.get("SLURM_CLUSTERS", "all")  # of one that was asked, jobs keep the name by which it is asked
    one = given if "," not in given and given != "all" else ""
    return [replace(job, cluster=one or where) for where, row in rows for job in _row(row, names, source)]


def _row(values: Sequence[str], names: Sequence[str], source: str) -> Iterable[Job]:
    """The job of a row; none if its numbers, which other commands are given, are none."""
    if not is_job_number(*values[:2]):
        return
    values = ["" if "\0" in value else value for value in values]  # no path, and no name, has it
    given = {name: "" if value in _EMPTY else value for name, value in zip(names, values, strict=True)}
    state, _, detail = given["state"].partition(" ")  # sacct writes "CANCELLED by 1000"
    reason = f"{detail} ({given['reason']})" if detail and given["reason"] else detail or given["reason"]
    job = Job(**given | {"state": state or "UNKNOWN", "reason": reason}, source=source)
    if job.active and source == "squeue" and not job.pending:
        job = Job(**{**vars(job), "ended": ""})  # squeue gives the time limit's end
    yield job


# Whether two records are of one job.


def _number_of(wanted: Wanted) -> str:
    return wanted.job_id if isinstance(wanted, JobIdentity) else wanted


def _numbers(row: Job) -> set[str]:
    """Of a job and of what it is a part of: an array, or a job of several components (``12+1``)."""
    return {row.job_id, row.raw_id, row.job_id.split("_")[0], row.job_id.split("+")[0]}


def _has_number(job_id: str, row: Job) -> bool:
    return job_id in _numbers(row) or is_task_of(job_id, row.job_id)


class _ByNumber:
    """Rows by each number that means them; tasks that wait together are not written out."""

    def __init__(self, rows: Iterable[Job]) -> None:
        self._rows: dict[str, list[Job]] = {}
        self._ranges: dict[str, list[Job]] = {}
        for row in rows:
            for number in _numbers(row):
                self._rows.setdefault(number, []).append(row)
            if "_[" in row.job_id:
                self._ranges.setdefault(row.job_id.split("_")[0], []).append(row)

    def rows(self, number: str) -> list[Job]:
        ranges = self._ranges.get(number.partition("_")[0], [])
        return self._rows.get(number, []) + [row for row in ranges if is_task_of(number, row.job_id)]


def _is_denied(known: JobIdentity, rows: Iterable[Job]) -> bool:
    """Whether squeue shows the number as another job's alone: what accounting then tells of as active is no longer."""
    shown = [row for row in rows if row.source == "squeue" and _has_number(known.job_id, row)]
    return bool(shown) and not any(is_same_job(known, row) for row in shown)
