"""Tables as the page shows them: few rows, units in the column names as in the CSV files."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import number, plain

MAX_ROWS = 300
"""Rows of a table on the page; the CSV holds all."""


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table as the template draws it."""

    title: str
    note: str
    columns: list[tuple[str, bool]]
    """Name, and whether its cells are numbers."""
    rows: list[list[str]]
    left_out: int
    file: str


def clock(study: Study) -> PageTable:
    """Offset, drift and error of each node."""
    return _table("Clocks", "Each node's clock against the first node's.", study.tables["clock"], "clock")


def folded(study: Study) -> list[PageTable]:
    """The tables at the page's end."""
    tables = study.tables
    osrt = tables["osrt"]
    return [
        _table("Coverage", "Every expected rank and every report.", tables["coverage"], "coverage"),
        _table("Waiting for communication", "Seconds a step by rank and phase.", tables["comm_wait"], "comm_wait"),
        _table("Start", "From the job's start to its first step, by part.", tables["startup"], "startup"),
        _table("Waits for child processes", "Coalesced into windows.", tables["waitpid_windows"], "waitpid_windows"),
        _table(
            "OS calls of the step threads",
            "Those with the most time within steps first.",
            osrt[osrt["thread_role"] == "step"].sort_values("in_step_s", ascending=False),
            "osrt",
        ),
    ]


def _table(title: str, note: str, frame: pd.DataFrame, name: str) -> PageTable:
    columns = [(plain(column), pd.api.types.is_numeric_dtype(kind)) for column, kind in frame.dtypes.items()]
    cells = frame.head(MAX_ROWS).astype(object).itertuples(index=False)
    rows = [[number(value) for value in row] for row in cells]
    return PageTable(title, note, columns, rows, max(0, len(frame) - MAX_ROWS), f"{name}.csv")
