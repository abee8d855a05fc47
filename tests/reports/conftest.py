"""Recorded reports, and exports made row by row in the schema of nsys 2022.4."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"

SCHEMA = """
CREATE TABLE EXPORT_META_DATA (name TEXT, value TEXT);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT, name TEXT, nameEnum INTEGER, value TEXT);
CREATE TABLE StringIds (id INTEGER, value TEXT);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
CREATE TABLE OSRT_API (start INTEGER, end INTEGER, eventClass INTEGER, globalTid INTEGER, nameId INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, int64Value INTEGER);
"""
THREAD = (7 << 24) | 7
"""globalTid of the first thread of process 7."""


class Export:
    """An export under construction; times in nanoseconds of the report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = sqlite3.connect(path)
        self.connection.executescript(SCHEMA)

    def rows(self, table: str, *rows: tuple) -> "Export":
        for row in rows:
            self.connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
        self.connection.commit()
        return self

    def domains(self) -> "Export":
        return self.rows(
            "NVTX_EVENTS",
            (0, None, 75, "hpcmm", THREAD, None, None, 1, None),
            (0, None, 75, "hpcmm.comm", THREAD, None, None, 2, None),
        )

    def range(self, start, end, name, *, domain=1, kind=59, payload=None) -> "Export":
        return self.rows("NVTX_EVENTS", (start, end, kind, name, THREAD, None, None, domain, payload))

    def environment(self, text: str) -> "Export":
        return self.rows("TARGET_INFO_SYSTEM_ENV", (0, "", "DeviceEnvironment", 610, text))


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    made = Export(tmp_path / "export.sqlite")
    yield made
    made.connection.close()


@pytest.fixture
def damaged_sample(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the ``slow_data`` sample after SQL has been run on one rank's export."""

    def damage(*statements: str, rank: int = 1) -> Path:
        folder = tmp_path / "reports"
        shutil.copytree(SAMPLES / "slow_data", folder)
        connection = sqlite3.connect(folder / f"rank_{rank:04d}.sqlite")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()
        return folder

    return damage
