"""Pages decoded in bulk against what SQLite itself reads."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.errors import HpcmmError
from hpcmm.reports.sqlite import ReportDatabase, UnusualTableError, integer_columns

EDGES = [0, 1, -1, 127, 128, -129, 32767, 1 << 23, -(1 << 31), 1 << 47, (1 << 63) - 1, -(1 << 63)]
cells = st.one_of(
    st.sampled_from(EDGES),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.none(),
    st.floats(allow_nan=False),
    st.text(max_size=40),
    st.binary(max_size=20),
)


def table(path: Path, rows: list[tuple], *, page_bytes: int = 512, declared: str = "a, b, c") -> int:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript(
            f"PRAGMA page_size = {page_bytes}; PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF"
        )
        connection.execute(f"CREATE TABLE t ({declared})")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master").fetchone()
    connection.close()
    return root


def decoded(path: Path, root: int, columns: list[int]) -> list[tuple[int, ...]]:
    pieces = [
        np.column_stack([value[fine] for value in values]) for values, fine in integer_columns(path, root, columns)
    ]
    return [tuple(row) for piece in pieces for row in piece.tolist()]


def by_database(path: Path, columns: list[str]) -> list[tuple[int, ...]]:
    with ReportDatabase(path) as database:
        return [tuple(row) for piece in database.integers("t", columns) for row in np.column_stack(piece).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pages")


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(cells, cells, cells), max_size=80))
def test_any_rows_are_read_as_sqlite_reads_them(folder: Path, rows) -> None:
    root = table(folder / "any.sqlite", rows)
    wanted = [(row[2], row[0]) for row in rows if all(type(row[index]) is int for index in (0, 2))]
    assert by_database(folder / "any.sqlite", ["c", "a"]) == wanted
    short = all(not isinstance(cell, str | bytes) for row in rows for cell in row)
    if short and rows:
        assert decoded(folder / "any.sqlite", root, [2, 0]) == wanted


@pytest.mark.parametrize("page_bytes", [512, 4096, 65536])
def test_many_rows_over_several_levels_of_pages(tmp_path: Path, page_bytes: int) -> None:
    rows = [(index, index * 7_919_000_000, -index) for index in range(20_000)]
    root = table(tmp_path / "x.sqlite", rows, page_bytes=page_bytes)
    assert decoded(tmp_path / "x.sqlite", root, [0, 1, 2]) == rows


@pytest.mark.parametrize(
    "declared", ["(a INTEGER PRIMARY KEY, b, c)", "(a PRIMARY KEY, b, c) WITHOUT ROWID", "(a, b, c, d AS (a))"]
)
def test_unusual_tables_are_left_to_sqlite(tmp_path: Path, declared: str) -> None:
    rows = [(index, index * 3, index * 5) for index in range(300)]
    path = tmp_path / "x.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE t {declared}")
        connection.executemany("INSERT INTO t (a, b, c) VALUES (?, ?, ?)", rows)
    connection.close()
    assert by_database(path, ["a", "b", "c"]) == rows


def test_a_column_that_was_added_later_is_left_to_sqlite(tmp_path: Path) -> None:
    table(tmp_path / "x.sqlite", [(1, 2, 3)])
    with sqlite3.connect(tmp_path / "x.sqlite") as connection:
        connection.execute("ALTER TABLE t ADD COLUMN d INTEGER DEFAULT 4")
    connection.close()
    assert by_database(tmp_path / "x.sqlite", ["d", "a"]) == [(4, 1)]


def test_rows_that_spill_over_pages_are_read(tmp_path: Path) -> None:
    rows = [(index, "x" * 5000 * (index == 50), index) for index in range(100)]
    root = table(tmp_path / "x.sqlite", rows)
    with pytest.raises(UnusualTableError):
        decoded(tmp_path / "x.sqlite", root, [0, 2])
    assert by_database(tmp_path / "x.sqlite", ["a", "c"]) == [(index, index) for index in range(100)]


WHOLE_ROWS = [(index, index * 7_919_000_000, -index) for index in range(2000)]


@settings(max_examples=40)
@given(at=st.integers(0, 60_000), value=st.integers(0, 255), length=st.integers(1, 600))
def test_damaged_bytes_give_rows_or_an_error_and_nothing_else(folder: Path, at: int, value: int, length: int) -> None:
    whole = folder / "whole.sqlite"
    if not whole.exists():
        table(whole, WHOLE_ROWS)
    content = bytearray(whole.read_bytes())
    at %= len(content)
    content[at : at + length] = bytes([value]) * len(content[at : at + length])
    (folder / "damaged.sqlite").write_bytes(content)
    try:
        rows = by_database(folder / "damaged.sqlite", ["a", "b", "c"])
    except HpcmmError:
        return
    assert all(len(row) == 3 for row in rows)
