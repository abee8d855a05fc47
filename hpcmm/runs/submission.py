"""How a run was submitted: its jobs (``submission.json``, ``job.json``), and its origin (``provenance.json``)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hpcmm.files import names_in, read_json_object, write_json
from hpcmm.runs.ledger import jobs_of_points
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir

_SUBMITTED = re.compile(rf"({JOB_ID.pattern})_submitted\.pkl")
_STATE = re.compile(r"[A-Z_]{1,32}")
_MOST_JOBS = 1000
"""Of one directory that Slurm is asked for."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What ``job.json`` says of a job: its state is Slurm's word, such as ``TIMEOUT``."""

    job_id: str
    state: str


def write_submission(run: RunDir, **jobs: str | None) -> None:
    """Write ``submission.json``: ``job_id``, and ``analysis_job_id`` if one may be queued. Raises OSError."""
    write_json(run.submission, {**jobs, "submitted_unix_s": time.time()})


def submitted_job(run: RunDir) -> str | None:
    """What ``submission.json`` gives as the job's id, which may be anything; None if it gives none."""
    given = read_json_object(run.submission, within=run.root).get("job_id")
    return None if given is None else str(given)


def write_job_record(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write ``job.json``: ``job_id``, ``state`` and what accounting tells. Raises OSError."""
    write_json(run.job_record, dict(record))


def read_job_record(run: RunDir) -> JobRecord | None:
    """None if there is no record, or it names no job."""
    record = read_json_object(run.job_record, within=run.root)
    job_id, state = str(record.get("job_id")), str(record.get("state"))
    return JobRecord(job_id, state if _STATE.fullmatch(state) else "UNKNOWN") if JOB_ID.fullmatch(job_id) else None


def job_ids_of(run: RunDir) -> tuple[str, ...]:
    """Numbers of all jobs that ran, or wait to run, in this directory, newest last."""
    ids: dict[str, float] = {}
    for name in names_in(run.submitit, within=run.root):  # none if not made by submitit, or not ours to read
        if match := _SUBMITTED.fullmatch(name):
            with suppress(OSError):  # removed meanwhile
                ids[match[1]] = (run.submitit / name).lstat().st_mtime
    noted = [job for jobs in jobs_of_points(SweepDir(run.root)).values() for job in jobs]
    record = read_job_record(run)
    noted += [submitted_job(run) or "", record.job_id if record is not None else ""]
    for job_id in filter(JOB_ID.fullmatch, noted):
        ids.setdefault(job_id, 0.0)
    return tuple(sorted(ids, key=lambda each: (ids[each], each)))[-_MOST_JOBS:]


def write_provenance_record(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write the file. Raises OSError."""
    write_json(run.provenance, dict(record))


def package_version(run: RunDir, package: str) -> str:
    """The version of a Python package that the launcher's environment had; empty if it is not known."""
    packages = read_json_object(run.provenance, within=run.root).get("packages")
    return str(packages.get(package) or "") if isinstance(packages, dict) else ""
