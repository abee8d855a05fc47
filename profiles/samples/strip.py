"""Make a small sample of an SQLite export, fit to be published: ``python profiles/samples/strip.py IN OUT``.

An export holds the whole environment of the profiled process (tokens, keys), the machine's process list and the
program's output. Kept are: the annotation's NVTX rows, the OS calls since the first of them that took at least 100 µs
(100 ms on threads without NVTX ranges), every wait for a child process, one in 64 short receives, the strings that
these name, and of the environment only what identifies the rank.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from pathlib import Path

KEPT_VARIABLES = ("RANK", "SLURM_PROCID", "SLURMD_NODENAME", "SLURM_JOB_ID", "WORLD_SIZE", "LOCAL_RANK")
KEPT_TABLES = (
    "ANALYSIS_DETAILS",
    "EXPORT_META_DATA",
    "META_DATA_EXPORT",
    "NVTX_EVENTS",
    "OSRT_API",
    "PROCESSES",
    "StringIds",
    "TARGET_INFO_SESSION_START_TIME",
    "TARGET_INFO_SYSTEM_ENV",
    "ThreadNames",
)
SHORTEST_CALL_NS = 100_000
SHORTEST_BACKGROUND_CALL_NS = 100_000_000
RECEIVING = ("recv", "recvfrom", "recvmsg", "readv")
KEPT_OF_RECEIVING = 64
"""How often a rank receives tells of its link: one in so many short calls is kept."""


def strip(source: Path, target: Path) -> None:
    """Write the stripped copy of ``source`` to ``target``, which must not exist."""
    with sqlite3.connect(target) as copy:
        copy.execute("ATTACH ? AS report", (f"file:{source.resolve()}?mode=ro",))
        tables = dict(copy.execute("SELECT name, sql FROM report.sqlite_master WHERE type = 'table'").fetchall())
        for table in (name for name in KEPT_TABLES if name in tables):
            copy.execute(tables[table])
            copy.execute(f"INSERT INTO {table} SELECT * FROM report.{table}")  # noqa: S608 -- names of our own list
        copy.commit()
        copy.execute("DETACH report")
        _reduce(copy, {name for name in KEPT_TABLES if name in tables})
    copy = sqlite3.connect(target)
    copy.execute("PRAGMA page_size = 1024")
    copy.execute("VACUUM")
    copy.close()


def _reduce(copy: sqlite3.Connection, tables: set[str]) -> None:
    """Delete what is not needed or not to be published."""
    copy.execute(
        'DELETE FROM OSRT_API WHERE (start < (SELECT MIN(start) FROM NVTX_EVENTS) OR "end" - start < '
        "CASE WHEN globalTid IN (SELECT globalTid FROM NVTX_EVENTS) THEN ? ELSE ? END) AND nameId NOT IN "
        "(SELECT id FROM StringIds WHERE value IN ('wait', 'wait3', 'wait4', 'waitid', 'waitpid')) AND NOT "
        "(rowid % ? = 0 AND nameId IN (SELECT id FROM StringIds WHERE value IN (?, ?, ?, ?)))",
        (SHORTEST_CALL_NS, SHORTEST_BACKGROUND_CALL_NS, KEPT_OF_RECEIVING, *RECEIVING),
    )
    used_processes = (
        "SELECT (globalTid >> 24) & 16777215 FROM OSRT_API UNION SELECT (globalTid >> 24) & 16777215 FROM NVTX_EVENTS"
    )
    copy.execute(f"DELETE FROM PROCESSES WHERE pid NOT IN ({used_processes})")  # noqa: S608 -- no outside text
    copy.execute("DELETE FROM ThreadNames WHERE globalTid NOT IN (SELECT globalTid FROM OSRT_API)")
    copy.execute(
        "DELETE FROM StringIds WHERE id NOT IN (SELECT nameId FROM OSRT_API UNION SELECT nameId FROM ThreadNames "
        "UNION SELECT textId FROM NVTX_EVENTS WHERE textId IS NOT NULL)"
    )
    for pid, name in copy.execute("SELECT pid, name FROM PROCESSES").fetchall():
        copy.execute("UPDATE PROCESSES SET name = ? WHERE pid = ?", (str(name).rsplit("/", 1)[-1], pid))
    for table in tables & {"EXPORT_META_DATA", "META_DATA_EXPORT"}:
        copy.execute(f"DELETE FROM {table} WHERE name LIKE '%PATH%' OR name LIKE '%FILE' OR name LIKE '%HOST'")  # noqa: S608
    copy.execute("DELETE FROM TARGET_INFO_SYSTEM_ENV WHERE name NOT IN ('Hostname', 'DeviceEnvironment', 'CpuCores')")
    for (value,) in copy.execute(
        "SELECT value FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'DeviceEnvironment'"
    ).fetchall():
        pairs = [pair for pair in re.split("[\0;]", str(value)) if pair.split("=", 1)[0] in KEPT_VARIABLES]
        copy.execute(
            "UPDATE TARGET_INFO_SYSTEM_ENV SET value = ? WHERE name = 'DeviceEnvironment'", ("\0".join(pairs),)
        )
    copy.execute("UPDATE TARGET_INFO_SYSTEM_ENV SET value = 'host' WHERE name = 'Hostname'")


if __name__ == "__main__":
    strip(Path(sys.argv[1]), Path(sys.argv[2]))
