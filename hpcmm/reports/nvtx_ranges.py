"""All NVTX ranges of a report, of every domain: what a program or a library says of itself.

Push/pop and start/end ranges, with plain and registered names. A range that was never ended is there as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.errors import HpcmmError
from hpcmm.reports.report import (
    ID_MASK,
    MAX_NAME_LENGTH,
    PID_SHIFT,
    PUSH_POP,
    RANGE_COLUMNS,
    START_END,
    UNKNOWN,
    Integers,
)
from hpcmm.reports.sqlite import ReportDatabase

IMPORTED_PUSH_POP, IMPORTED_START_END = 70, 71
MAX_RANGES = 2_000_000
"""Ranges that are read of one report; a profile of every operator of a long run has more."""
RANGES_PER_FETCH = 100_000
IDS_PER_QUERY = 500
"""Parameters of one query; SQLite has a limit."""
MAX_PAYLOAD = 1 << 52


def read_ranges(
    database: ReportDatabase, domains: Mapping[tuple[int, int], str], last_ns: int, damage: list[str]
) -> pd.DataFrame:
    """Ranges in the export's order (RANGE_COLUMNS); an open one ends at ``last_ns``.

    A push/pop range that ended on another thread than it began on is damaged, and left out.
    """
    frames = []
    count, after = 0, -1
    while database.has("NVTX_EVENTS", "start", "end", "eventType", "globalTid") and count < MAX_RANGES:
        try:
            rows = database.rows(_query(database), (after,))
        except HpcmmError as error:
            damage.append(str(error))
            break
        if not rows:
            break
        *numbers, payload, text, row_id = zip(*rows, strict=True)
        start, end, closed, kind, thread, end_thread, domain_id, text_id = np.array(numbers, dtype=np.int64)
        frames.append(
            pd.DataFrame(
                {
                    "start_ns": start,
                    "end_ns": np.where(closed == 1, end, np.maximum(last_ns, start)),
                    "closed": closed == 1,
                    "pid": (thread >> PID_SHIFT) & ID_MASK,
                    "tid": thread & ID_MASK,
                    "end_tid": np.where(end_thread > 0, end_thread, thread) & ID_MASK,
                    "kind": np.where(np.isin(kind, (START_END, IMPORTED_START_END)), START_END, PUSH_POP),
                    "payload": pd.array(payload, dtype="Int64"),
                    "domain_id": domain_id,
                    "text_id": text_id,
                    "name": pd.Series(text, dtype="object"),
                }
            )
        )
        count, after = count + len(rows), int(str(row_id[-1]))
    if count >= MAX_RANGES:
        damage.append(f"{database.path} has more NVTX ranges than are read: the first {count:,} are projected.")
    if not frames:
        return no_ranges()
    return _named(database, pd.concat(frames, ignore_index=True), domains)


def no_ranges() -> pd.DataFrame:
    """A table of ranges that holds none."""
    numbers = pd.DataFrame({name: np.empty(0, dtype=np.int64) for name in RANGE_COLUMNS})
    kinds = {"closed": "bool", "payload": "Int64", "domain": "category", "name": "category"}
    return numbers.astype(kinds)


def _query(database: ReportDatabase) -> str:
    def integer(name: str, otherwise: int) -> str:
        cell = database.column("NVTX_EVENTS", name)
        return f"CASE WHEN typeof({cell}) = 'integer' THEN {cell} ELSE {otherwise} END"

    text = database.column("NVTX_EVENTS", "text")
    payloads = [database.column("NVTX_EVENTS", f"{kind}Value") for kind in ("int64", "uint64", "int32", "uint32")]
    payload = f"COALESCE({', '.join(payloads)})"
    same_thread = f"{integer('endGlobalTid', UNKNOWN)} IN ({UNKNOWN}, 0, globalTid)"
    return f"""
        SELECT start, COALESCE("end", 0), "end" IS NOT NULL, eventType, globalTid, {integer("endGlobalTid", UNKNOWN)},
               {integer("domainId", 0)}, {integer("textId", UNKNOWN)},
               CASE WHEN typeof({payload}) = 'integer' AND {payload} BETWEEN 0 AND {MAX_PAYLOAD} THEN {payload} END,
               substr(CAST({text} AS TEXT), 1, {MAX_NAME_LENGTH}), rowid
        FROM NVTX_EVENTS
        WHERE rowid > ? AND eventType IN ({PUSH_POP}, {START_END}, {IMPORTED_PUSH_POP}, {IMPORTED_START_END})
        AND typeof(start) = 'integer' AND start BETWEEN {database.first_ns} AND {database.last_ns}
        AND ("end" IS NULL OR (typeof("end") = 'integer' AND "end" BETWEEN start AND {database.last_ns}))
        AND typeof(globalTid) = 'integer' AND (eventType IN ({START_END}, {IMPORTED_START_END}) OR {same_thread})
        ORDER BY rowid LIMIT {RANGES_PER_FETCH}
    """  # noqa: S608


def _named(database: ReportDatabase, ranges: pd.DataFrame, domains: Mapping[tuple[int, int], str]) -> pd.DataFrame:
    """Names and domains as categories; a domain whose creation is not in the report keeps its number."""
    registered = ranges["name"].isna().to_numpy()
    name = ranges["name"].to_numpy(object, copy=True)
    name[registered] = labels(database, ranges["text_id"].to_numpy(np.int64)[registered], "range")
    pairs = ranges["pid"].to_numpy(np.int64) << 32 | (ranges["domain_id"].to_numpy(np.int64) & 0xFFFFFFFF)
    used, codes = np.unique(pairs, return_inverse=True)
    names = [_domain_name(int(pair) >> 32, int(pair) & 0xFFFFFFFF, domains) for pair in used]
    ranges = ranges.assign(name=name, domain=np.array(names, dtype=object)[codes])
    return ranges[RANGE_COLUMNS].astype({"name": "category", "domain": "category"})


def _domain_name(pid: int, domain_id: int, domains: Mapping[tuple[int, int], str]) -> str:
    return domains.get((pid, domain_id), f"domain {domain_id}" if domain_id else "")


def labels(database: ReportDatabase, ids: Integers, unnamed: str) -> npt.NDArray[np.object_]:
    """The shared strings behind ``ids``; an id without a string keeps its number."""
    used, codes = np.unique(ids, return_inverse=True)
    strings: dict[int, str] = {}
    if database.has("StringIds", "id", "value"):
        for first in range(0, len(used), IDS_PER_QUERY):
            some = tuple(int(key) for key in used[first : first + IDS_PER_QUERY])
            marks = ", ".join("?" * len(some))
            query = f"SELECT id, substr(CAST(value AS TEXT), 1, {MAX_NAME_LENGTH}) FROM StringIds WHERE id IN ({marks})"  # noqa: S608
            try:
                strings |= {int(str(key)): str(value) for key, value in database.rows(query, some)}
            except HpcmmError:
                continue
    named = np.array([strings.get(int(key), f"{unnamed} {key}") for key in used], dtype=object)
    return named[codes] if len(used) else np.empty(0, dtype=object)
