"""What was read of each expected rank, and how well the nodes' clocks agree: how far the page can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hpcmm.analysis import report_inventory
from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import number, plain, rank_name

MAX_TILES = 2048
MAX_TROUBLES = 50
_GRADES = {report_inventory.FOUND: "good", report_inventory.NOT_PROFILED: "none", report_inventory.TRUNCATED: "fair"}


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the coverage table: ``grade`` is its colour, ``mark`` the same in a character."""

    grade: str
    mark: str
    title: str


@dataclass(frozen=True, slots=True)
class CoverageGrid:
    """A tile a row, the rows that something is wrong with as (who, status, reason), and how many more there are."""

    tiles: list[Tile]
    troubles: list[tuple[str, str, str]]
    more_troubles: int
    statuses: list[tuple[str, str, str]]
    """(grade, status, count)."""


def coverage_grid(study: Study) -> CoverageGrid:
    """The ledger as tiles and sentences."""
    table = study.tables["coverage"]
    records = table.to_dict("records")
    troubled = [row for row in records if row["reason"] and row["status"] != report_inventory.NOT_PROFILED]
    counts = table["status"].value_counts()
    return CoverageGrid(
        tiles=[_tile(row) for row in records[:MAX_TILES]],
        troubles=[(_who(row), _status(row), plain(row["reason"])) for row in troubled[:MAX_TROUBLES]],
        more_troubles=max(0, len(troubled) - MAX_TROUBLES),
        statuses=[
            (_grade(str(status)), str(status).replace("_", " "), number(int(count))) for status, count in counts.items()
        ],
    )


def _grade(status: str) -> str:
    return _GRADES.get(status, "poor")


def _tile(row: dict[object, object]) -> Tile:
    grade = _grade(str(row["status"]))
    mark = {"good": "", "none": "-", "fair": "~", "poor": "x"}[grade]
    reason = f": {plain(row['reason'])}" if row["reason"] else ""
    return Tile(grade, mark, f"{_who(row)}: {_status(row)}{reason}")


def _who(row: dict[object, object]) -> str:
    rank = row["rank"]
    if isinstance(rank, int) and rank >= 0 and not pd.isna(rank):
        return rank_name(rank, str(row["node"] or ""))
    return plain(row["report"])


def _status(row: dict[object, object]) -> str:
    return plain(row["status"]).replace("_", " ")
