"""The ledger of a sweep: every point, where it lies, and the jobs that ran it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, read_json_object, read_text, write_json
from hpcmm.runs.ownership import is_link, require_mine
from hpcmm.runs.run_dir import JOB_ID, RunDir, SweepDir

_MOST_BYTES = 1 << 26
"""Of a ledger; a larger one is damaged."""


@dataclass
class LedgerPoint:
    """One point."""

    index: int
    overrides: list[str]
    run: str
    """Its run directory, relative to the ledger's folder."""
    jobs: list[str] = field(default_factory=list)
    """Its jobs, the latest last: an array's number (``12``) if its task has the point's index, else ``12_3``."""

    @property
    def tasks(self) -> list[str]:
        """Its jobs, the latest last, as Slurm names an array's tasks."""
        return [_task_name(job, self.index) for job in self.jobs]

    @property
    def job_id(self) -> str:
        """The latest job, as Slurm names an array's task."""
        return _task_name(self.jobs[-1], self.index)


@dataclass
class RefusedEntry:
    """A point that was asked for and cannot run."""

    overrides: list[str]
    reason: str


@dataclass
class Ledger:
    """All points of a sweep."""

    sweep: SweepDir
    points: list[LedgerPoint]
    refused: list[RefusedEntry] = field(default_factory=list)
    lock: int | None = None
    """The descriptor that keeps other launchers out, while this one does; for sbatch to hold it too."""

    def run(self, point: LedgerPoint) -> RunDir:
        return RunDir(self.sweep.root / point.run)

    def note_array(self, job_id: str, points: Sequence[LedgerPoint], first: int = 0) -> None:
        """Write down, on disk too, that ``points`` were submitted in array ``job_id``, whose task 0 is ``first``."""
        for point in points:
            point.jobs.append(f"{job_id}_{point.index - first}" if first else job_id)
        self.write()
        self.note_sbatch(runs=False)

    def write(self) -> None:
        """Replace the file in one step: a reader sees the old one or the new one."""
        refused = {"refused": [asdict(each) for each in self.refused]} if self.refused else {}
        write_json(self.sweep.ledger, {"points": [asdict(point) for point in self.points], **refused}, indent=1)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other launchers from this sweep. Raises HpcmmError if one is at work on it.

        ``flock`` holds between the login nodes of a shared file system too, if that supports it. Gives the descriptor
        that holds it: a command that inherits it keeps others out for as long as it runs, whatever becomes of us.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.sweep.lock, flags, 0o600), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HpcmmError(
                    f"Points of {self.sweep.root} are being submitted by another launch: wait for it, then try again."
                ) from error
            except OSError:  # a file system without locks; better once more than never
                pass
            yield lock.fileno()

    def note_sbatch(self, *, runs: bool) -> None:
        """Leave a mark beside the lock while a job may be queued that is not noted yet; it stays if we are killed."""
        if self.lock is not None:
            with suppress(OSError):  # a full disk, which is told when the job is noted
                os.ftruncate(self.lock, 1 if runs else 0)

    def newest_arrays(self) -> set[str]:
        """Ids of the arrays that points were last submitted in, to ask Slurm for."""
        return {array_of(point.jobs[-1]) for point in self.points if point.jobs}


def array_of(job_id: str) -> str:
    """The number of the array that a task belongs to; of any other job its own."""
    return job_id.partition("_")[0]


def _task_name(job: str, index: int) -> str:
    """A job of point ``index`` as Slurm names it."""
    return job if "_" in job else f"{job}_{index}"


def _is_whole(point: LedgerPoint) -> bool:
    texts = (point.overrides, point.jobs)
    return (
        type(point.index) is int
        and point.run == SweepDir(Path()).point(point.index).root.name
        and all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts)
        and all(JOB_ID.fullmatch(job) for job in point.jobs)
    )


def jobs_of_points(sweep: SweepDir) -> dict[int, list[str]]:
    """Tasks (``12_3``) of each point, the latest last, by index; of whoever's ledger, without what is damaged."""
    points = read_json_object(sweep.ledger, _MOST_BYTES, within=sweep.root).get("points")
    found = {}
    for point in points if isinstance(points, list) else []:
        index, jobs = (point.get("index"), point.get("jobs")) if isinstance(point, dict) else (None, None)
        if type(index) is int and index >= 0 and isinstance(jobs, list):
            whole = [job for job in jobs if isinstance(job, str) and JOB_ID.fullmatch(job)]
            found[index] = [_task_name(job, index) for job in whole]
    return found


def overrides_of(sweep: SweepDir) -> dict[int, str]:
    """The values of each point, as ``train.seed=1, task.args=[a,b]``, by index; of whoever's ledger, without damage."""
    points = read_json_object(sweep.ledger, _MOST_BYTES, within=sweep.root).get("points")
    found = {}
    for point in points if isinstance(points, list) else []:
        index, given = (point.get("index"), point.get("overrides")) if isinstance(point, dict) else (None, None)
        if type(index) is int and isinstance(given, list):
            found[index] = ", ".join(each for each in given if isinstance(each, str))
    return found


def refused_of(sweep: SweepDir) -> list[tuple[str, str]]:
    """Values and reason of each point that cannot run; of whoever's ledger, without damage."""
    entries = read_json_object(sweep.ledger, _MOST_BYTES, within=sweep.root).get("refused")
    found = []
    for each in entries if isinstance(entries, list) else []:
        given, reason = (each.get("overrides"), each.get("reason")) if isinstance(each, dict) else (None, None)
        if isinstance(given, list) and isinstance(reason, str):
            found.append((", ".join(word for word in given if isinstance(word, str)), reason))
    return found


def arrays_of(jobs: Mapping[int, Sequence[str]]) -> list[str]:
    """Numbers of the arrays that these tasks of points belong to, the latest last."""
    places: dict[str, int] = {}
    for tasks in jobs.values():
        for place, task in enumerate(tasks):
            places[array_of(task)] = max(place, places.get(array_of(task), 0))
    return sorted(places, key=places.__getitem__)


def read_ledger(path: Path) -> Ledger:
    """Read a ledger, or that of a sweep's folder. Raises HpcmmError if it is none, or another user's."""
    is_folder = path.is_dir()
    named = SweepDir(path).ledger if is_folder else path
    root = require_mine(named.parent, "launch the sweep yourself, for its scripts would run as you")
    file = root / named.name
    if is_link(file):
        raise HpcmmError(f"{file} is a link, which may lead to another sweep's ledger: give the sweep's own folder.")
    if is_folder and is_regular(RunDir(root).submission_script) and not file.exists():
        raise HpcmmError(f"{path} is a single run, and no sweep: launch it again, with the overrides that it had.")
    try:
        record = json.loads(read_text(file, _MOST_BYTES, within=root))
        points = [LedgerPoint(**point) for point in record["points"]]
        refused = [RefusedEntry(**each) for each in record.get("refused", [])]
        whole = [point.index for point in points] == [*range(len(points))] and all(map(_is_whole, points))
    except OSError as error:
        raise HpcmmError(f"{file} cannot be read ({error.strerror}): give the ledger of a sweep.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HpcmmError(f"{file} is no ledger of a sweep: {error}.") from error
    if not whole or not points:
        raise HpcmmError(f"{file} is no ledger of a sweep: its points are damaged.")
    return Ledger(SweepDir(root), points, refused)
