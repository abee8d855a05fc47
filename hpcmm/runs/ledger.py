"""The ledger of a sweep: every point, where it lies, and the jobs that ran it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.jobs import ACTIVE, array_states

COMPLETED, FAILED, IN_QUEUE = "COMPLETED", "FAILED", "ACTIVE"


@dataclass
class LedgerPoint:
    """One point; its index is that of its array task."""

    index: int
    overrides: list[str]
    run: str
    """Its run directory, relative to the ledger's folder."""
    jobs: list[str] = field(default_factory=list)
    """Ids of the arrays that it was submitted in, the latest last."""

    @property
    def job_id(self) -> str:
        """The latest job, as Slurm names an array's task."""
        return f"{self.jobs[-1]}_{self.index}"


@dataclass
class Ledger:
    """All points of a sweep."""

    sweep: SweepDir
    points: list[LedgerPoint]

    def run(self, point: LedgerPoint) -> RunDir:
        return RunDir(self.sweep.root / point.run)

    def note_array(self, job_id: str, points: Sequence[LedgerPoint]) -> None:
        """Write down, on disk too, that ``points`` were submitted as tasks of array ``job_id``."""
        for point in points:
            point.jobs.append(job_id)
        self.write()

    def write(self) -> None:
        """Replace the file in one step: a reader sees the old one or the new one."""
        fresh = self.sweep.ledger.with_suffix(".part")
        record = {"points": [asdict(point) for point in self.points]}
        fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.sweep.ledger)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other launchers from this sweep. Raises HpcmmError where one is at work on it.

        ``flock`` holds between the login nodes of a shared file system too, where that supports it.
        """
        with self.sweep.lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HpcmmError(
                    f"Points of {self.sweep.root} are being submitted by another launch: wait for it, then try again."
                ) from error
            except OSError:  # a file system without locks; better once more than never
                pass
            yield

    def states(self) -> dict[int, str]:
        """``COMPLETED``, ``FAILED`` or ``ACTIVE`` of each point, by index.

        One question to Slurm for all that it still has in its queue; whether the others completed is read from what
        their batch scripts left. Raises HpcmmError when Slurm does not answer.
        """
        latest = {point.jobs[-1] for point in self.points if point.jobs}
        active = {job_id for job_id, state in array_states(latest).items() if state in ACTIVE}
        return {
            point.index: IN_QUEUE if point.jobs and point.job_id in active else self._ended(point)
            for point in self.points
        }

    def _ended(self, point: LedgerPoint) -> str:
        """By the last line of its job; a task that was killed with its batch script left none."""
        if not point.jobs:
            return FAILED
        status = self.run(point).exit_status
        lines = status.read_text(encoding="ascii", errors="replace").split("\n") if status.is_file() else []
        own = [line for line in lines if line.partition(" ")[0] == point.job_id]
        return COMPLETED if own[-1:] == [f"{point.job_id} 0"] else FAILED


def _is_whole(point: LedgerPoint) -> bool:
    texts = (point.overrides, point.jobs)
    return (
        type(point.index) is int
        and point.run == SweepDir(Path()).point(point.index).root.name
        and all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts)
        and all(job.isdecimal() for job in point.jobs)
    )


def read_ledger(path: Path) -> Ledger:
    """Read a ledger, or that of a sweep's folder. Raises HpcmmError where it is none."""
    file = SweepDir(path).ledger if path.is_dir() else path
    if path.is_dir() and RunDir(path).submission_script.is_file() and not file.exists():
        raise HpcmmError(f"{path} is a single run, and no sweep: launch it again, with the overrides that it had.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        points = [LedgerPoint(**point) for point in record["points"]]
        whole = [point.index for point in points] == [*range(len(points))] and all(map(_is_whole, points))
        foreign = file.stat().st_uid != os.geteuid()
    except OSError as error:
        raise HpcmmError(f"{file} cannot be read ({error.strerror}): give the ledger of a sweep.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HpcmmError(f"{file} is no ledger of a sweep: {error}.") from error
    if foreign:
        raise HpcmmError(f"{file} is another user's, whose scripts would run as you: launch the sweep yourself.")
    if not whole or not points:
        raise HpcmmError(f"{file} is no ledger of a sweep: its points are damaged.")
    return Ledger(SweepDir(Path(os.path.abspath(file)).parent), points)  # noqa: PTH100 -- links stay as they are
