"""The same run as exports of nsys 2022.4 (recorded) and of later versions (rewritten from it): the same tables.

No export of 2023 to 2025 was at hand. Their differences are those that the documentation of the schema and real
exports before and after them show: renamed metadata, registered names, further columns, tables that are left out when
empty, rows in any order, times that are normalised to UTC.
"""

# ruff: noqa: S608 -- queries hold names of our own tables alone

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze

RECORDED = Path(__file__).parents[2] / "profiles" / "samples" / "slow_data"
EVENT_TABLES = ("NVTX_EVENTS", "OSRT_API", "StringIds", "PROCESSES", "ThreadNames", "TARGET_INFO_SYSTEM_ENV")

Rewrite = Callable[[sqlite3.Connection], None]


def metadata_renamed(connection: sqlite3.Connection) -> None:
    """2023.3 on: what was exported, and what was captured, in a table each; keys of parameters have a prefix."""
    connection.execute("ALTER TABLE EXPORT_META_DATA RENAME TO META_DATA_EXPORT")
    for key in ("OVERWRITE", "LAZY"):
        connection.execute(
            "UPDATE META_DATA_EXPORT SET name = ? WHERE name = ?", (f"EXPORT_PARAM_{key}", f"EXPORT_{key}")
        )
    connection.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_PARAM_TIME_NORMALIZE', 'false')")
    connection.execute("CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT)")
    captured = [("DEVICE_ID", "Local (CLI)"), ("CAPTURE_EVENT_TYPE", "NvtxEvents"), ("CAPTURE_EVENT_TYPE", "OSRuntime")]
    connection.executemany("INSERT INTO META_DATA_CAPTURE VALUES (?, ?)", captured)


def names_registered(connection: sqlite3.Connection) -> None:
    """Names of ranges and domains as shared strings alone."""
    first = 1 + connection.execute("SELECT MAX(id) FROM StringIds").fetchone()[0]
    texts = [text for (text,) in connection.execute("SELECT DISTINCT text FROM NVTX_EVENTS WHERE text IS NOT NULL")]
    connection.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(texts, first))
    connection.execute(
        "UPDATE NVTX_EVENTS SET textId = (SELECT MIN(id) FROM StringIds WHERE value = text), text = NULL "
        "WHERE text IS NOT NULL"
    )


def columns_added(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE NVTX_EVENTS ADD COLUMN binaryData TEXT")
    connection.execute("ALTER TABLE TARGET_INFO_SESSION_START_TIME ADD COLUMN systemClockNs INTEGER")
    connection.execute("ALTER TABLE OSRT_API ADD COLUMN correlationId INTEGER")
    connection.execute("CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, text TEXT)")


def columns_in_another_order(connection: sqlite3.Connection) -> None:
    for table in ("NVTX_EVENTS", "OSRT_API"):
        columns = [f'"{row[1]}"' for row in connection.execute(f"PRAGMA table_info({table})")]
        connection.execute(f"CREATE TABLE other AS SELECT {', '.join(reversed(columns))} FROM {table}")
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"ALTER TABLE other RENAME TO {table}")


def rows_shuffled(connection: sqlite3.Connection) -> None:
    """2025.6 on: no order is promised."""
    dice = random.Random(7)  # noqa: S311 -- no secret
    for table in EVENT_TABLES:
        rows = connection.execute(f"SELECT * FROM {table}").fetchall()
        dice.shuffle(rows)
        connection.execute(f"DELETE FROM {table}")
        if rows:
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)


def tables_left_out(connection: sqlite3.Connection) -> None:
    """Lazy exports hold no table without rows, and versions differ in which they write."""
    connection.execute("DROP TABLE ANALYSIS_DETAILS")
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if not connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]:
            connection.execute(f"DROP TABLE {table}")


def payloads_unsigned(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE NVTX_EVENTS SET uint64Value = int64Value, int64Value = NULL")


def payloads_short(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE NVTX_EVENTS SET int32Value = int64Value, int64Value = NULL")


def times_normalised(connection: sqlite3.Connection) -> None:
    """``--ts-normalize``: times are UTC, while the session's start is still told."""
    (epoch,) = connection.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
    for table in ("NVTX_EVENTS", "OSRT_API"):
        connection.execute(f'UPDATE {table} SET start = start + ?, "end" = "end" + ?', (epoch, epoch))
    connection.execute("UPDATE META_DATA_EXPORT SET value = 'true' WHERE name = 'EXPORT_PARAM_TIME_NORMALIZE'")


def product(version: str, schema: str) -> Rewrite:
    def rewrite(connection: sqlite3.Connection) -> None:
        told = {"EXPORT_PRODUCT_VERSION": version, "EXPORT_SCHEMA_VERSION": schema}
        connection.executemany(
            "UPDATE META_DATA_EXPORT SET value = ? WHERE name = ?", [(value, key) for key, value in told.items()]
        )

    return rewrite


VERSIONS: dict[str, list[Rewrite]] = {
    "2023.4": [metadata_renamed, product("2023.4.1.97", "3.7.2"), names_registered],
    "2024.2": [metadata_renamed, product("2024.2.1.38", "3.11.0"), columns_added, tables_left_out, payloads_unsigned],
    "2024.6": [metadata_renamed, product("2024.6.1.90", "3.15.0"), columns_added, columns_in_another_order],
    "2025.6": [metadata_renamed, product("2025.6.1.190", "3.23.0"), columns_added, names_registered, rows_shuffled],
    "2025.6, normalised": [
        *(metadata_renamed, product("2025.6.1.190", "3.23.0"), columns_added, payloads_short),
        *(rows_shuffled, tables_left_out, times_normalised),
    ],
}


@pytest.fixture(scope="module")
def recorded() -> Analysis:
    return analyze(RECORDED)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_same_tables(recorded: Analysis, version: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RECORDED, folder)
    exports = sorted(folder.rglob("*.sqlite"))
    for path in exports:
        with closing(sqlite3.connect(path)) as connection:
            for rewrite in VERSIONS[version]:
                rewrite(connection)
            connection.commit()
            connection.execute("VACUUM")
    rewritten = analyze(folder)
    assert len(exports) == 4
    assert set(rewritten.coverage()["nsys_version"].str[:6]) == {version[:6]}
    for name, table in recorded.tables.items():
        same = rewritten.tables[name]
        if name == "coverage":
            table, same = (each.drop(columns="nsys_version") for each in (table, same))  # noqa: PLW2901
        pd.testing.assert_frame_equal(same, table, rtol=1e-9, obj=name)
