"""What Slurm says of a job: its state while it is queued or runs, its record when it is over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hpcmm.errors import HpcmmError
from hpcmm.slurm.commands import ask

PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ACTIVE = PENDING | {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""States after which another one comes."""

_RECORD_FIELDS = (
    "JobID,JobName,State,ExitCode,DerivedExitCode,Reason,NNodes,NTasks,NodeList,"
    "AllocTRES,Submit,Start,End,ElapsedRaw,MaxRSS"
)


@dataclass(frozen=True)
class QueueState:
    """A job's line in the queue. ``reason`` says why it waits, ``start`` when it is expected to (or did) start."""

    state: str
    reason: str = ""
    start: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def queue_state(job_id: str) -> QueueState:
    """Asks squeue, and sacct where the job has left the queue. Raises HpcmmError when neither answers."""
    listed = ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%T|%r|%S", absent="Invalid job id")
    if listed.strip():
        state, *rest = listed.strip().splitlines()[0].split("|", 2)
        if len(rest) != 2:
            raise HpcmmError(
                f"squeue answered {listed.strip()[:80]!r}, which is no state; the job itself is not affected."
            )
        return QueueState(state, *rest)
    records = job_records(job_id)
    if not records:
        raise HpcmmError(f"Neither squeue nor sacct knows job {job_id}: was it of another cluster, or too long ago?")
    return QueueState(records[0]["State"].split()[0])


def array_states(job_ids: Iterable[str]) -> dict[str, str]:
    """States of the array tasks that Slurm has in its queue, by ``job_task``; one question for all arrays.

    Tasks that have left the queue are not in it. Raises HpcmmError when squeue does not answer.
    """
    wanted = ",".join(sorted(job_ids))
    if not wanted:
        return {}
    listed = ask(
        "squeue", "--noheader", "--array", "--states=all", f"--jobs={wanted}", "--format=%i|%T", absent="Invalid job id"
    )
    return dict(line.strip().split("|", 1) for line in listed.splitlines() if "|" in line)


def job_records(job_id: str) -> list[dict[str, str]]:
    """sacct's records: of the job first, then of its steps. Keys are sacct's names of the fields."""
    listed = ask("sacct", "--parsable2", "--delimiter=\t", f"--jobs={job_id}", f"--format={_RECORD_FIELDS}")
    names, *rows = [line.split("\t") for line in listed.splitlines()] or [[]]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
