"""Calls into NCCL with their communicator, from the payload of the ranges that NCCL itself writes.

NCCL annotates each call in a domain of its own. nsys exports the payload as JSON text, or from 2025 on as bytes, if
asked to (``--include-blobs=true``), with the layout in NVTX_PAYLOAD_SCHEMA_ENTRIES. The bytes begin with a header whose
second 64-bit word is the number of the schema; the third is the length of the payload.
"""

from __future__ import annotations

import json
import struct

import numpy as np
import pandas as pd

from hpcmm.errors import HpcmmError
from hpcmm.reports.sqlite import ReportDatabase

COMMUNICATOR, SIZE = "NCCL communicator ID", "Message size [bytes]"
HEADER = struct.Struct("<QQQQ")
WORD = struct.Struct("<Q")
PUSH_POP = 59
PID_SHIFT, ID_MASK = 24, 0xFFFFFF
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
