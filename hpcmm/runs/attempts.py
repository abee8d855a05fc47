"""The attempts of a run: each start of its script, the first one, requeued ones and those submitted again by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

from hpcmm.node.startup import SCRIPT_BEGAN
from hpcmm.runs.run_dir import RunDir


def begin_attempt(run: RunDir, environ: Mapping[str, str] = os.environ) -> int:
    """Note in ``attempts.jsonl`` that the script runs (again). Returns the attempt's number, from 1."""
    attempt = current_attempt(run) + 1 if run.attempts.exists() else 1
    record = {
        "attempt": attempt,
        "job_id": environ.get("SLURM_JOB_ID", ""),
        "restart_count": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
        "script_began_s": float(environ.get(SCRIPT_BEGAN) or time.time()),
    }
    with run.attempts.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return attempt


def current_attempt(run: RunDir) -> int:
    """The number of the attempt that runs; 1 where none was noted, as with submitit's local executor."""
    try:
        return max(1, run.attempts.read_bytes().count(b"\n"))
    except FileNotFoundError:
        return 1
