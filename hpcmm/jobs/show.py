"""Jobs as aligned lines for a terminal and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hpcmm.jobs.find_run import run_of_command
from hpcmm.jobs.logs import printable
from hpcmm.jobs.state import State
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.queue import Job

_MOST_TASKS_SHOWN = 10
_COLUMNS = ("job", "name", "state", "where", "since", "why it waits", "run directory")


def job_lines(jobs: Sequence[Job], runs: dict[str, RunDir | None] | None = None) -> list[str]:
    """A header and a line a job; arrays of many tasks as one line a state."""
    shown = _gathered(jobs)
    rows = [_COLUMNS, *(_row(job, (runs or {}).get(job.raw_id) or run_of_command(job)) for job in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def state_lines(state: State) -> list[str]:
    """A target's jobs, with how far its ranks came."""
    if not state.jobs and state.silent:
        return [f"{state.target.asked}: no end of it is noted: it waits, runs, or was killed with its script."]
    if not state.jobs:
        return [f"{state.target.asked}: no job of it is known here: it was never queued, or Slurm has forgotten it."]
    run = state.run
    lines = job_lines(state.jobs, {job.raw_id: run for job in state.jobs})
    counts: Counter[str] = Counter()
    for job in state.jobs:
        counts[job.state] += job.tasks
    if sum(counts.values()) > 1:
        lines.append(", ".join(f"{count} {name}" for name, count in counts.most_common()))
    return lines


def as_values(job: Job, run: RunDir | None) -> dict[str, Any]:
    """A job for JSON; ``expected_start`` stands apart from ``started``."""
    values = asdict(job)
    del values["command"]
    start = values.pop("started")
    found = run or run_of_command(job)
    return values | {
        "tasks": job.tasks,
        "active": job.active,
        "started": "" if job.pending else start,
        "expected_start": start if job.pending else "",
        "run_dir": str(found.root) if found else None,
    }


def _gathered(jobs: Sequence[Job]) -> list[Job]:
    """Many tasks of one array in one state become one line, which names the first of them."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        array = job.job_id.split("_")[0] if "_" in job.job_id else job.job_id
        groups.setdefault((array, job.state), []).append(job)
    shown: list[Job] = []
    for (array, _), group in groups.items():
        tasks = sum(job.tasks for job in group)
        if len(group) <= _MOST_TASKS_SHOWN:
            shown += group
        else:
            shown.append(Job(**{**vars(group[0]), "job_id": f"{array} ({tasks} tasks)", "nodes": ""}))
    return shown


def _row(job: Job, run: RunDir | None) -> tuple[str, ...]:
    if job.pending:
        since = f"expected {job.started}" if job.started else f"submitted {job.submitted}" if job.submitted else ""
    elif job.active:
        since = f"{job.started} ({job.elapsed})"
    else:
        since = f"ended {job.ended}" if job.ended else ""
    reason = job.reason if job.pending or job.state.startswith(("CANC", "NODE", "TIME", "PREE", "OUT")) else ""
    where = job.nodes or (f"{job.node_count} nodes" if job.node_count and job.node_count != "1" else "")
    cells = (_short(job.job_id), job.name, job.state, where, since, reason, str(run.root) if run else "")
    return tuple(printable(cell.encode()) for cell in cells)


def _short(job_id: str) -> str:
    return job_id if len(job_id) <= 24 else job_id[:20] + "...]"
