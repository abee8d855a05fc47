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
from hpcmm.text import printable

INTERIOR, LEAF = 0x05, 0x0D
FILE_HEADER_BYTES = 100
LONGEST_VALUE = 8
PAGES_PER_PIECE = 256
"""A megabyte: what is worked on fits into a processor's cache."""
INTERIOR_HEADER_BYTES, LEAF_HEADER_BYTES = 12, 8

_VALUE_BYTES = np.array([0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0, *((code - 12) // 2 for code in range(12, 256))])
"""Length of a value by its type code; from 12 on it is text or a blob."""
_SHIFT = np.array([63, 56, 48, 40, 32, 16, *[0] * 250])
"""What to shift eight bytes right by, so that a value of the code's length remains."""
_IS_INTEGER = np.isin(np.arange(256), [1, 2, 3, 4, 5, 6, 8, 9])
_ONE = 9
"""Type code of the integer 1, which takes no bytes."""

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


class UnusualTableError(Exception):
    """The table is not laid out as this module expects; SQLite has to read it."""


def integer_columns(path: Path, root_page: int, columns: Sequence[int]) -> Iterator[tuple[list[Integers], Flags]]:
    """The columns numbered ``columns`` of the table that begins at ``root_page``, in pieces of some ten thousand rows.

    Each piece is a list of arrays, one a column, and an array that is true if all of the row's cells are integers.
    Rows come in the order of their row ids. Raises UnusualTableError, possibly after some pieces.
    """
    page_bytes, usable = _page_bytes(path)
    leaves = _leaves(path, page_bytes, root_page)
    for first in range(0, len(leaves), PAGES_PER_PIECE):
        pages = _read_pages(path, page_bytes, leaves[first : first + PAGES_PER_PIECE])
        yield _decode(pages, usable, columns)


def _page_bytes(path: Path) -> tuple[int, int]:
    """Size of a page, and what of it may hold data."""
    with path.open("rb") as file:
        header = file.read(FILE_HEADER_BYTES)
    if len(header) < FILE_HEADER_BYTES:
        raise UnusualTableError
    size = int.from_bytes(header[16:18], "big")
    size = 65536 if size == 1 else size
    if size < 512 or size & (size - 1):
        raise UnusualTableError
    return size, size - header[20]


def _read_pages(path: Path, page_bytes: int, numbers: Integers) -> Bytes:
    """Pages (counted from 1) as rows."""
    return np.asarray(_mapped(path, page_bytes, numbers)[numbers - 1])


def _mapped(path: Path, page_bytes: int, numbers: Integers) -> Bytes:
    """The file as rows of pages. A new mapping for each use, so that what was read does not stay in this process."""
    count = path.stat().st_size // page_bytes
    if len(numbers) == 0 or numbers.min() < 2 or numbers.max() > count:
        raise UnusualTableError
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(count, page_bytes))


def _big_endian(values: Bytes) -> Integers:
    """Unsigned integers from rows of bytes."""
    number = np.zeros(values.shape[:-1], dtype=np.int64)
    for index in range(values.shape[-1]):
        number = (number << 8) | values[..., index]
    return number


def _cells(pages: Bytes, header_bytes: int) -> tuple[Integers, Integers]:
    """Row of ``pages`` and offset within it of each cell, in key order."""
    page_bytes = pages.shape[1]
    count = _big_endian(pages[:, 3:5])
    if (header_bytes + 2 * count > page_bytes).any():
        raise UnusualTableError
    page = np.repeat(np.arange(len(pages)), count)
    ordinal = np.arange(len(page)) - np.repeat(np.cumsum(count) - count, count)
    # Behind the header lies an array of two-byte offsets, one a cell.
    at = page * page_bytes + header_bytes + 2 * ordinal
    flat = pages.reshape(-1)
    offset = (flat[at].astype(np.int64) << 8) | flat[at + 1]
    if len(offset) and offset.max() > page_bytes - 4:
        raise UnusualTableError
    return page, offset


def _leaves(path: Path, page_bytes: int, root_page: int) -> Integers:
    """Numbers of the leaf pages, in key order. All leaves of a B-tree lie at one depth."""
    # Down from the root, a level at a time. No level has more pages than the file: a damaged one may lead in circles.
    level = np.array([root_page], dtype=np.int64)
    total = path.stat().st_size // page_bytes
    while True:
        if len(level) > total:
            raise UnusualTableError
        kinds = np.concatenate(
            [
                _mapped(path, page_bytes, part)[part - 1, 0]
                for part in np.array_split(level, len(level) // PAGES_PER_PIECE + 1)
            ]
        )
        if (kinds == LEAF).all():
            return level
        if not (kinds == INTERIOR).all():
            raise UnusualTableError
        level = _children(_read_pages(path, page_bytes, level))


def _children(pages: Bytes) -> Integers:
    """Child pages of interior pages: one a cell, and the right-most from the header."""
    page, offset = _cells(pages, INTERIOR_HEADER_BYTES)
    child = _big_endian(pages[page[:, None], offset[:, None] + np.arange(4)])
    right = _big_endian(pages[:, 8:12])
    order = np.argsort(np.concatenate((page, np.arange(len(pages)))), kind="stable")
    return np.concatenate((child, right))[order]


def _after_varint(flat: Bytes, at: Integers) -> Integers:
    """Offsets behind the variable-length integers (of up to nine bytes) at ``at``."""
    end = at + 1
    for _ in range(8):
        more = flat[end - 1] >= 0x80
        if not more.any():
            break
        end += more
    return end


def _lengths(flat: Bytes, at: Integers) -> tuple[Integers, Integers]:
    """Lengths in one or two bytes, and the offsets behind them; a longer length comes out larger than any page."""
    first, second = flat[at].astype(np.int64), flat[at + 1].astype(np.int64)
    is_long = first >= 0x80
    length = np.where(is_long, (first & 0x7F) << 7 | second, first)
    return np.where(is_long & (second >= 0x80), 1 << 32, length), at + 1 + is_long


def _decode(pages: Bytes, usable: int, columns: Sequence[int]) -> tuple[list[Integers], Flags]:
    """Values of ``columns`` in the records of leaf pages, and whether each row has nothing but integers there."""
    page_bytes = pages.shape[1]
    page, offset = _cells(pages, LEAF_HEADER_BYTES)
    # Values are read as eight bytes wherever they end: the buffer needs some behind its last page.
    width = max(columns) + 1
    flat = np.concatenate((pages.reshape(-1), np.zeros(512 + 128 * width, dtype=np.uint8)))
    cell = page * page_bytes + offset
    # A cell is the payload's length, the row id and the record; the record is the length of its header, a type code for
    # each column, and the values in the same order.
    payload, row_id_at = _lengths(flat, cell)
    record = _after_varint(flat, row_id_at)
    header_end = record + flat[record]
    # A record that is too long for its page spills over to others.
    regular = (payload <= usable - 35) & (record + payload <= (page + 1) * page_bytes)
    regular &= (flat[record] > width) & (flat[record] < 0x80) & (header_end <= record + payload)
    eights = np.ndarray((len(flat) - LONGEST_VALUE + 1,), dtype=">i8", buffer=flat.data, strides=(1,))
    found: dict[int, Integers] = {}
    fine = np.ones(len(page), dtype=bool)
    value_at = header_end
    for column in range(width):
        code = flat[record + 1 + column]
        # The first byte of a longer code, that of a long text.
        regular &= code < 0x80
        size = _VALUE_BYTES[code]
        if column in columns:
            fine &= _IS_INTEGER[code]
            # Big-endian with the sign in its first byte: eight bytes shifted right leave the value.
            value = eights[value_at].astype(np.int64) >> _SHIFT[code]
            found[column] = np.where(size > 0, value, code == _ONE)
        value_at = value_at + size
    if not (regular & (value_at <= record + payload)).all():
        raise UnusualTableError
    return [found[column] for column in columns], fine


ROWS_PER_FETCH = 100_000
MAX_NS = 1 << 52
"""Longest capture that is believed: 52 days in nanoseconds. Times beyond it are damage."""
_STEPS_A_LOOK = 1_000_000
_LEAST_STEPS, _STEPS_A_BYTE = 100_000_000, 10
"""What a query may take of the steps of SQLite's machine. Those on real exports take at most 0.4 for each byte."""


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
            self._most_looks = (_LEAST_STEPS + _STEPS_A_BYTE * path.stat().st_size) // _STEPS_A_LOOK
            self._looks = 0
            self._connection.set_progress_handler(self._takes_too_long, _STEPS_A_LOOK)
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
        """The columns of each table that has pages of its own: a virtual one can stand for a query without an end."""
        tables = self._execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0 AND sql LIKE 'CREATE TABLE%'"
        ).fetchall()
        return {
            str(name): frozenset(str(row[0]) for row in self._execute("SELECT name FROM pragma_table_info(?)", (name,)))
            for (name,) in tables
        }

    def _execute(self, query: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        self._looks = 0
        return self._connection.execute(query, parameters)

    def _takes_too_long(self) -> bool:
        """Whether SQLite is to give up the query; it asks after each _STEPS_A_LOOK steps of its machine."""
        self._looks += 1
        return self._looks > self._most_looks

    def _damage(self, error: Exception) -> HpcmmError:
        is_endless = self._looks > self._most_looks
        return HpcmmError(f"{self.path} is damaged: {'it takes far too long to be read' if is_endless else error}.")

    def has(self, table: str, *columns: str) -> bool:
        """Whether ``table`` exists with all of ``columns``; exports leave out tables without rows."""
        return table in self._columns and self._columns[table].issuperset(columns)

    def strings(self) -> str:
        """What a query joins as ``StringIds``, whose ids a damaged export may hold more than once: one row an id."""
        keys = self.rows("SELECT name, upper(type) FROM pragma_table_info('StringIds') WHERE pk > 0")
        return (
            "StringIds" if keys == [("id", "INTEGER")] else "(SELECT id, value FROM StringIds GROUP BY id) AS StringIds"
        )

    def column(self, table: str, name: str) -> str:
        """``name`` qualified by its table where it exists, else ``NULL``: for a query that bears older schemas."""
        return f'{table}."{name}"' if self.has(table, name) else "NULL"

    def rows(self, query: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """All rows of a small query.

        Raises HpcmmError when the file is damaged where the rows lie.
        """
        try:
            return self._execute(query, parameters).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise self._damage(error) from error

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
            cursor = self._execute(query, (skipped,))
            while rows := cursor.fetchmany(ROWS_PER_FETCH):
                piece = np.array(rows, dtype=row)
                yield [piece[column] for column in columns]
        except (sqlite3.Error, UnicodeError) as error:
            raise self._damage(error) from error
