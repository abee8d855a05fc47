"""Everything that an analysis writes: its tables, a summary, the page and a trace."""

from __future__ import annotations

from pathlib import Path

from hpcmm.analysis.pipeline import Study
from hpcmm.page.atomic_write import Content, table_files, write_all
from hpcmm.page.html import page
from hpcmm.page.markdown import summary
from hpcmm.page.perfetto import write_trace


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
