"""Write what an analysis gives so that a file under its final name is always whole, and all of them of one analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hpcmm.analysis.pipeline import Study
from hpcmm.errors import HpcmmError
from hpcmm.files import Content, write_together
from hpcmm.page.html import page
from hpcmm.page.markdown import summary
from hpcmm.page.perfetto import write_trace
from hpcmm.text import printable


def write_all(folder: Path, contents: Mapping[str, Content]) -> None:
    """Make ``folder`` and write all files into it, or none. Raises HpcmmError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, contents, mode=0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise HpcmmError(f"{folder} cannot be written (it is not a folder): name another with --out.") from error
    except OSError as error:
        raise HpcmmError(
            f"{folder} cannot be written ({error.strerror}): free some space there, or name another folder with --out."
        ) from error


def table_files(tables: Mapping[str, pd.DataFrame]) -> dict[str, Content]:
    """A CSV and a Parquet file of each table, alike in their values; text is made printable."""
    files: dict[str, Content] = {}
    for name in tables:
        files[f"{name}.csv"] = lambda file, name=name: pa.csv.write_csv(  # type: ignore[misc]
            to_arrow(tables[name]), file, pa.csv.WriteOptions(quoting_header="none")
        )
        files[f"{name}.parquet"] = lambda file, name=name: pa.parquet.write_table(  # type: ignore[misc]
            to_arrow(tables[name]), file
        )
    return files


def to_arrow(table: pd.DataFrame) -> pa.Table:
    """The table without index; control characters in its text are written as their escapes."""
    return pa.Table.from_pandas(
        table.assign(**{str(name): _printable(table[name]) for name in table if table[name].dtype == "str"}),
        preserve_index=False,
    )


def _printable(texts: pd.Series[str]) -> pd.Series[str]:
    codes, values = pd.factorize(texts)
    clean = pd.array([printable(str(value)) for value in values] or [""], dtype="str")
    return pd.Series(clean.take(codes, allow_fill=True), index=texts.index, dtype="str")


def write_outputs(study: Study, folder: Path) -> None:
    """All tables as CSV and Parquet, ``summary.md``, ``report.html`` and ``trace.json.gz`` into ``folder``.

    Raises HpcmmError (a full disk) with the outputs of an earlier analysis left as they were.
    """
    pages: dict[str, Content] = {
        "summary.md": summary(study),
        "report.html": page(study),
        "trace.json.gz": lambda file: write_trace(study, file),
    }
    write_all(folder, table_files(study.tables) | pages)
