"""The one model of a job, the names of its states, and what squeue, sacct and sinfo answer about jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcmm.errors import HpcmmError
from hpcmm.slurm.commands import ask

PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ACTIVE = PENDING | {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""States after which another one comes."""

_SEPARATOR = "\x1f"
_SQUEUE = {
    "job_id": "%i",
    "raw_id": "%A",
    "name": "%j",
    "user": "%u",
    "state": "%T",
    "reason": "%r",
    "submitted": "%V",
    "started": "%S",
    "ended": "%e",
    "elapsed": "%M",
    "nodes": "%N",
    "node_count": "%D",
    "command": "%o",
}
_SACCT = {
    "job_id": "JobID",
    "raw_id": "JobIDRaw",
    "name": "JobName",
    "user": "User",
    "state": "State",
    "reason": "Reason",
    "submitted": "Submit",
    "started": "Start",
    "ended": "End",
    "elapsed": "Elapsed",
    "nodes": "NodeList",
    "node_count": "NNodes",
    "exit_code": "ExitCode",
    "derived_exit_code": "DerivedExitCode",
    "command": "SubmitLine",
}
_EMPTY = frozenset({"", "N/A", "Unknown", "None", "None assigned", "(null)"})
_RECORD_FIELDS = (
    "JobID,JobName,State,ExitCode,DerivedExitCode,Reason,NNodes,NTasks,NodeList,"
    "AllocTRES,Submit,Start,End,ElapsedRaw,MaxRSS"
)


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
    exit_code: str = ""
    """``status:signal`` of the batch script."""
    derived_exit_code: str = ""
    """The highest of its steps."""
    source: str = "squeue"

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def pending(self) -> bool:
        return self.state in PENDING

    @property
    def tasks(self) -> int:
        """How many tasks of an array this stands for; 1 for any other job."""
        return count_tasks(self.job_id)


@dataclass(frozen=True)
class Answer:
    """Jobs, and what could not be asked, one sentence each."""

    jobs: list[Job]
    notes: list[str] = field(default_factory=list)


def count_tasks(job_id: str) -> int:
    """Tasks that ``12_[0-2,5-9:2%4]`` stands for; 1 without brackets."""
    match = re.search(r"_\[([^\]%]*)", job_id)
    if match is None:
        return 1
    total = 0
    for part in match[1].split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if bounds is None:
            continue
        first, last, step = int(bounds[1]), int(bounds[2] or bounds[1]), int(bounds[3] or 1)
        total += (last - first) // max(1, step) + 1
    return max(total, 1)


def find_job(job_id: str, environ: Mapping[str, str] = os.environ) -> Job:
    """The job: squeue is asked, and sacct if squeue does not know it.

    An array as a whole is represented by a task that is active, else by one that did not complete. Raises
    UnknownJobError if neither knows the job, and another HpcmmError if one of them does not answer.
    """
    tasks = _squeue([f"--jobs={job_id}", "--states=all"], environ) or _sacct([f"--jobs={job_id}"], environ)
    if not tasks:
        raise UnknownJobError(
            f"Neither squeue nor sacct knows job {job_id}: was it of another cluster, or too long ago?"
        )
    return min(tasks, key=lambda task: (not task.active, task.state == "COMPLETED"))


def find_jobs(ids: Sequence[str], environ: Mapping[str, str] = os.environ) -> Answer:
    """The jobs with these numbers: squeue first, sacct for those that have left the queue.

    Raises HpcmmError when squeue does not answer. Without sacct, what the queue forgot is missing, and a note says so.
    """
    ids = list(dict.fromkeys(ids))
    queued = _squeue([f"--jobs={','.join(ids)}", "--states=all"], environ) if ids else []
    known = {name for job in queued for name in (job.raw_id, job.job_id.split("_")[0], job.job_id)}
    missing = [each for each in ids if each not in known]
    if not missing:
        return Answer(queued)
    try:
        return Answer(queued + _sacct([f"--jobs={','.join(missing)}"], environ))
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
    return Answer(active + [job for job in over if job.raw_id not in listed and not job.active], notes)


def account_of(ids: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[Job]:
    """sacct's rows of these jobs, not of their steps. Raises HpcmmError if sacct does not answer."""
    return _sacct([f"--jobs={','.join(ids)}"], environ) if ids else []


def array_states(job_ids: Iterable[str]) -> dict[str, str]:
    """States of the array tasks that Slurm has in its queue, by ``job_task``; one question for all arrays.

    Tasks that have left the queue are not in it. Raises HpcmmError when squeue does not answer.
    """
    wanted = ",".join(sorted(job_ids))
    if not wanted:
        return {}
    listed = ask(
        "squeue", "--noheader", "--array", "--states=all", f"--jobs={wanted}", "--format=%i|%T", absent="Invalid job id"
    )
    return dict(line.strip().split("|", 1) for line in listed.splitlines() if "|" in line)


def job_records(job_id: str) -> list[dict[str, str]]:
    """sacct's records: of the job first, then of its steps. Keys are sacct's names of the fields."""
    listed = ask("sacct", "--parsable2", "--delimiter=\t", f"--jobs={job_id}", f"--format={_RECORD_FIELDS}")
    names, *rows = [line.split("\t") for line in listed.splitlines()] or [[]]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def node_states(nodes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Slurm's state of each node of a host list, with its reason if there is one: ``down* (Not responding)``.

    Raises HpcmmError when sinfo does not answer.
    """
    if not nodes:
        return {}
    listed = ask("sinfo", "-hN", f"--nodes={nodes}", "--format=%N\x1f%T\x1f%E", environ=environ)
    states = {}
    for line in listed.splitlines():
        name, _, rest = line.partition("\x1f")
        state, _, reason = rest.partition("\x1f")
        states[name.strip()] = state if reason.strip() in {"", "none"} else f"{state} ({reason.strip()})"
    return states


def _without_sacct(error: HpcmmError) -> str:
    return f"sacct gives no answer, so this is what squeue and the run directory tell: {error}"


def _squeue(options: Sequence[str], environ: Mapping[str, str]) -> list[Job]:
    wanted = _SEPARATOR.join(_SQUEUE.values())
    whole_ranges = {**environ, "SLURM_BITSTR_LEN": "0"}
    listed = ask("squeue", "--noheader", *options, f"--format={wanted}", absent="Invalid job id", environ=whole_ranges)
    return _rows(listed, list(_SQUEUE), "squeue")


def _sacct(options: Sequence[str], environ: Mapping[str, str]) -> list[Job]:
    wanted = ",".join(_SACCT.values())
    whole_ranges = {**environ, "SLURM_BITSTR_LEN": "0"}
    listed = ask(
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        f"--delimiter={_SEPARATOR}",
        *options,
        f"--format={wanted}",
        environ=whole_ranges,
    )
    return _rows(listed, list(_SACCT), "sacct")


def _rows(listed: str, names: Sequence[str], source: str) -> list[Job]:
    return [job for line in listed.split("\n") for job in _row(line, names, source)]


def _row(line: str, names: Sequence[str], source: str) -> Iterable[Job]:
    values = line.split(_SEPARATOR, len(names) - 1)
    if len(values) != len(names):
        return
    given = {name: "" if value in _EMPTY else value for name, value in zip(names, values, strict=True)}
    state, _, detail = given["state"].partition(" ")  # sacct writes "CANCELLED by 1000"
    reason = f"{detail} ({given['reason']})" if detail and given["reason"] else detail or given["reason"]
    job = Job(**given | {"state": state or "UNKNOWN", "reason": reason}, source=source)
    if job.active and source == "squeue" and not job.pending:
        job = Job(**{**vars(job), "ended": ""})  # squeue gives the time limit's end
    yield job
