"""Write what an analysis gives so that a file under its final name is always whole, and all of them of one analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hpcmm.analysis import report_inventory
from hpcmm.analysis.compare import Comparison
from hpcmm.analysis.study import Study
from hpcmm.errors import HpcmmError
from hpcmm.files import Content, write_together
from hpcmm.page.gpu_tables import MOST_ROWS, gpu_tables
from hpcmm.page.headlines import (
    alone_line,
    clock_line,
    coverage_line,
    efficiency_line,
    exchanged_line,
    failed_line,
    gpu_line,
    headline,
    late_line,
    lost_heading,
    mesh_line,
    number,
    percent,
    phases_line,
    plain,
    ranges_line,
    seconds,
    steps_line,
    throughput_line,
)
from hpcmm.page.html import page
from hpcmm.page.perfetto import write_trace
from hpcmm.text import printable, visible


def write_all(folder: Path, contents: Mapping[str, Content]) -> None:
    """Make ``folder`` and write all files into it, or none. Raises HpcmmError if that cannot be done."""
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
    kind = pd.StringDtype("pyarrow", na_value=np.nan)  # whatever the table is kept as, a file's text is of one type
    clean = pd.array([printable(str(value)) for value in values] or [""], dtype=kind)
    return pd.Series(clean.take(codes, allow_fill=True), index=texts.index, dtype=kind)


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


MAX_GAPS = 10


def summary(study: Study) -> str:
    """The whole document."""
    rows = study.tables["bottlenecks"]
    lines = (
        *(
            steps_line,
            ranges_line,
            mesh_line,
            throughput_line,
            exchanged_line,
            coverage_line,
            efficiency_line,
            clock_line,
        ),
        *(failed_line, alone_line, phases_line, gpu_line, late_line),
    )
    facts = [line(study) for line in lines]
    parts = [f"# {escape(study.name or 'Analysis')}", f"**{escape(headline(study))}**"]
    if len(rows):
        first = rows.iloc[0]
        parts.append(f"Why: {escape_whole(first['evidence'])}. Try: {code(first['suggestion'])}")
    parts.append("\n".join(f"- {escape_whole(fact)}" for fact in facts if fact))
    if len(rows):
        parts.append(_bottlenecks(rows, study.names, lost_heading(study)))
    for each in gpu_tables(study):
        parts += [f"{each.title}:", table(each.frame.head(MOST_ROWS))]
    gaps = study.tables["coverage"]
    gaps = gaps[gaps["status"] != report_inventory.FOUND]
    if len(gaps):
        gaps = gaps.assign(rank=gaps["rank"].where(gaps["rank"] >= 0))  # the reason names a process of unknown rank
        parts += ["Reports that are not there, or not whole:", table(gaps[["rank", "status", "reason"]].head(MAX_GAPS))]
    parts.append("All tables and the timeline: report.html beside this file.")
    return "\n\n".join(parts) + "\n"


def _bottlenecks(rows: pd.DataFrame, known: Mapping[int, str], lost_heading: str) -> str:
    lines = [
        _line(["#", "cause", lost_heading, "share", "rank", "node", "phase", "confidence", "try"]),
        _line(["---:", "---", "---:", "---:", "---:", "---", "---", "---", "---"]),
    ]
    for row in rows.to_dict("records"):
        lost, share = seconds(float(row["lost_s_per_step"])), percent(float(row["step_share"]))
        rank = "" if pd.isna(row["rank"]) else known.get(int(row["rank"]), str(row["rank"])).removeprefix("rank ")
        names = [escape(rank), *(escape(number(row[key])) for key in ("node", "phase", "confidence"))]
        order, cause = str(row["rank_order"]), escape(row["cause"])
        lines.append(_line([order, cause, lost, share, *names, code(row["suggestion"])]))
    return "\n".join(lines)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table, or a word if there are no rows."""
    if frame.empty:
        return "None."
    header = _line([escape(column) for column in frame.columns])
    rule = _line(["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in frame.dtypes])
    body = [_line([escape(number(value)) for value in row]) for row in frame.astype(object).itertuples(index=False)]
    return "\n".join([header, rule, *body])


def escape(text: object) -> str:
    """``text`` as Markdown that renders as itself: no markup, no HTML, no table cell ends. Foreign text is cut."""
    return escape_whole(plain(text))


def escape_whole(text: object) -> str:
    """As :func:`escape`, for hpcmm's own sentences."""
    escaped = visible(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*[]|_~#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def code(text: object) -> str:
    """``text`` as inline code, or escaped where it holds what code or a table cell cannot."""
    shown = visible(str(text))
    return escape_whole(shown) if set(shown) & set("`|<>&\\") else f"`{shown}`"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """``compare.csv`` and ``compare.parquet`` into ``folder``. Raises HpcmmError if that cannot be done."""
    write_all(folder, table_files({"compare": comparison.table}))
