"""Inputs of the tests beside it, and variations of them."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from hpcmm.analyze import Analysis

INPUTS = Path(__file__).parent / "inputs"
LOADING = ("data loading", 1, "data", 0.04)
"""The first row of inputs ``steps_*``, as :func:`first` gives it."""
STEPS = "textId IN (SELECT id FROM StringIds WHERE value LIKE 'training_step%')"
"""Their steps, in SQL."""


def first(analysis: Analysis) -> tuple[str, int, str, float]:
    row = analysis.bottlenecks().iloc[0]
    return str(row["cause"]), int(row["rank"]), str(row["phase"]), round(float(row["lost_s_per_step"]), 4)


def changed(folder: Path, source: str, *statements: str, only: str = "*") -> Path:
    """A copy of an input after SQL has been run on its exports."""
    copy = folder / source
    shutil.copytree(INPUTS / source, copy)
    for report in copy.glob(f"{only}.sqlite"):
        with closing(sqlite3.connect(report)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
    return copy
