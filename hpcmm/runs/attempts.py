"""The attempts of a run: each start of its script, also by a requeue or once more by hand, and how each ended."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hpcmm.files import is_regular, json_object, open_regular, read_tail
from hpcmm.ranges import count_tasks, is_task_of, tasks_in
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir

RESTARTED = "restarted"
"""What a job's script notes of its job when Slurm has started it again."""
_TAIL_BYTES = 1 << 20
_MOST_BYTES = 1 << 26
_MOST_WRITTEN_OUT = 200_000
"""Of the tasks that were cancelled as many are looked up by their number; beyond that ranges are gone through."""
_COUNT = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Attempt:
    """A start of the script, as far as readers need it."""

    job_id: str
    """As a user writes it and the exit status names it: ``12``, or ``12_7`` for a task of an array."""
    raw_id: str
    """Slurm's own number, which each task of an array has, and which the ranks note."""
    restart: int = 0
    """How often Slurm had started the job before."""


def begin_attempt(run: RunDir, environ: Mapping[str, str] = os.environ, began_s: float | None = None) -> int:
    """Note in ``attempts.jsonl`` that the script runs (again), since ``began_s`` (None: now; seconds since 1970).

    Returns the attempt's number, from 1.
    """
    attempt = current_attempt(run) + 1 if is_regular(run.attempts) else 1
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    record = {
        "attempt": attempt,
        "job_id": environ.get("SLURM_JOB_ID", ""),
        **({"array_task": f"{array}_{task}"} if array and task else {}),
        "restart_count": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
        "script_began_s": time.time() if began_s is None else began_s,
    }
    with run.attempts.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return attempt


def current_attempt(run: RunDir) -> int:
    """The number of the attempt that runs; 1 if none was noted, as with submitit's local executor."""
    try:
        with open_regular(run.attempts, within=run.root) as file:
            return max(1, file.read(_MOST_BYTES).count(b"\n"))
    except FileNotFoundError:
        return 1


def attempts_of(run: RunDir) -> list[Attempt]:
    """The attempts that name their job, newest last."""
    records = [json_object(line) or {} for line in read_tail(run.attempts, _TAIL_BYTES, within=run.root).splitlines()]
    found = [_attempt(record) for record in records]
    return [each for each in found if JOB_ID.fullmatch(each.job_id) and JOB_ID.fullmatch(each.raw_id)]


def _attempt(record: Mapping[str, Any]) -> Attempt:
    raw_id, restart = str(record.get("job_id")), record.get("restart_count")
    return Attempt(str(record.get("array_task", raw_id)), raw_id, restart if type(restart) is int else 0)


@dataclass(frozen=True)
class JobNotes:
    """What the run directory notes of one job."""

    raw_id: str
    """Slurm's own number of it; the number that a user writes if no attempt tells of another."""
    restarts: int
    """How often Slurm has started it again."""
    ends: tuple[str, ...]
    """What each of its lines in ``exit_status`` says, the latest last."""


def notes_of(run: RunDir, job_id: str) -> JobNotes:
    """What the attempts and the exit status tell of job ``job_id``; each file is read once."""
    attempts = [each for each in attempts_of(run) if each.job_id == job_id]
    ends = tuple(outcome for job, outcome in ends_of(run) if job == job_id)
    restarts = max([ends.count(RESTARTED), *(each.restart for each in attempts)])
    return JobNotes(attempts[-1].raw_id if attempts else job_id, restarts, ends)


def raw_id_of(run: RunDir, job_id: str) -> str:
    """Slurm's own number of the job that a user calls ``job_id``; the same if no attempt tells of another."""
    return notes_of(run, job_id).raw_id


def ends_of(run: RunDir) -> list[tuple[str, str]]:
    """Job and outcome of each line of ``exit_status``, the latest last."""
    text = read_tail(run.exit_status, _TAIL_BYTES, within=run.root)
    lines = (line.partition(" ") for line in text.splitlines())
    return [(job, outcome) for job, _, outcome in lines]


def restarts_of(run: RunDir, job_id: str) -> int:
    """How often Slurm has started the job again, as far as the run directory notes it."""
    return notes_of(run, job_id).restarts


def note_cancelled(run: RunDir, job_ids: Iterable[str]) -> None:
    """Note that the user has cancelled these jobs of a run, or of a sweep's points. Raises OSError.

    Tasks that wait together are one line (``12_[8-99]``).
    """
    lines = "".join(f"{job_id} {restarts_of(run, job_id)}\n" for job_id in job_ids)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(_file_of_cancelled(run), flags, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as notes:
        notes.write(lines)


def was_cancelled(run: RunDir, job_id: str, restarts: int) -> bool:
    """Whether the user has cancelled the job through hpcmm, and Slurm, which has started it again ``restarts`` times,
    has not done so since."""
    file = _file_of_cancelled(run)
    try:
        facts = file.lstat()
    except OSError:  # none, or not ours to look at
        return False
    return _read_cancelled(file, (facts.st_ino, facts.st_size, facts.st_mtime_ns)).restarts_at(job_id) >= restarts


def _file_of_cancelled(run: RunDir) -> Path:
    sweep = SweepDir.of_point(run)
    return (sweep[0].shared if sweep is not None else run).cancelled


@dataclass(frozen=True)
class _CancelNotes:
    """How often Slurm had started each job again when it was cancelled."""

    single: Mapping[str, int]
    ranges: Mapping[str, Mapping[str, int]]
    """Tasks that waited together and are too many to write out, by their array's number."""

    def restarts_at(self, job_id: str) -> int:
        """-1 if the job was not cancelled."""
        ranges = self.ranges.get(job_id.partition("_")[0], {})
        mine = [count for tasks, count in ranges.items() if is_task_of(job_id, tasks)]
        return max([self.single.get(job_id, -1), *mine])


@lru_cache(maxsize=4)
def _read_cancelled(file: Path, _version: tuple[int, int, int]) -> _CancelNotes:
    """The notes are parsed once for all points of a sweep, and again when the file has changed."""
    single: dict[str, int] = {}
    ranges: dict[str, dict[str, int]] = {}
    left = _MOST_WRITTEN_OUT
    text = read_tail(file, _TAIL_BYTES, within=file.parent)
    for line in text.splitlines()[len(text) >= _TAIL_BYTES :]:  # the first is cut then, and may name another job
        job_id, _, count = line.partition(" ")
        if not _COUNT.fullmatch(count):
            continue
        if (tasks := count_tasks(job_id)) <= left:
            left -= tasks
            for task in tasks_in(job_id):
                single[task] = max(int(count), single.get(task, -1))
        else:
            of_array = ranges.setdefault(job_id.partition("_")[0], {})
            of_array[job_id] = max(int(count), of_array.get(job_id, -1))
    return _CancelNotes(single, ranges)


# What lies between the job's start and the rank's own code, from each stage's mark in the environment.

SCRIPT_BEGAN, SRUN_BEGAN, CAPTURE_BEGAN, COMMAND_BEGAN = (
    f"HPCMM_{stage}_BEGAN_S" for stage in ("SCRIPT", "SRUN", "CAPTURE", "COMMAND")
)
"""Environment variables, in the order of time: seconds since 1970 at which each stage began."""

_STAGES = (
    ("scheduler", "SLURM_JOB_START_TIME", SCRIPT_BEGAN),
    ("prepare", SCRIPT_BEGAN, SRUN_BEGAN),
    ("srun", SRUN_BEGAN, CAPTURE_BEGAN),
    ("capture", CAPTURE_BEGAN, COMMAND_BEGAN),
)


def parts_before(now_s: float | None, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, float]]:
    """Name and seconds of each part of the start up to ``now_s``, the beginning of the rank's own code.

    Without ``now_s`` up to its interpreter.

    ``scheduler`` counts from Slurm's start of the job, which Slurm gives in whole seconds; the other parts are exact as
    far as the nodes' clocks agree. A part whose marks are missing is left out.
    """
    for part, begin, end in _STAGES:
        if part == "prepare" and SRUN_BEGAN not in environ:  # without Slurm
            end = CAPTURE_BEGAN  # noqa: PLW2901
        if begin in environ and end in environ:
            yield part, max(0.0, float(environ[end]) - float(environ[begin]))
    if COMMAND_BEGAN in environ and now_s is not None:
        yield "interpreter", max(0.0, now_s - float(environ[COMMAND_BEGAN]))


def process_began_s() -> float:
    """When the kernel started this process, in seconds since 1970, to a hundredth.

    psutil's ``create_time`` is up to a second off: it adds the boot time, which the kernel tells in whole seconds.
    """
    after_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    ticks = int(after_name[19])  # field 22, `starttime`, of proc_pid_stat(5)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
