"""How a run's job ended, and whether it failed: the one answer, from all that the job left in the run directory."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hpcmm.runs import failures
from hpcmm.runs.attempts import RESTARTED, JobNotes, ends_of, notes_of, was_cancelled
from hpcmm.runs.ledger import Ledger, LedgerPoint
from hpcmm.runs.metrics import progress_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import job_ids_of, read_job_record

COMPLETED, FAILED, STOPPED, IN_QUEUE = "COMPLETED", "FAILED", "STOPPED", "ACTIVE"
CANCELLED = "CANCELLED"
_FAILED_STATES = frozenset(
    {FAILED, CANCELLED, "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
_STATUS = re.compile(r"[0-9]{1,3}")


def signal_of(exit_code: str) -> int | None:
    """The signal in Slurm's ``status:signal`` that ended a job's script."""
    number = exit_code.partition(":")[2]
    return int(number) if number.isdecimal() and int(number) in set(signal.Signals) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    state: str
    """``COMPLETED``, ``FAILED``, ``STOPPED`` (before the last step, with a checkpoint), or another word of Slurm's."""
    exit_status: int | None = None
    """Of the job's script, if its last line tells it."""

    @property
    def completed(self) -> bool:
        return self.state == COMPLETED

    @property
    def failed(self) -> bool:
        """Neither completed nor stopped as asked."""
        return self.state in _FAILED_STATES


HUNG = "hung"
"""What ``slurm/train.sbatch.j2`` writes in place of an exit status, if the watchdog ended the ranks."""
_WITHOUT_AN_END = {"stopped": Outcome(STOPPED), "terminated": None, RESTARTED: None}
"""And if the job may go on: its ranks stopped as asked,
with a checkpoint; Slurm told the script to end, and may start it again; Slurm has started it again."""


def outcome_of(run: RunDir, job_id: str, ranks: int | None = None) -> Outcome | None:
    """How job ``job_id`` of this directory ended; None if nothing tells: it waits, runs, or was killed with its script.

    By ``job.json``, the last line of the job's script, all ranks' last records (of ``ranks`` ranks; None: of those
    that left any), and what ranks that ended badly left: in this order, for the first knows most. But no job has
    completed of which a rank ended badly, and ``job.json`` tells nothing of what Slurm has started again since. What
    the user cancelled through hpcmm is cancelled, unless it completed first. A job that stopped, or that Slurm has
    started again, may have gone on: only what tells of a later end counts then.
    """
    record, notes = read_job_record(run), notes_of(run, job_id)
    if record is not None and record.job_id == job_id and record.restarts >= notes.restarts:
        return Outcome(record.state)
    ended = notes.ends[-1:]
    cancelled = was_cancelled(run, job_id, notes.restarts)
    if ended and _STATUS.fullmatch(ended[0]):
        return _of_status(run, notes, int(ended[0]), cancelled=cancelled)
    if ended == (HUNG,):
        return Outcome(FAILED)
    # What Slurm has started again had not completed: its ranks' last records may be of the start before.
    is_over = not (cancelled and ended == (RESTARTED,)) and _all_ranks_ended(run, notes.raw_id, ranks)
    if is_over:  # but for what came later: a crash as the interpreter ended
        failed = failures.last_record_ns(run, notes.raw_id, since_restart=notes.restarts) is not None
        return Outcome(FAILED if failed else COMPLETED)
    if cancelled and ended != ("stopped",):
        return Outcome(CANCELLED)
    return _by_failures(run, notes.raw_id, ended)


def _of_status(run: RunDir, notes: JobNotes, status: int, *, cancelled: bool) -> Outcome:
    if status == 0:
        failed = failures.last_record_ns(run, notes.raw_id, since_restart=notes.restarts) is not None
        return Outcome(FAILED) if failed else Outcome(COMPLETED, 0)
    return Outcome(CANCELLED if cancelled else FAILED, status)


def _all_ranks_ended(run: RunDir, raw_id: str, ranks: int | None) -> bool:
    """Whether the last record of each rank is that of its end. ``ranks``: as in :func:`outcome_of`."""
    mine = [each for each in progress_of(run).values() if each.job_id == raw_id]
    return bool(mine) and all(each.ended for each in mine) and ranks in {None, len(mine)}


def _by_failures(run: RunDir, raw_id: str, ended: Sequence[str]) -> Outcome | None:
    """``ended``: the last line of the script, which tells no end of the job; empty if there is none."""
    failed_ns = failures.last_record_ns(run, raw_id)
    if ended and ended[0] in _WITHOUT_AN_END:
        failed_since = failed_ns is not None and failed_ns > _written_ns(run)
        return Outcome(FAILED) if failed_since else _WITHOUT_AN_END[ended[0]]
    return None if failed_ns is None else Outcome(FAILED)


def newest_outcome(run: RunDir) -> Outcome | None:
    """How the job that ran last in this directory ended; None if nothing tells."""
    job_id = _newest_job(run)
    return None if job_id is None else outcome_of(run, job_id)


def states_of_points(
    ledger: Ledger, active: Collection[str], ended: Mapping[str, str] = MappingProxyType({})
) -> dict[int, str]:
    """``COMPLETED``, ``FAILED`` or ``ACTIVE`` of each point of a sweep, by index.

    ``active``: the tasks that Slurm still has in its queue; ``ended``: its word of how others ended. A point outside of
    the queue failed unless it is known to have completed, and Slurm says nothing else: a task that was killed with its
    script leaves nothing, and one that stopped is to go on.
    """
    return {point.index: _state_of_point(ledger, point, active, ended) for point in ledger.points}


def _state_of_point(ledger: Ledger, point: LedgerPoint, active: Collection[str], ended: Mapping[str, str]) -> str:
    # A launch that was killed notes no job, of which the point's own folder may tell.
    run = ledger.run(point)
    known = job_ids_of(run, point.tasks) or tuple(job for job, _ in ends_of(run))
    if not known:
        return FAILED
    if known[-1] in active:
        return IN_QUEUE
    told = ended.get(known[-1])
    outcome = outcome_of(run, known[-1]) or (told and Outcome(told))
    return COMPLETED if outcome and outcome.completed and told in {None, COMPLETED} else FAILED


def _newest_job(run: RunDir) -> str | None:
    known = job_ids_of(run) or tuple(job for job, _ in ends_of(run)) or failures.jobs_with_records(run)
    return known[-1] if known else None


def _written_ns(run: RunDir) -> int:
    try:
        return run.exit_status.lstat().st_mtime_ns
    except OSError:
        return 0
