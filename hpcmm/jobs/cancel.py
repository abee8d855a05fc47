"""Cancel a run's jobs, after a look at whether there is anything to cancel."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import Target, slurm_environment
from hpcmm.jobs.state import State, is_local, states_of
from hpcmm.slurm_commands import ask


def cancel(asked: str, targets: Sequence[Target]) -> list[str]:
    """Cancel the active jobs of the one run that has any. Returns their numbers.

    Raises HpcmmError when nothing of it is active, when several runs are meant, and when Slurm refuses.
    """
    states = states_of(targets)
    active = [state for state in states if state.active]
    if not active:
        raise HpcmmError(_nothing_to_cancel(asked, states))
    if len(active) > 1:
        names = ", ".join(state.run.root.name for state in active if state.run)
        raise HpcmmError(f"{asked!r} is the start of {len(active)} active runs: name one of {names}.")
    state = active[0]
    ids = list(dict.fromkeys(_cancellable(job.job_id, job.raw_id) for job in state.active))
    if is_local(state.run):
        for each in ids:
            _interrupt(int(each))
    elif any(job.source == "run directory" for job in state.active):
        raise HpcmmError(f"Nothing to cancel: Slurm does not know job {', '.join(ids)}, though the run directory does.")
    else:
        ask("scancel", *ids, environ=slurm_environment(state.run))
    return ids


def _interrupt(pid: int) -> None:
    """submitit's controller then ends its ranks."""
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return  # over by now
    except PermissionError as error:
        raise HpcmmError(f"Process {pid} is another user's: you cannot cancel it.") from error


def _cancellable(job_id: str, raw_id: str) -> str:
    """scancel's way to write a task, or the tasks of an array that still wait."""
    return job_id if "_" in job_id else raw_id


def _nothing_to_cancel(asked: str, states: Sequence[State]) -> str:
    for state in states:
        if state.jobs:
            last = state.jobs[-1]
            when = f" since {last.ended}" if last.ended else ""
            return f"Nothing to cancel: job {last.job_id} of {asked} is over ({last.state}{when})."
    return f"Nothing to cancel: Slurm knows no job of {asked}."
