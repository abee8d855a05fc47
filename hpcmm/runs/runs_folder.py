"""A folder of runs, and the run in it that a name means."""

from __future__ import annotations

from pathlib import Path

from hpcmm.runs.run_dir import RunDir

RUNS = Path("runs")
"""Where runs lie unless a command is told otherwise."""


def is_run(folder: Path) -> bool:
    """Whether this is the directory of a run or the folder of a sweep."""
    try:
        return (folder / "config.yaml").is_file() or (folder / "submission.sh").is_file()
    except OSError:
        return False


def runs_in(runs_root: Path) -> list[RunDir]:
    """The runs in a folder, newest first."""
    try:
        folders = [entry for entry in runs_root.iterdir() if not entry.is_symlink() and is_run(entry)]
    except OSError:
        return []
    return [RunDir(folder.absolute()) for folder in sorted(folders, key=_made_at, reverse=True)]


def path_or_run(given: Path) -> Path:
    """``given`` where that exists, else the run that it names in ``./runs``: whole, or the newest that begins with it.

    What names no run is given back.
    """
    try:
        exists = given.exists() or given.is_symlink()
    except OSError:  # too long for a name
        return given
    if exists or given.is_absolute():
        return given
    if is_run(RUNS / given):
        return RUNS / given
    return next((RUNS / run.root.name for run in runs_in(RUNS) if run.root.name.startswith(f"{given}-")), given)


def _made_at(folder: Path) -> int:
    try:
        return RunDir(folder).submission_script.stat().st_mtime_ns
    except OSError:
        return 0
