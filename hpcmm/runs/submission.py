"""How a run was submitted: its jobs (``submission.json``, ``job.json``), and its origin (``provenance.json``)."""

from __future__ import annotations

import pwd
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from hpcmm.files import is_regular, names_in, read_json_object, resolved, write_json
from hpcmm.runs.attempts import restarts_of
from hpcmm.runs.ledger import arrays_of, jobs_of_points
from hpcmm.runs.ownership import is_mine
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir

_SUBMITTED = re.compile(rf"({JOB_ID.pattern})_submitted\.pkl")
_STATE = re.compile(r"[A-Z_]{1,32}")
_MOST_JOBS, _MOST_JOBS_OF_OTHERS = 1000, 5
"""Of one directory, the newest ones: another user may have left any number."""
_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(?:,[A-Za-z0-9][A-Za-z0-9_.-]{0,63})*")
_MOST_CHARACTERS = 4096
"""Of a path, the longest text that identifies a job."""
CLOCKS_S = 900
"""The most by which a login node's clock may be ahead of the controller's."""
_DAYLIGHT_SAVING_S = 3600
_RUN_NAME = re.compile(r".+-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
"""A run directory's name as the launcher makes it, which no other run has."""
_MOST_S = 1e12
"""Of a time in seconds since 1970; a larger one is damage."""


_OPTION_WITH_A_VALUE = re.compile(
    r"-[^-hHIkKOQsvVW]|--(?!(?:consolidate-segments|contiguous|exclusive|get-user-env|hold|help|ignore-pbs|nice|no-kill|"
    r"no-requeue|oom-kill-step|overcommit|oversubscribe|parsable|propagate|quiet|reboot|requeue|resv-ports|spread-job|"
    r"spread-segments|stepmgr|test-only|usage|use-min-nodes|verbose|version|wait)$)[^=]+"
)
"""Of sbatch's, whose value is the next word. An option that may have one takes it behind ``=`` alone."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What ``job.json`` says of a job: its state is Slurm's word, such as ``TIMEOUT``."""

    job_id: str
    state: str
    restarts: int = 0
    """How often Slurm had started the job again when this was written."""


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """What tells a run's job from another one with the same number. What is not known is empty.

    Numbers are given anew after a controller has lost its state, and each cluster of a site counts by itself.
    """

    job_id: str
    """As a user writes it: ``12``, or ``12_7`` for a task of an array."""
    cluster: str = ""
    """Slurm's name of the cluster that has the job; several with commas if sbatch did not say which one took it."""
    user: str = ""
    name: str = ""
    scripts: tuple[str, ...] = ()
    """The job's script by each path that may name it; it is nearly unique, since a run directory's name is."""
    submitted_unix_s: float | None = None
    """Seconds since 1970, by the clock of who submitted it."""
    slurm_submitted_unix_s: float | None = None
    """The same by Slurm's own record; a requeue makes Slurm's time later."""
    uid: int | None = None
    """Of the user, who may have no name here; None of a job that an older version has launched."""

    def is_of_another_user(self, user: str, uid: str) -> bool:
        """Whether the user that Slurm shows is another one: by the numbers if both are known, else by the names.

        Slurm shows all users without a name alike (``nobody``), or by no name.
        """
        mine = self.uid if self.uid is not None else _uid_of(self.user)
        theirs = uid or user
        if theirs.isdecimal():
            return mine is not None and mine != int(theirs)
        return bool(self.user and user) and self.user != user

    def is_named_in(self, command: str, *, is_word_of_sbatch: bool) -> bool | None:
        """Whether ``command`` runs one of the scripts; None if it tells of no script, or of one by a path that does not
        tell. A script that is only an argument of another one counts for nothing.

        ``is_word_of_sbatch``: it is the command line that submitted the job, as accounting has it.
        """
        if not self.scripts or not command.strip():
            return None
        run = _from_script_on(command) if is_word_of_sbatch else command
        if not run:  # from the standard input
            return None if PurePosixPath(command.split(maxsplit=1)[0]).name == "sbatch" else False
        if any(f"{run} ".startswith(f"{script} ") for script in self.scripts):
            return True
        paths = [PurePosixPath(script) for script in self.scripts]
        for path in paths:
            if _RUN_NAME.fullmatch(path.parent.name):  # another path to the same folder
                before, found, _ = f"/{run} ".partition(f"/{path.parent.name}/{path.name} ")
                if found and before.count(" ") <= str(path).count(" "):
                    return True
        word = PurePosixPath(run.split()[0])
        does_not_tell = not word.is_absolute() and not _RUN_NAME.fullmatch(word.parent.name)
        return None if does_not_tell and word.name in {path.name for path in paths} else False

    def is_after(self, submitted_s: float | None) -> bool:
        """Whether it was submitted after a job of this time in seconds since 1970, which is another one then."""
        if submitted_s is None:
            return False
        if self.slurm_submitted_unix_s is not None:
            return submitted_s < self.slurm_submitted_unix_s - 1 and not self.is_of_second(submitted_s)
        return self.submitted_unix_s is not None and submitted_s < self.submitted_unix_s - CLOCKS_S

    def is_of_second(self, submitted_s: float | None) -> bool:
        """Whether that is when Slurm took it. Slurm's times are local, so that one hour of a year comes twice."""
        known_s = self.slurm_submitted_unix_s
        return (
            known_s is not None
            and submitted_s is not None
            and any(abs(abs(known_s - submitted_s) - shift_s) <= 1 for shift_s in (0, _DAYLIGHT_SAVING_S))
        )


@cache
def _uid_of(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_uid if user else None
    except (KeyError, ValueError):
        return None


def _from_script_on(line: str) -> str:
    """What stands behind sbatch and its options in a submit line: the script and its arguments; empty if nothing."""
    rest = line.strip().partition(" ")[2].lstrip()
    while rest.startswith("-"):
        option, _, behind = rest.partition(" ")
        if option.startswith("--wrap"):
            return rest
        if _OPTION_WITH_A_VALUE.fullmatch(option):
            behind = behind.lstrip().partition(" ")[2]
        rest = behind.lstrip()
    return rest


def write_submission(run: RunDir, *jobs: JobIdentity, **job_ids: str | None) -> None:
    """Write ``submission.json``: ``job_id``, ``analysis_job_id`` if one may be queued, and what identifies ``jobs``.

    What identifies earlier jobs of the run stays. Raises OSError.
    """
    kept = read_json_object(run.submission, within=run.root).get("jobs")
    known = kept if isinstance(kept, dict) else {}
    known |= {
        job.job_id: {key: value for key, value in _values(job).items() if value not in ("", None)} for job in jobs
    }
    write_json(run.submission, {**job_ids, "submitted_unix_s": time.time(), "jobs": known})


def noted_jobs(run: RunDir) -> set[str]:
    """Numbers of all jobs that the records of a run, or of a sweep, name, the analysis' too."""
    record = read_json_object(run.submission, within=run.root)
    jobs = record.get("jobs")
    first = {str(record.get(key)) for key in ("job_id", "analysis_job_id")}
    return first | set(jobs if isinstance(jobs, dict) else ()) | set(arrays_of(jobs_of_points(SweepDir(run.root))))


def identity_of(run: RunDir, job_id: str) -> JobIdentity:
    """What identifies the run's job ``job_id``, a number or a task of an array.

    Of a job that was submitted by hand, and of one of an older version, that is little more than the path of the run's
    script. The points of a sweep share what their sweep notes.
    """
    shared = RunDir(run.root.parent) if _is_point(run) else run
    record = read_json_object(shared.submission, within=shared.root)
    number = job_id.split("_", maxsplit=1)[0]
    jobs = record.get("jobs")
    known = jobs.get(number) if isinstance(jobs, dict) else None
    noted = known if isinstance(known, dict) else {}
    is_analysis = number == str(record.get("analysis_job_id"))
    sweep = SweepDir(shared.root)
    name = sweep.analysis_script if is_analysis else sweep.submission_script
    # An array that was submitted by hand may be any of a large sweep's.
    firsts = sweep.first_points() if not _text(noted, "script") and sweep.is_there() else [0]
    scripts = [name(first) for first in firsts]
    paths = [path for script in scripts for path in (str(script), _real(script))]
    cluster = _text(noted, "cluster")
    first = [record.get(key) for key in ("job_id", "analysis_job_id")]
    return JobIdentity(
        job_id,
        cluster if _CLUSTER.fullmatch(cluster) else "",
        _text(noted, "user"),
        _text(noted, "name"),
        _paths(_text(noted, "script"), _text(noted, "slurm_script"), *paths),
        _number(noted or (record if number in map(str, first) else {}), "submitted_unix_s"),
        _number(noted, "slurm_submitted_unix_s"),
        None if (uid := _number(noted, "uid")) is None else int(uid),
    )


def _values(job: JobIdentity) -> dict[str, str | float | None]:
    script, *others = [*job.scripts, ""]
    return {
        "cluster": job.cluster,
        "user": job.user,
        "name": job.name,
        "script": script,
        "slurm_script": others[0] if others else "",
        "submitted_unix_s": job.submitted_unix_s,
        "slurm_submitted_unix_s": job.slurm_submitted_unix_s,
        "uid": job.uid,
    }


def _is_point(run: RunDir) -> bool:
    """Whether this is a point of a sweep, and the sweep's folder that of the same user."""
    sweep = SweepDir(run.root.parent)
    if not run.root.name.isdecimal() or not is_regular(sweep.ledger):
        return False
    try:
        return run.root.stat().st_uid == sweep.root.stat().st_uid
    except OSError:
        return False


def _real(script: Path) -> str:
    """As Slurm may show it if links lead to the run's folder; a link in its own place counts for nothing."""
    return str(resolved(script.parent) / script.name)


def _paths(*given: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, given)))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else ""


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < _MOST_S else None


def submitted_job(run: RunDir) -> str | None:
    """What ``submission.json`` gives as the job's id, which may be anything; None if it gives none."""
    given = read_json_object(run.submission, within=run.root).get("job_id")
    return None if given is None else str(given)


def write_job_record(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write ``job.json``: ``job_id``, ``state``, what accounting tells, and which start of the job this is of.

    Raises OSError.
    """
    write_json(run.job_record, {"restarts": restarts_of(run, str(record.get("job_id"))), **record})


def read_job_record(run: RunDir) -> JobRecord | None:
    """None if there is no record, or it names no job."""
    record = read_json_object(run.job_record, within=run.root)
    job_id, state, restarts = str(record.get("job_id")), str(record.get("state")), record.get("restarts")
    if not JOB_ID.fullmatch(job_id):
        return None
    return JobRecord(job_id, state if _STATE.fullmatch(state) else "UNKNOWN", restarts if type(restarts) is int else 0)


def job_ids_of(run: RunDir, tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """Numbers of all jobs that ran, or wait to run, in this directory, newest last; of a sweep's folder its arrays.

    ``tasks``: what the sweep's ledger notes of this point, the latest last; None: it is read.
    """
    ids: dict[str, float] = {}
    for name in names_in(run.submitit, within=run.root):  # none if not made by submitit, or not ours to read
        if match := _SUBMITTED.fullmatch(name):
            with suppress(OSError):  # removed meanwhile
                ids[match[1]] = (run.submitit / name).lstat().st_mtime
    ledger = SweepDir(run.root)
    if (place := SweepDir.of_point(run)) is not None:
        ledger = place[0]
        tasks = jobs_of_points(ledger).get(place[1], []) if tasks is None else tasks
    elif tasks is None:
        tasks = arrays_of(jobs_of_points(ledger))
    noted = _times_of(tasks, ids, ledger)
    record = read_job_record(run)
    for job_id in (submitted_job(run) or "", record.job_id if record is not None else ""):
        if JOB_ID.fullmatch(job_id):
            ids.setdefault(job_id, 0.0)
    others = sorted(set(ids) - set(noted), key=lambda each: (ids[each], each))
    times = ids | noted
    return tuple(sorted([*noted, *others], key=times.__getitem__))[-_most_jobs(run) :]


def _most_jobs(run: RunDir) -> int:
    return _MOST_JOBS if is_mine(run.root) else _MOST_JOBS_OF_OTHERS


def _times_of(tasks: Sequence[str], started: Mapping[str, float], sweep: SweepDir) -> dict[str, float]:
    """When each noted job began, in the ledger's order; of one that has not, when it was noted at the latest.

    A job that waits has left no file, and is the newest all the same.
    """
    times: dict[str, float] = {}
    latest = 0.0
    for task in tasks:
        latest = times[task] = max(latest, started.get(task, 0.0))
    if tasks and tasks[-1] not in started:
        with suppress(OSError):  # it stays behind those noted before
            times[tasks[-1]] = max(latest, sweep.ledger.lstat().st_mtime)
    return times


def write_provenance_record(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write the file. Raises OSError."""
    write_json(run.provenance, dict(record))


def package_version(run: RunDir, package: str) -> str:
    """The version of a Python package that the launcher's environment had; empty if it is not known."""
    packages = read_json_object(run.provenance, within=run.root).get("packages")
    return str(packages.get(package) or "") if isinstance(packages, dict) else ""
