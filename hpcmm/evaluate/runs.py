"""Which runs to score: run directories as they are, and the points of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.runs.ledger import LedgerPoint, read_ledger
from hpcmm.runs.run_dir import RunDir, SweepDir, path_or_run

_SEED = "train.seed="
"""It has a column of its own."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run to score. ``settings`` are a sweep's overrides that set its model apart."""

    run: RunDir
    settings: tuple[str, ...] = ()


def find_runs(paths: Sequence[Path], named_by: Sequence[str] = ()) -> tuple[list[Candidate], list[RunDir]]:
    """Run directories, runs' names, sweep folders, ledgers: to runs with a checkpoint, and the points without one.

    ``named_by`` are beginnings of overrides that a model's own name tells: they are no further settings. Raises
    HpcmmError where a path is none of these, or no run is left.
    """
    found: list[Candidate] = []
    unfinished: list[RunDir] = []
    for path in map(path_or_run, paths):
        if not _is_sweep(path):
            found.append(Candidate(RunDir(path.resolve())))
            continue
        for candidate in _points(path, (_SEED, *named_by)):
            if candidate.run.has_checkpoint():
                found.append(candidate)
            else:
                unfinished.append(candidate.run)
    if not found:
        raise HpcmmError(f"No point of {', '.join(map(str, paths))} has a finished checkpoint: has it trained?")
    return found, unfinished


def _is_sweep(path: Path) -> bool:
    return path.is_file() or SweepDir(path).ledger.is_file()


def _points(path: Path, named_otherwise: tuple[str, ...]) -> Iterator[Candidate]:
    ledger = read_ledger(path.resolve())
    for point in ledger.points:
        yield Candidate(ledger.run(point), _settings(point, named_otherwise))


def _settings(point: LedgerPoint, named_otherwise: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(override for override in point.overrides if not override.startswith(named_otherwise))
