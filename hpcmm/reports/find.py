"""Which reports to read: a run directory, a folder, or any set of report files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, resolved
from hpcmm.runs.run_dir import RUNS, RunDir, SweepDir

PREFERENCE = (".nsys-rep", ".sqlite", ".qdstrm")
"""Of several files of one stem, the earlier kind is tried first; the next one when it cannot be read."""


@dataclass(frozen=True, slots=True)
class ReportSource:
    """One capture, and the files that may hold it, best first."""

    candidates: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The file that stands for the capture in tables."""
        return self.candidates[0]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """Size of the largest file of the capture; 0 where it cannot be told."""
        try:
            return max(candidate.stat().st_size for candidate in self.candidates)
        except OSError:
            return 0


@dataclass(frozen=True, slots=True)
class Found:
    """What the paths on the command line lead to."""

    sources: tuple[ReportSource, ...]
    run_dir: RunDir | None


def find_reports(paths: Sequence[Path]) -> Found:
    """Captures under ``paths``, sorted by path, and the run directory when exactly one was named.

    Raises HpcmmError for a path that is not there, a file that is no report, or the folder of a sweep.
    """
    files: list[Path] = []
    run_dirs: list[RunDir] = []
    for path in paths:
        if path.is_dir():
            run_dir = _as_run_dir(path)
            reports = _reports_in(run_dir.nsys if run_dir is not None else path)
            if not reports and is_regular(SweepDir(path).ledger):
                raise HpcmmError(f"{path} is a sweep: give one of its points, such as {_a_point(path)}.")
            if run_dir is not None:
                run_dirs.append(run_dir)
            files.extend(reports)
        elif path.is_file():
            if path.suffix not in PREFERENCE:
                raise HpcmmError(f"{path} is not an nsys report: expected a file that ends in {', '.join(PREFERENCE)}.")
            files.append(path)
        else:
            raise HpcmmError(
                f"{path} does not exist, and is not a run in {RUNS.absolute()}: "
                "give a run directory or nsys report files."
            )
    return Found(_group(files), run_dirs[0] if len(run_dirs) == 1 else None)


def _as_run_dir(path: Path) -> RunDir | None:
    """``path`` as a run directory, when it holds a run's configuration or its reports folder."""
    run_dir = RunDir(path)
    return run_dir if is_regular(run_dir.config) or run_dir.nsys.is_dir() else None


def _a_point(sweep: Path) -> Path:
    """The first point that has reports, else the first of all."""
    points = (folder for folder in sorted(sweep.iterdir()) if folder.name.isdecimal())
    return next((point for point in points if _reports_in(point / "nsys")), SweepDir(sweep).point(0).root)


def _reports_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # A link that leads nowhere, or whatever else has the name of a report, is one that cannot be read.
    return sorted(child for child in folder.iterdir() if child.suffix in PREFERENCE)


def _group(files: Iterable[Path]) -> tuple[ReportSource, ...]:
    """Files that differ only in kind are the same capture."""
    by_stem: dict[Path, set[Path]] = {}
    for file in files:
        by_stem.setdefault(resolved(file).with_suffix(""), set()).add(file)
    captures = (sorted(group, key=lambda file: PREFERENCE.index(file.suffix)) for group in by_stem.values())
    return tuple(sorted((ReportSource(tuple(group)) for group in captures), key=lambda source: str(source.path)))
