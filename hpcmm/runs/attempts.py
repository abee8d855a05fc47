"""The attempts of a run: each start of its script, the first one, requeued ones and those submitted again by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hpcmm.files import is_regular, json_object, open_regular, read_tail
from hpcmm.runs.run_dir import JOB_ID, RunDir

_TAIL_BYTES = 1 << 20
_MOST_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Attempt:
    """A start of the script, as far as readers need it."""

    job_id: str
    """As a user writes it and the exit status names it: ``12``, or ``12_7`` for a task of an array."""
    raw_id: str
    """Slurm's own number, which each task of an array has, and which the ranks note."""


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
    raw_ids = [str(record.get("job_id")) for record in records]
    named = [str(record.get("array_task", raw_id)) for record, raw_id in zip(records, raw_ids, strict=True)]
    return [Attempt(*ids) for ids in zip(named, raw_ids, strict=True) if all(map(JOB_ID.fullmatch, ids))]


def raw_id_of(run: RunDir, job_id: str) -> str:
    """Slurm's own number of the job that a user calls ``job_id``; the same if no attempt tells of another."""
    return next((each.raw_id for each in reversed(attempts_of(run)) if each.job_id == job_id), job_id)
