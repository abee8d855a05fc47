"""Inputs of the tests beside it, and variations of them."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"


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
