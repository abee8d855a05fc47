"""What a report's GPUs did: kernels, copies and sets with the call that launched each.

nsys leaves out tables without rows and has renamed and added columns over the versions, so nothing but the times of an
activity is taken for granted. An activity and its launching call share process and correlation id. The launches of
activities that began before the capture, or that CUDA graphs make on their own, are not in the report.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.errors import HpcmmError
from hpcmm.reports.nvtx_ranges import labels, no_ranges
from hpcmm.reports.report import COPY, GRAPH, ID_MASK, KERNEL, PID_SHIFT, PUSH_POP, SET, UNKNOWN, CudaEvents
from hpcmm.reports.sqlite import ReportDatabase

Integers = npt.NDArray[np.int64]
TABLES = {
    "CUPTI_ACTIVITY_KIND_KERNEL": KERNEL,
    "CUPTI_ACTIVITY_KIND_MEMCPY": COPY,
    "CUPTI_ACTIVITY_KIND_MEMSET": SET,
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": GRAPH,
}
"""GRAPH_TRACE holds whole launches of CUDA graphs, if nsys was told to trace graphs as one."""
RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
NAME_COLUMNS = ("shortName", "demangledName", "mangledName")
MAX_CORRELATION = 0xFFFFFFFF

ACTIVITY_COLUMNS = ["start_ns", "end_ns", "pid", "device", "stream", "kind", "name"]
LAUNCH_COLUMNS = ["launch_ns", "launch_end_ns", "launch_tid"]


def read_cuda(database: ReportDatabase, damage: list[str]) -> CudaEvents | None:
    """GPU events of an export, still without the ranges, or None if it has none.

    What is lost to damage is told in a sentence each, appended to ``damage``.
    """
    parts = [_read_activities(database, table, damage) for table in TABLES if database.has(table, "start", "end")]
    parts = [part for part in parts if len(part)]
    if not parts:
        return None
    activities = pd.concat(parts, ignore_index=True)
    activities = _with_launches(database, activities, damage)
    for column in ("kind", "name"):
        activities[column] = activities[column].astype("category")
    activities = activities.sort_values("start_ns", kind="stable", ignore_index=True)
    return CudaEvents(
        activities.drop(columns="correlation"),
        no_ranges(),
        read_nccl_calls(database),
        _read_synchronisations(database),
    )


def shifted(events: CudaEvents, base_ns: int) -> CudaEvents:
    """``events`` with all times counted from ``base_ns``."""

    def moved(frame: pd.DataFrame) -> pd.DataFrame:
        times = {name: frame[name] for name in ("start_ns", "end_ns", *LAUNCH_COLUMNS[:2]) if name in frame}
        return frame.assign(
            **{name: column.where(column == UNKNOWN, column - base_ns) for name, column in times.items()}
        )

    return CudaEvents(*(moved(getattr(events, field.name)) for field in fields(events)))


def _read_activities(database: ReportDatabase, table: str, damage: list[str]) -> pd.DataFrame:
    kind = TABLES[table]
    names = [column for column in NAME_COLUMNS if database.has(table, column)] if kind == KERNEL else []
    known = [column for column in ("globalPid", "deviceId", "streamId", "correlationId") if database.has(table, column)]
    values = _sane_columns(database, table, ["start", "end", *known, *names[:1]], damage)
    unknown = np.full(len(values["start"]), UNKNOWN, dtype=np.int64)
    process = values.get("globalPid", unknown)
    return pd.DataFrame(
        {
            "start_ns": values["start"],
            "end_ns": values["end"],
            "pid": np.where(process > 0, (process >> PID_SHIFT) & ID_MASK, UNKNOWN),
            "device": values.get("deviceId", unknown),
            "stream": values.get("streamId", unknown),
            "correlation": values.get("correlationId", unknown),
            "kind": kind,
            "name": labels(database, values[names[0]] if names else unknown, "kernel") if kind == KERNEL else "",
        }
    )


def _sane_columns(database: ReportDatabase, table: str, columns: list[str], damage: list[str]) -> dict[str, Integers]:
    """Integer columns, start and end among them, of the rows that end after they start and lie within the capture."""
    pieces: list[list[Integers]] = []
    try:
        pieces.extend(database.integers(table, columns))
    except HpcmmError as error:
        damage.append(str(error))
    whole = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    values = dict(zip(columns, whole or [np.empty(0, dtype=np.int64)] * len(columns), strict=True))
    sane = (values["start"] >= database.first_ns) & (values["end"] >= values["start"])
    sane &= values["end"] <= database.last_ns
    return {name: column[sane] for name, column in values.items()}


def _with_launches(database: ReportDatabase, activities: pd.DataFrame, damage: list[str]) -> pd.DataFrame:
    """Add LAUNCH_COLUMNS; an activity without a process gets that of the only process that calls CUDA."""
    unknown = dict.fromkeys(LAUNCH_COLUMNS, np.full(len(activities), UNKNOWN, dtype=np.int64))
    if not database.has(RUNTIME, "start", "end", "globalTid", "correlationId"):
        return activities.assign(**unknown)
    calls = _sane_columns(database, RUNTIME, ["start", "end", "globalTid", "correlationId"], damage)
    usable = (calls["correlationId"] > 0) & (calls["correlationId"] <= MAX_CORRELATION)
    start, end, thread, call_id = (column[usable] for column in calls.values())
    if not len(start):
        return activities.assign(**unknown)
    caller = (thread >> PID_SHIFT) & ID_MASK
    pid = activities["pid"].to_numpy(np.int64)
    if (pid == UNKNOWN).any() and (caller == caller[0]).all():
        pid = np.where(pid == UNKNOWN, caller[0], pid)
    # Of a runtime call and the driver call within it, both with one id, the outer one begins first.
    order = np.lexsort((start, call_id, caller))
    key = (caller << 32 | call_id)[order]
    correlation = activities["correlation"].to_numpy(np.int64)
    valid = (pid >= 0) & (correlation > 0) & (correlation <= MAX_CORRELATION)
    wanted = np.where(valid, pid << 32 | correlation, UNKNOWN)
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    found = key[at] == wanted
    columns = (start[order][at], end[order][at], thread[order][at] & ID_MASK)
    launches = {name: np.where(found, values, UNKNOWN) for name, values in zip(LAUNCH_COLUMNS, columns, strict=True)}
    return activities.assign(pid=pid, **launches)


def _read_synchronisations(database: ReportDatabase) -> pd.DataFrame:
    """Calls of the runtime or the driver that return only once the device has done what it was given."""
    rows: list[tuple[object, ...]] = []
    if database.has(RUNTIME, "start", "end", "globalTid", "nameId") and database.has("StringIds", "id", "value"):
        query = f"""
            SELECT start, "end", globalTid >> {PID_SHIFT} & {ID_MASK} FROM {RUNTIME} JOIN {database.strings()}
            ON StringIds.id = nameId WHERE (value LIKE 'cu%Synchronize%'
            OR ((value LIKE 'cudaMemcpy%' OR value LIKE 'cuMemcpy%') AND value NOT LIKE '%Async%'))
            AND typeof(start) = 'integer' AND typeof("end") = 'integer' AND start BETWEEN {database.first_ns} AND "end"
            AND "end" <= {database.last_ns} AND typeof(globalTid) = 'integer'
        """  # noqa: S608
        try:
            rows = database.rows(query)
        except HpcmmError:
            rows = []
    return pd.DataFrame(rows, columns=["start_ns", "end_ns", "pid"]).astype(np.int64)


COMMUNICATOR, SIZE = "NCCL communicator ID", "Message size [bytes]"
HEADER = struct.Struct("<QQQQ")
WORD = struct.Struct("<Q")
MAX_BYTES = 1 << 52
MAX_CALLS = 500_000
MAX_PAYLOAD = 4096
"""Characters or bytes of a payload; NCCL's are below a hundred."""
CALL_COLUMNS = ["start_ns", "end_ns", "pid", "tid", "communicator", "bytes"]

Layout = dict[tuple[int, int], dict[str, int]]
"""Offset of each field by (domainId, schemaId)."""


def read_nccl_calls(database: ReportDatabase) -> pd.DataFrame:
    """Calls whose payload tells a communicator (CALL_COLUMNS), sorted by start; 0 bytes where it tells no size.

    The id of a communicator is the same on all its ranks.
    """
    rows: list[tuple[int, int, int, int, str, int]] = []
    if database.has("NVTX_EVENTS", "start", "end", "eventType", "globalTid"):
        layout = _layout(database)
        for start, end, thread, domain, text, blob in _payloads(database):
            fields = _from_json(text) or _from_bytes(blob, domain, layout)
            if COMMUNICATOR in fields and isinstance(start, int) and isinstance(end, int) and isinstance(thread, int):
                size = fields.get(SIZE, 0)
                size = size if size < MAX_BYTES else 0
                pid, tid = (thread >> PID_SHIFT) & ID_MASK, thread & ID_MASK
                rows.append((start, end, pid, tid, f"communicator {fields[COMMUNICATOR]:x}", size))
    integers = dict.fromkeys(("start_ns", "end_ns", "pid", "tid", "bytes"), np.int64)
    table = pd.DataFrame(rows, columns=CALL_COLUMNS).astype(integers)
    return table.sort_values("start_ns", kind="stable", ignore_index=True)


def _payloads(database: ReportDatabase) -> list[tuple[object, ...]]:
    """Start, end, globalTid, domainId, JSON text and bytes of the ranges that have a payload."""
    texts = [database.column("NVTX_EVENTS", "jsonText")]
    join = ""
    if database.has("NVTX_EVENTS", "jsonTextId") and database.has("StringIds", "id", "value"):
        texts.append("StringIds.value")
        join = f"LEFT JOIN {database.strings()} ON StringIds.id = NVTX_EVENTS.jsonTextId"
    blob = database.column("NVTX_EVENTS", "binaryData")
    text, domain = f"COALESCE({', '.join([*texts, 'NULL'])})", database.column("NVTX_EVENTS", "domainId")
    query = f"""
        SELECT NVTX_EVENTS.start, NVTX_EVENTS."end", globalTid, {domain}, {text}, {blob}
        FROM NVTX_EVENTS {join}
        WHERE eventType = {PUSH_POP} AND typeof(globalTid) = 'integer'
        AND typeof(NVTX_EVENTS.start) = 'integer' AND NVTX_EVENTS.start >= {database.first_ns}
        AND typeof(NVTX_EVENTS."end") = 'integer' AND NVTX_EVENTS."end" BETWEEN NVTX_EVENTS.start AND {database.last_ns}
        AND ({text} IS NOT NULL OR {blob} IS NOT NULL)
        AND length(COALESCE({text}, '')) <= {MAX_PAYLOAD} AND length(COALESCE({blob}, '')) <= {MAX_PAYLOAD}
        LIMIT {MAX_CALLS}
    """  # noqa: S608
    try:
        return database.rows(query)
    except HpcmmError:
        return []  # the damage is told where the ranges themselves are read


def _layout(database: ReportDatabase) -> Layout:
    table = "NVTX_PAYLOAD_SCHEMA_ENTRIES"
    if not database.has(table, "domainId", "schemaId", "name", "offset"):
        return {}
    query = f'SELECT domainId, schemaId, name, COALESCE("offset", 0) FROM {table} WHERE name IN (?, ?)'  # noqa: S608
    layout: Layout = {}
    try:
        for domain, schema, name, offset in database.rows(query, (COMMUNICATOR, SIZE)):
            if isinstance(domain, int) and isinstance(schema, int) and isinstance(offset, int) and offset >= 0:
                layout.setdefault((domain, schema), {})[str(name)] = offset
    except HpcmmError:
        return {}
    return layout


def _from_json(text: object) -> dict[str, int]:
    if not isinstance(text, str) or COMMUNICATOR not in text:
        return {}
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found: dict[str, int] = {}
    for name in (COMMUNICATOR, SIZE):
        digits = str(payload.get(name, "")).replace(",", "") if isinstance(payload, dict) else ""
        if digits.isascii() and digits.isdigit() and len(digits) <= 20:
            found[name] = int(digits)
    return found


def _from_bytes(blob: object, domain: object, layout: Layout) -> dict[str, int]:
    if isinstance(blob, str):
        try:
            blob = bytes.fromhex(blob)
        except ValueError:
            return {}
    if not isinstance(blob, bytes) or len(blob) < HEADER.size or not isinstance(domain, int):
        return {}
    _, schema, length, _ = HEADER.unpack_from(blob)
    payload = blob[HEADER.size : HEADER.size + length]
    offsets = layout.get((domain, schema), {})
    return {
        name: WORD.unpack_from(payload, offset)[0]
        for name, offset in offsets.items()
        if offset + WORD.size <= len(payload)
    }
