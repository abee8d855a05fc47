"""The state of a run on submitit's local executor, which has no scheduler to ask."""

from __future__ import annotations

from pathlib import Path

import psutil

from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.queue import Job


def local_job(run: RunDir, job_id: str, name: str, ranks: int) -> Job:
    """The run as a job: it runs while its controlling process does, and completed when each rank left a result.

    submitit's number of a local job is that process' own; it may be another's by now, so its command is looked at.
    """
    if job_id.isdecimal() and _runs(int(job_id), run.submitit):
        state = "RUNNING"
    else:
        ended = ranks > 0 and all(_ended_well(run.rank_metrics(rank)) for rank in range(ranks))
        state = "COMPLETED" if ended else "FAILED"
    return Job(job_id, job_id, name=name, state=state, node_count="1", source="run directory")


def _runs(pid: int, folder: Path) -> bool:
    try:
        return str(folder) in psutil.Process(pid).cmdline()
    except (psutil.Error, OverflowError):
        return False


def _ended_well(metrics: Path) -> bool:
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return bool(lines) and '"event": "end"' in lines[-1]
