"""The attempts of a run: each start of its script, also by a requeue or once more by hand, and how each ended."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcmm.files import is_regular, json_object, open_regular, read_tail
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir

RESTARTED = "restarted"
"""What a job's script notes of its job when Slurm has started it again."""
_TAIL_BYTES = 1 << 20
_MOST_BYTES = 1 << 26
_COUNT = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
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


def raw_id_of(run: RunDir, job_id: str) -> str:
    """Slurm's own number of the job that a user calls ``job_id``; the same if no attempt tells of another."""
    return next((each.raw_id for each in reversed(attempts_of(run)) if each.job_id == job_id), job_id)


def ends_of(run: RunDir, job_id: str | None = None) -> list[tuple[str, str]]:
    """Job and outcome of each line of ``exit_status``, the latest last; of ``job_id`` alone if that is given."""
    text = read_tail(run.exit_status, _TAIL_BYTES, within=run.root)
    lines = (line.partition(" ") for line in text.splitlines())
    return [(job, outcome) for job, _, outcome in lines if job_id in {None, job}]


def restarts_of(run: RunDir, job_id: str) -> int:
    """How often Slurm has started the job again, as far as the run directory notes it."""
    noted = sum(outcome == RESTARTED for _, outcome in ends_of(run, job_id))
    return max([noted, *(each.restart for each in attempts_of(run) if each.job_id == job_id)])


def note_cancelled(run: RunDir, job_ids: Iterable[str]) -> None:
    """Note that the user has cancelled these jobs of a run, or of a sweep's points. Raises OSError."""
    sweep = SweepDir.of_point(run)
    file = (sweep[0].shared if sweep is not None else run).cancelled
    lines = "".join(f"{job_id} {restarts_of(run, job_id)}\n" for job_id in job_ids)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as notes:
        notes.write(lines)


def was_cancelled(run: RunDir, job_id: str) -> bool:
    """Whether the user has cancelled the job through hpcmm, and Slurm has not started it again since."""
    sweep = SweepDir.of_point(run)
    notes = (sweep[0].shared if sweep is not None else run).cancelled
    found = [line.partition(" ") for line in read_tail(notes, _TAIL_BYTES, within=notes.parent).splitlines()]
    restarts = [int(count) for job, _, count in found if job == job_id and _COUNT.fullmatch(count)]
    return bool(restarts) and max(restarts) >= restarts_of(run, job_id)
