"""Runs as a comparison needs them: from reports, or from the tables that an earlier analysis wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hpcmm.analysis.compare import Comparison, RunTables
from hpcmm.analysis.compare import compare as compare_tables
from hpcmm.analysis.pop_metrics import EFFICIENCIES, STEP, Reference, samples_per_step
from hpcmm.analyze.analysis import Analysis, Paths, analyze, as_paths
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular
from hpcmm.reports.find import find_reports
from hpcmm.reports.report import Progress
from hpcmm.reports.run_record import read_run_record
from hpcmm.runs.run_dir import RunDir

_NUMBERS = {
    "efficiency": ("step", *EFFICIENCIES),
    "steps": ("rank", "step", "duration_s"),
    "phases": ("step", "useful_s", "wait_s", "transfer_s"),
    "delays": ("rank", "step", "lost_s"),
    "bottlenecks": ("rank",),
}
"""The tables that are compared, and their columns of numbers ..."""
_TEXTS = {
    "efficiency": ("scope",),
    "steps": ("node",),
    "phases": ("phase", "within"),
    "delays": ("node", "phase"),
    "bottlenecks": ("cause", "phase", "node"),
}
"""... and of text."""


def compare(run_a: Paths | Analysis, run_b: Paths | Analysis, *, progress: Progress | None = None) -> Comparison:
    """What got better or worse from ``run_a`` to ``run_b``.

    Each is an analysis, a run directory, reports, or the folder of tables that an analysis wrote.

    Raises HpcmmError when one of them has nothing to compare.
    """
    return compare_tables(read_run(run_a, progress), read_run(run_b, progress))


def read_reference(run: Paths | Analysis, *, progress: Progress | None = None) -> Reference:
    """The reference that computation scaling of another run is against.

    Raises HpcmmError when it has no steps.
    """
    tables = read_run(run, progress)
    reference = Reference.of(tables.tables["efficiency"], samples_per_step(tables.config))
    if reference is None:
        raise HpcmmError(f"the reference run {tables.name} has no steps: only annotated steps after the first count.")
    return reference


def read_run(run: Paths | Analysis, progress: Progress | None = None) -> RunTables:
    """The tables of ``run``; its reports are read afresh if it has any."""
    if isinstance(run, Analysis):
        return RunTables(run.name or "the run", run.tables, run.config)
    paths = as_paths(run)
    folder = _tables_folder(paths)
    if folder is not None:
        return _written(folder)
    analysis = analyze(paths, progress=progress)
    return RunTables(analysis.name or ", ".join(map(str, paths)), analysis.tables, analysis.config)


def _tables_folder(paths: Sequence[Path]) -> Path | None:
    """The folder of an earlier analysis: named itself, or that of a run directory whose reports are gone."""
    if len(paths) != 1 or not paths[0].is_dir():
        return None
    if _file(paths[0], "efficiency") is not None:
        return paths[0]
    analysis = RunDir(paths[0]).analysis
    gone = _file(analysis, "efficiency") is not None and not find_reports(paths).sources
    return analysis if gone else None


def _file(folder: Path, table: str) -> Path | None:
    candidates = (folder / f"{table}.parquet", folder / f"{table}.csv")
    return next((path for path in candidates if path.is_file()), None)


def _written(folder: Path) -> RunTables:
    run_dir = RunDir(folder.resolve().parent)
    record = read_run_record(run_dir if is_regular(run_dir.config) else None)
    return RunTables(record.name or str(folder), {name: _read(folder, name) for name in _NUMBERS}, record.config)


def _read(folder: Path, table: str) -> pd.DataFrame:
    path = _file(folder, table)
    if path is None:
        raise HpcmmError(f"{folder} has no table {table}: analyse the run again.")
    try:
        read = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError, KeyError) as error:  # what pyarrow and pandas raise for a damaged file
        raise HpcmmError(f"{path} cannot be read ({error}): analyse the run again.") from error
    wrong = _wrong_column(read, _NUMBERS[table], _TEXTS[table])
    if wrong:
        raise HpcmmError(f"{path} is not what an analysis writes ({wrong}): analyse the run again.")
    return read


def _wrong_column(read: pd.DataFrame, numbers: Sequence[str], texts: Sequence[str]) -> str:
    """What is wrong with a table that anyone may have edited; empty if nothing is."""
    lacking = [name for name in (*numbers, *texts) if name not in read]
    if lacking:
        return f"no column {lacking[0]}"
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(read[name]) and read[name].notna().any():
            return f"{name} is no number"
        if np.isinf(read[name].to_numpy(np.float64, na_value=np.nan)).any():
            return f"{name} is infinite"
    if "scope" in read:
        steps = read.loc[read["scope"] == STEP, "step"]
        if steps.isna().any() or steps.duplicated().any():
            return "its steps are not numbered"
    return ""
