"""Cancel a run's jobs, after a look at whether there is anything to cancel."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpcmm.config.untyped_config import trains_a_workload
from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import Target, settings
from hpcmm.jobs.state import State, all_over, environment_of_job, is_local, poller_of, states_of
from hpcmm.runs.attempts import note_cancelled
from hpcmm.runs.ownership import is_mine, require_mine
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.commands import ask
from hpcmm.slurm.jobs import Job
from hpcmm.text import printable

_LONGEST_PAUSE_S = 5.0
_LOCAL_POLL_S = 0.2


@dataclass(frozen=True)
class Cancelled:
    """What became of the jobs."""

    ids: list[str]
    in_peace: bool
    """They ended by themselves when asked to: with a checkpoint, and with their reports."""


def cancel(asked: str, targets: Sequence[Target], patience_s: float = 60.0) -> Cancelled:
    """Cancel the active jobs of the one run that has any.

    A profiled run of hpcmm's own task is asked to stop first and has ``patience_s`` for that. Other ranks under a
    profiler get Slurm's KillWait to finish their reports. Raises HpcmmError when nothing of it is active, when several
    runs are meant, when a run is another user's, and when Slurm refuses.
    """
    for target in targets:
        if target.run is not None:
            require_mine(target.run.root, "give the job's number, if it is yours to cancel")
    states = states_of(targets)
    active = [state for state in states if state.active]
    if not active:
        raise HpcmmError(_nothing_to_cancel(asked, states))
    if len(active) > 1:
        names = ", ".join(state.run.root.name for state in active if state.run)
        raise HpcmmError(f"{asked!r} is the start of {len(active)} active runs: name one of {names}.")
    state = active[0]
    ids = list(dict.fromkeys(_cancellable(job, state.target) for job in state.active))
    if is_local(state.run):
        for each in ids:
            _end_locally(int(each), patience_s)
        _note(state, state.active)
    elif any(job.source == "run directory" for job in state.active):
        raise HpcmmError(f"Nothing to cancel: Slurm does not know job {', '.join(ids)}, though the run directory does.")
    elif patience_s > 0 and _stops_when_asked(state):
        return Cancelled(ids, _stop(state, ids, patience_s))
    else:
        ask("scancel", *ids, environ=_environment_of(state))
        _note(state, state.active)
    return Cancelled(ids, in_peace=False)


def _note(state: State, jobs: Sequence[Job]) -> None:
    """Note in the run, or the sweep, that these were cancelled: Slurm keeps no record of a task that never started."""
    noted: dict[Path, dict[str, None]] = {}  # in order, each job once
    for job in jobs:
        run = state.run_of(job)
        if run is not None and is_mine(run.root):
            noted.setdefault(run.root, {})[_cancellable(job, state.target)] = None
    for root, job_ids in noted.items():
        try:
            note_cancelled(RunDir(root), job_ids)
        except OSError as error:
            print(f"hpcmm.jobs: The cancellation could not be noted ({printable(str(error))}).", file=sys.stderr)


def _stops_when_asked(state: State) -> bool:
    """Whether the ranks look for a wish to stop, and have reports that are worth the wait."""
    given = settings(state.run) if state.run is not None and is_mine(state.run.root) else {}
    profile = given.get("profile")
    return (
        bool(given)
        and trains_a_workload(given)
        and given.get("requeue") != "slurm"  # whose script passes the wish on as a signal, of which the ranks die
        and isinstance(profile, dict)
        and bool(profile.get("tool"))
        and any(not job.pending for job in state.active)
    )


def _stop(state: State, ids: Sequence[str], patience_s: float) -> bool:
    """Ask the running jobs to stop, cancel what is left in the end. Returns whether nothing was left."""
    environ = _environment_of(state)
    waiting = [_cancellable(job, state.target) for job in state.active if job.pending]
    if waiting:
        ask("scancel", "--state=PENDING", *waiting, environ=environ)
        _note(state, [job for job in state.active if job.pending])
    ask("scancel", "--batch", "--signal=USR2", *ids, environ=environ)
    poller = poller_of([state.target], [state], _LONGEST_PAUSE_S)
    if all_over(poller.wait(all_over, patience_s)):
        return True
    ask("scancel", *ids, environ=environ)
    _note(state, state.active)
    return False


def _environment_of(state: State) -> dict[str, str]:
    """In which scancel reaches the cluster of the active jobs. Raises HpcmmError if that is not one cluster."""
    cluster = ",".join(sorted({job.cluster for job in state.active}))
    job_ids = [job.job_id for job in state.active]
    if "," in cluster or cluster == "all":
        raise HpcmmError(
            f"Job {', '.join(job_ids)} may be on any of the clusters {cluster}, on which these numbers may be others' "
            "jobs: find it with squeue, and use scancel --clusters=NAME."
        )
    return environment_of_job(state.run, state.active[0])


def _end_locally(pid: int, patience_s: float) -> None:
    """End a run of submitit's local executor by its controller.

    That passes SIGTERM on to the ranks, which finish their reports then, and goes on waiting for them. At SIGINT it
    kills them after a second.
    """
    until = time.monotonic() + patience_s
    try:
        process = psutil.Process(pid)  # by its start, so that a later one with its number is another one
        process.send_signal(signal.SIGTERM)
        while time.monotonic() < until:
            time.sleep(_LOCAL_POLL_S)
            if not process.is_running():
                return
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return  # over by now
    except psutil.AccessDenied as error:
        raise HpcmmError(f"Process {pid} is another user's: you cannot cancel it.") from error


def _cancellable(job: Job, target: Target) -> str:
    """scancel's way to write a job, a component of one, a task, or the tasks of an array that still wait.

    squeue adds to these how many may run at once (``12_[3-9%4]``), which scancel does not read. Raises HpcmmError for a
    component that Slurm ends with all others only, unless all are meant.
    """
    whole, _, component = job.job_id.partition("+")
    if not component:
        return re.sub(r"%[0-9]+", "", job.job_id)
    if whole in target.job_ids:
        return whole
    if job.pending or component == "0":
        which = "waits, so" if job.pending else "leads the others, so"
        raise HpcmmError(
            f"{job.job_id} is a component of job {whole} that {which} Slurm cancels all of them or none: "
            f"python -m hpcmm.jobs cancel {whole}"
        )
    return job.job_id


def _nothing_to_cancel(asked: str, states: Sequence[State]) -> str:
    for state in states:
        if state.is_array and state.jobs:
            return f"Nothing to cancel: no point of {asked} waits or runs."
        if state.jobs:
            last = state.jobs[-1]
            when = f" since {last.ended}" if last.ended else ""
            return f"Nothing to cancel: job {last.job_id} of {asked} is over ({last.state}{when})."
    others = [note.partition(", so this")[0] for state in states for note in state.notes if "is another job" in note]
    known = others[0] if others else f"Slurm knows no job of {asked}"
    return f"Nothing to cancel: {known}.{''.join(state.target.namesake_hint for state in states)}"
