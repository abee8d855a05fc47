"""Read-only access to an SQLite export whose tables, columns and cell types cannot be relied on."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from hpcmm.errors import HpcmmError
from hpcmm.reports.printable import printable
from hpcmm.reports.sqlite_pages import UnusualTableError, integer_columns

Integers = npt.NDArray[np.int64]

ROWS_PER_FETCH = 100_000
MAX_NAME_LENGTH = 256
"""Characters of a name that are read; longer names come from damaged or hostile reports."""
MAX_NS = 1 << 52
"""Longest capture that is believed: 52 days in nanoseconds. Times beyond it are damage."""


class ReportDatabase:
    """An open export. Use as a context manager. All text comes printable (see :func:`printable`).

    Raises HpcmmError when the file is no SQLite database at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first_ns, self.last_ns = 0, MAX_NS
        """Times outside of these are damage."""
        # immutable: no lock file and no journal beside a file that is not ours.
        uri = f"file:{quote(os.fsencode(path.resolve()))}?mode=ro&immutable=1"
        try:
            self._connection = sqlite3.connect(uri, uri=True)
            self._connection.text_factory = lambda raw: printable(raw.decode("utf-8", "replace"))
            self._columns = self._read_schema()
        except (sqlite3.Error, UnicodeError) as error:
            raise HpcmmError(f"{path} is not a readable SQLite export: {error}.") from error

    @property
    def cut_off(self) -> bool:
        """Whether the file is shorter than its header says; SQLite itself only notices where it reads."""
        with self.path.open("rb") as file:
            header = file.read(100)
        page_bytes = int.from_bytes(header[16:18], "big")
        pages = int.from_bytes(header[28:32], "big")
        return self.path.stat().st_size < pages * (65536 if page_bytes == 1 else page_bytes)

    def __enter__(self) -> ReportDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def _read_schema(self) -> dict[str, frozenset[str]]:
        tables = self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {
            str(name): frozenset(
                str(row[0]) for row in self._connection.execute("SELECT name FROM pragma_table_info(?)", (name,))
            )
            for (name,) in tables
        }

    def has(self, table: str, *columns: str) -> bool:
        """Whether ``table`` exists with all of ``columns``; exports leave out tables without rows."""
        return table in self._columns and self._columns[table].issuperset(columns)

    def strings(self) -> str:
        """What a query joins as ``StringIds``, whose ids a damaged export may hold more than once: one row an id."""
        keys = self.rows("SELECT name FROM pragma_table_info('StringIds') WHERE pk > 0")
        return "StringIds" if keys == [("id",)] else "(SELECT id, value FROM StringIds GROUP BY id) AS StringIds"

    def column(self, table: str, name: str) -> str:
        """``name`` qualified by its table where it exists, else ``NULL``: for a query that bears older schemas."""
        return f'{table}."{name}"' if self.has(table, name) else "NULL"

    def rows(self, query: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """All rows of a small query.

        Raises HpcmmError when the file is damaged where the rows lie.
        """
        try:
            return self._connection.execute(query, parameters).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise HpcmmError(f"{self.path} is damaged: {error}.") from error

    def integers(self, table: str, columns: Sequence[str]) -> Iterator[list[Integers]]:
        """The rows of ``table`` whose ``columns``, all of them there, are integers: pieces of one array a column.

        Raises HpcmmError after the pieces that precede the damage, where the file is damaged.
        """
        layout = self.rows(
            "SELECT name, pk, hidden, (SELECT rootpage FROM sqlite_master WHERE type = 'table' AND name = ?1) "
            "FROM pragma_table_xinfo(?1) ORDER BY cid",
            (table,),
        )
        names = [str(name) for name, _, _, _ in layout]
        plain = not any(key or hidden for _, key, hidden, _ in layout)
        done = 0
        if plain and isinstance(root := layout[0][3], int):
            with suppress(UnusualTableError):
                for values, fine in integer_columns(self.path, root, [names.index(column) for column in columns]):
                    yield [value[fine] for value in values]
                    done += len(fine)
                return
        yield from self._integers_by_query(table, columns, done)

    def _integers_by_query(self, table: str, columns: Sequence[str], skipped: int) -> Iterator[list[Integers]]:
        quoted = [f'"{column}"' for column in columns]
        checks = " AND ".join(f"typeof({column}) = 'integer'" for column in quoted)
        query = f"SELECT {', '.join(quoted)} FROM (SELECT * FROM {table} LIMIT -1 OFFSET ?) WHERE {checks}"  # noqa: S608
        row = np.dtype([(column, np.int64) for column in columns])
        try:
            cursor = self._connection.execute(query, (skipped,))
            while rows := cursor.fetchmany(ROWS_PER_FETCH):
                piece = np.array(rows, dtype=row)
                yield [piece[column] for column in columns]
        except (sqlite3.Error, UnicodeError) as error:
            raise HpcmmError(f"{self.path} is damaged: {error}.") from error
