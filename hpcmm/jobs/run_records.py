"""What a run directory itself tells of its jobs, for times when Slurm has forgotten them or does not answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.config.untyped_config import read_frozen_config
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.queue import Job

_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class RankProgress:
    """How far a rank came, by its metrics file."""

    rank: int
    node: str
    job_id: str
    last_step: int | None
    """Number of its last finished step; None before the first."""
    last_unix_ns: int
    """The node's clock at its last record."""
    ended: bool
    """It trained to its end."""


def progress_of(run: RunDir) -> dict[int, RankProgress]:
    """The newest start of each rank, from the files in ``RUN/metrics``."""
    found = {}
    for path in sorted(run.metrics.glob("rank_*.jsonl")):
        number = path.stem.removeprefix("rank_")
        if number.isdecimal() and (progress := _progress(path, int(number))) is not None:
            found[progress.rank] = progress
    return found


def record_of(run: RunDir, job_id: str) -> Job | None:
    """The job as ``job.json`` keeps it, as its script's last line or its ranks' last words tell; None otherwise."""
    try:
        given = json.loads(run.job_record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        given = None
    if isinstance(given, dict) and str(given.get("job_id")) == job_id:
        return _job(run, job_id, str(given.get("state", "UNKNOWN")))
    if (ended := _exit_status(run, job_id)) is not None:
        return ended
    mine = [each for each in progress_of(run).values() if each.job_id == job_id]
    if mine and all(each.ended for each in mine):
        return _job(run, job_id, "COMPLETED")
    if any(run.failures.glob(f"{job_id}.*/rank_*.exit.json")):
        return _job(run, job_id, "FAILED")
    return None


def records_of(run: RunDir, job_id: str) -> list[Job]:
    """The job as :func:`record_of` has it; of a sweep's array, those of its points whose end is noted."""
    if not SweepDir(run.root).ledger.is_file():
        record = record_of(run, job_id)
        return [record] if record is not None else []
    points = {
        int(folder.name): RunDir(folder) for folder in run.root.glob("[0-9][0-9][0-9][0-9]*") if _is_point(folder)
    }
    found = (record_of(points[index], f"{job_id}_{index}") for index in sorted(points))
    return [record for record in found if record is not None]


def points_without_end(run: RunDir) -> list[str]:
    """Names of a sweep's points of whose newest job no end is noted; empty for a single run and a damaged ledger."""
    try:
        points = json.loads(SweepDir(run.root).ledger.read_text(encoding="utf-8"))["points"]
        newest = {int(point["index"]): str(point["jobs"][-1]) for point in points if point["jobs"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    sweep = SweepDir(run.root)
    return [
        sweep.point(index).root.name
        for index, job in newest.items()
        if record_of(sweep.point(index), f"{job}_{index}") is None
    ]


def _is_point(folder: Path) -> bool:
    return folder.name.isdecimal() and SweepDir(folder.parent).point(int(folder.name)).root == folder


def _exit_status(run: RunDir, job_id: str) -> Job | None:
    """By the last line that the job's script left; None where it left none, or goes on after a stop."""
    try:
        with run.exit_status.open("rb") as file:
            file.seek(max(0, run.exit_status.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return None
    own = [outcome for line in lines for job, _, outcome in [line.partition(" ")] if job == job_id]
    if not own or not re.fullmatch(r"[0-9]{1,3}", own[-1]):
        return None
    return _job(run, job_id, "COMPLETED" if int(own[-1]) == 0 else "FAILED", f"{int(own[-1])}:0")


def _job(run: RunDir, job_id: str, state: str, exit_code: str = "") -> Job:
    name = str(read_frozen_config(run.config).get("name", ""))
    command = str(run.submission_script)
    return Job(job_id, job_id, name, state=state, exit_code=exit_code, command=command, source="run directory")


def _progress(path: Path, rank: int) -> RankProgress | None:
    records = _records(path)
    start = next((record for record in reversed(records) if record.get("event") == "start"), None)
    since = records[records.index(start) :] if start is not None else records
    if start is None:  # a long file: the tail holds no start, but the head does
        start = next((record for record in _records(path, head=True) if record.get("event") == "start"), None)
    if start is None or not since:
        return None
    steps = [record["step"] for record in since if record.get("event") == "step" and isinstance(record["step"], int)]
    last_ns = since[-1].get("unix_ns")
    return RankProgress(
        rank,
        str(start.get("node", "")),
        str(start.get("job_id", "")),
        steps[-1] if steps else None,
        last_ns if isinstance(last_ns, int) else 0,
        since[-1].get("event") == "end",
    )


def _records(path: Path, *, head: bool = False) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            if not head:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return []
    return [record for line in text.splitlines() if (record := _object(line)) is not None]


def _object(line: str) -> dict[str, Any] | None:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):  # the tail began within a line, or the rank died while it wrote
        return None
    return given if isinstance(given, dict) and ("step" in given or given.get("event") != "step") else None
