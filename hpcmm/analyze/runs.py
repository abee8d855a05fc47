"""Runs as a comparison needs them: from reports, or from the tables that an earlier analysis wrote."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from hpcmm.analysis.compare import Comparison, RunTables
from hpcmm.analysis.compare import compare as compare_tables
from hpcmm.analysis.pop_metrics import EFFICIENCIES, STEP, Reference, samples_per_step
from hpcmm.analysis.study import Study, usual_reason, why_failed
from hpcmm.analyze.analysis import Analysis, Paths, analyze, as_paths
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, open_regular, resolved
from hpcmm.reports.find import find_reports
from hpcmm.reports.report import Progress
from hpcmm.reports.run_record import read_run_record
from hpcmm.runs.run_dir import RunDir
from hpcmm.text import listed

_NUMBERS = {
    "efficiency": ("step", *EFFICIENCIES),
    "steps": ("rank", "step", "start_s", "duration_s"),
    "phases": ("rank", "step", "useful_s", "wait_s", "transfer_s"),
    "delays": ("rank", "step", "lost_s"),
    "bottlenecks": ("rank", "lost_s_per_step"),
}
"""The tables that are compared, and their columns of numbers ..."""
_TEXTS = {
    "efficiency": ("scope",),
    "steps": ("node",),
    "phases": ("phase", "within"),
    "delays": ("node", "phase"),
    "bottlenecks": ("cause", "phase", "node"),
    "coverage": ("reason", "report"),
}
"""... and of text."""
_MOST_ROWS, _MOST_COLUMNS, _MOST_BYTES = 10_000_000, 100, 1 << 29
"""Of a table once it is read; a small file may stand for a much larger one."""
_MOST_BYTES_OF_CSV = 1 << 26
_LONG_LINE = re.compile(rb"[^\n]{65536}")
_ROWS_PER_PIECE = 1 << 16
_LONGEST_REASON = 600
_TOO_LARGE = "it is larger than an analysis writes"


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
        raise replace(tables, name=f"the reference run {tables.name}").without_steps("")
    return reference


def read_run(run: Paths | Analysis, progress: Progress | None = None) -> RunTables:
    """The tables of ``run``; its reports are read afresh if it has any."""
    if isinstance(run, Analysis):
        return _tables_of(run, "the run")
    paths = as_paths(run)
    folder = _tables_folder(paths)
    if folder is not None:
        return _written(folder)
    return _tables_of(analyze(paths, progress=progress), ", ".join(map(str, paths)))


def _tables_of(run: Analysis, name: str) -> RunTables:
    made, why = run.made, ""
    if isinstance(made, Study) and made.failed_before_steps:
        why = why_failed(made.failed_run)
    elif isinstance(made, Study) and not any(len(trace.steps) for trace in made.traces):
        why = _what_gives_steps(run.tables["coverage"], made.line_to_add)
    return RunTables(run.name or name, run.tables, run.config, why)


def _what_gives_steps(coverage: pd.DataFrame, line_to_add: str = "") -> str:
    """Of a run without steps, from the reasons in its table ``coverage``; empty if there is none."""
    why = usual_reason(coverage)[:_LONGEST_REASON]
    if "--steps" in why:
        why += ". Analyse such runs with --steps REGEX --out DIR, a folder each, and name these folders here"
    return f"{why}.{f' The line to add: {line_to_add}' if line_to_add else ''}" if why else ""


def _tables_folder(paths: Sequence[Path]) -> Path | None:
    """The folder of an earlier analysis: named itself, or that of a run directory whose reports are gone."""
    if len(paths) != 1 or not paths[0].is_dir():
        return None
    if file_of(paths[0], "efficiency") is not None:
        return paths[0]
    analysis = RunDir(paths[0]).analysis
    gone = file_of(analysis, "efficiency") is not None and not find_reports(paths).sources
    return analysis if gone else None


def file_of(folder: Path, table: str) -> Path | None:
    """The file of a table that an analysis wrote into this folder; None if there is none."""
    candidates = (folder / f"{table}.parquet", folder / f"{table}.csv")
    return next((path for path in candidates if is_regular(path)), None)


_WHICH_REPORTS = ["report", "events", "span_s"]
"""Columns of ``coverage`` that tell whether two analyses are of the same reports."""


def written_before(folder: Path, names: Iterable[str]) -> pd.DataFrame | None:
    """Which reports the analysis in ``folder`` is of that is there before the tables ``names`` are written; None if
    none is. Empty if it does not tell."""
    if not any(file_of(folder, name) is not None for name in names):
        return None
    try:
        return _read(folder, "coverage")[_WHICH_REPORTS]
    except (HpcmmError, KeyError):
        return pd.DataFrame(columns=_WHICH_REPORTS)


def replaced_in_words(before: pd.DataFrame | None, coverage: pd.DataFrame | None, folder: Path) -> str:
    """That an analysis of other reports was in ``folder``; empty if there was none, or one of the same.

    ``before`` is what :func:`written_before` gives, ``coverage`` the new table, None if only others were written.
    """
    if before is None or (coverage is not None and _are_alike(before, coverage[_WHICH_REPORTS])):
        return ""
    reports = sorted(set(before["report"].fillna("").astype(str)) - {""})
    whose = f" of {listed(reports)}" if reports else ""
    replaced = "is replaced" if coverage is not None else "those of its tables that were written again are replaced"
    return f"An earlier analysis{whose} was in {folder}, and {replaced}: --out DIR gives each a folder of its own."


def _are_alike(before: pd.DataFrame, after: pd.DataFrame) -> bool:
    """Whether two analyses are of the same reports, as far as their names, events and lengths tell."""
    try:
        told = [
            sorted((report, float(events), round(float(span_s), 6)) for report, events, span_s in rows)
            for rows in (frame.fillna({"report": ""}).fillna(0).itertuples(index=False) for frame in (before, after))
        ]
    except (TypeError, ValueError):  # anyone may have edited a table
        return False
    return told[0] == told[1]


def _written(folder: Path) -> RunTables:
    run_dir = RunDir(resolved(folder).parent)
    record = read_run_record(run_dir if is_regular(run_dir.config) else None)
    tables = {name: _read(folder, name) for name in _NUMBERS}
    is_lacking = tables["steps"].empty and file_of(folder, "coverage") is not None
    why = _what_gives_steps(_read(folder, "coverage")) if is_lacking else ""
    return RunTables(record.name or str(folder), tables, record.config, why)


def _read(folder: Path, table: str) -> pd.DataFrame:
    path = file_of(folder, table)
    if path is None:
        raise HpcmmError(f"{folder} has no table {table}: analyse the run again.")
    try:
        with open_regular(path, within=folder) as file:
            read = _parquet(file) if path.suffix == ".parquet" else _csv(file)
    except (OSError, ValueError, KeyError) as error:  # what pyarrow and pandas raise for a damaged file
        raise HpcmmError(f"{path} cannot be read ({error}): analyse the run again.") from error
    wrong = _wrong_column(read, _NUMBERS.get(table, ()), _TEXTS[table])
    if wrong:
        raise HpcmmError(f"{path} is not what an analysis writes ({wrong}): analyse the run again.")
    return read


def _parquet(file: IO[bytes]) -> pd.DataFrame:
    """Raises ValueError if the table is damaged or too large, and OSError."""
    import pyarrow as pa  # noqa: PLC0415 -- 0.1 s, for a comparison alone

    try:
        return _in_pieces(file)
    except pa.ArrowException as error:  # not all of its kinds are errors of value
        raise ValueError(str(error)) from error


def _in_pieces(file: IO[bytes]) -> pd.DataFrame:
    """The table, so that no more is in memory than was asked for. Raises what pyarrow does, and ValueError."""
    import pyarrow as pa  # noqa: PLC0415 -- as above
    from pyarrow import parquet  # noqa: PLC0415

    opened = parquet.ParquetFile(file)
    facts, schema = opened.metadata, opened.schema_arrow
    groups = [facts.row_group(index).total_byte_size for index in range(facts.num_row_groups)]
    if facts.num_rows > _MOST_ROWS or facts.num_columns > _MOST_COLUMNS or sum(groups) > _MOST_BYTES:
        raise ValueError(_TOO_LARGE)
    texts = [field.name for field in schema if _is_text(field.type)]
    if any(field.name not in texts and not _is_number(field.type) for field in schema):
        raise ValueError("it has columns of other types")
    # A text that stands in each of many rows is there once.
    opened = parquet.ParquetFile(file, read_dictionary=texts)
    pieces: list[pa.RecordBatch] = []
    size = rows = 0
    for piece in opened.iter_batches(batch_size=_ROWS_PER_PIECE):
        size, rows = size + piece.nbytes, rows + piece.num_rows
        if size > _MOST_BYTES or rows > _MOST_ROWS:
            raise ValueError(_TOO_LARGE)
        pieces.append(piece)
    frame: pd.DataFrame = pa.Table.from_batches(pieces, opened.schema_arrow).to_pandas()
    if size + sum(_length(frame[name]) for name in texts) > _MOST_BYTES:
        raise ValueError(_TOO_LARGE)
    return frame.assign(**{name: _text(frame[name]) for name in texts})


def _length(column: pd.Series[Any]) -> int:
    """Of all texts of a column, each of which is there once, as a category."""
    lengths, codes = column.cat.categories.str.len().to_numpy(np.int64), column.cat.codes.to_numpy()
    return int(lengths[codes[codes >= 0]].sum())


def _text(column: pd.Series[Any]) -> pd.Series[str]:
    texts = column.cat.categories.astype("str").array.take(column.cat.codes.to_numpy(), allow_fill=True)
    return pd.Series(texts, index=column.index, dtype="str")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa  # noqa: PLC0415 -- as above

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415 -- as above

    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(is_one(kind) for is_one in kinds)


def _csv(file: IO[bytes]) -> pd.DataFrame:
    """A table of at most so many bytes. Raises what pandas does, and ValueError."""
    content = file.read(_MOST_BYTES_OF_CSV + 1)
    if len(content) > _MOST_BYTES_OF_CSV or _LONG_LINE.search(content):
        raise ValueError(_TOO_LARGE)
    read = pd.read_csv(io.BytesIO(content), nrows=_MOST_ROWS + 1)
    if len(read) > _MOST_ROWS:
        raise ValueError(_TOO_LARGE)
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
