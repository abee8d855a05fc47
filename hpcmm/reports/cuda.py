"""What a report's GPUs did: kernels, copies and sets with the call that launched each.

nsys leaves out tables without rows and has renamed and added columns over the versions, so nothing but the times of an
activity is taken for granted. An activity and its launching call share process and correlation id. The launches of
activities that began before the capture, or that CUDA graphs make on their own, are not in the report.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.errors import HpcmmError
from hpcmm.ranges import MAX_WORLD_SIZE
from hpcmm.reports import trust
from hpcmm.reports.identity import told_gpus
from hpcmm.reports.nvtx_ranges import MAX_RANGES, labels, no_ranges
from hpcmm.reports.report import (
    CALLS_COLUMNS,
    COPY,
    CUDA_CALL,
    GRAPH,
    ID_MASK,
    KERNEL,
    MPI,
    NO_LAUNCH,
    PID_SHIFT,
    PUSH_POP,
    SET,
    SYNCHRONISING,
    UNKNOWN,
    UNRECORDED,
    CudaEvents,
    Member,
)
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
COPY_COLUMNS = {"bytes": "bytes", "copy_kind": "copyKind", "source": "srcKind", "target": "dstKind"}
DEVICES_OF_COPY = ("srcDeviceId", "dstDeviceId")
PEER_TO_PEER, WITHIN_DEVICES = 10, (0, 5, 6, 7, 8)
"""Numbers of copyKind."""
LONG_CALL_NS = 100_000
"""A CUDA call from this length on may be what a GPU has to wait for, whatever it does."""

LAUNCH_COLUMNS = ["launch_ns", "launch_end_ns", "launch_tid"]
HOST_CALL_COLUMNS = ["start_ns", "end_ns", "pid", "tid", "kind", "function"]


def read_cuda(database: ReportDatabase, damage: list[str]) -> CudaEvents | None:
    """GPU events of an export, still without the ranges, or None if it has none.

    What is lost to damage, or left out because it cannot be, is told in a sentence each, appended to ``damage``.
    """
    tables = [table for table in TABLES if database.has(table, "start", "end")]
    if not tables:
        return None
    calls, session = _read_calls(database, damage)
    parts = [_read_activities(database, table, damage) for table in tables]
    activities = _with_launches(pd.concat(parts, ignore_index=True), calls)
    start, end, launch = (activities[name].to_numpy(np.int64) for name in ("start_ns", "end_ns", "launch_ns"))
    fine = trust.possible(database, session, start, end) & trust.after_launch(start, launch)
    for table in tables:
        damage += trust.left_out(int((activities["kind"][~fine] == TABLES[table]).sum()), "GPU record", table)
    calls = trust.with_records(calls, activities, fine)
    activities = activities[fine]
    if activities.empty:
        return None
    activities = activities.assign(gpu=_gpus(database, activities))
    for column in ("kind", "name", "gpu"):
        activities[column] = activities[column].astype("category")
    activities = activities.sort_values("start_ns", kind="stable", ignore_index=True)
    return CudaEvents(
        activities.drop(columns="correlation"),
        no_ranges(),
        read_nccl_calls(database),
        _read_host_calls(database),
        calls[CALLS_COLUMNS].sort_values("start_ns", kind="stable", ignore_index=True),
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
    names = [column for column in NAME_COLUMNS if database.has(table, column)][:2] if kind == KERNEL else []
    known = [column for column in ("globalPid", "deviceId", "streamId", "correlationId") if database.has(table, column)]
    wanted = (*COPY_COLUMNS.values(), *DEVICES_OF_COPY) if kind == COPY else ()
    details = [column for column in wanted if database.has(table, column)]
    nullable = [*names[1:], *details]
    values = _columns(database, table, ["start", "end", *known, *names[:1]], damage, nullable)
    unknown = np.full(len(values["start"]), UNKNOWN, dtype=np.int64)
    process = values.get("globalPid", unknown)
    if "copyKind" in values:
        values["copyKind"] = _kind_of_copy(values)
    return pd.DataFrame(
        {
            "start_ns": values["start"],
            "end_ns": values["end"],
            "pid": np.where(process > 0, (process >> PID_SHIFT) & ID_MASK, UNKNOWN),
            "device": values.get("deviceId", unknown),
            "stream": values.get("streamId", unknown),
            "correlation": values.get("correlationId", unknown),
            "kind": kind,
            "name": _kernel_names(database, [values[name] for name in names] or [unknown]) if kind == KERNEL else "",
            "bytes": np.maximum(values.get("bytes", unknown), UNKNOWN),
            **{
                name: np.clip(values.get(column, unknown), UNKNOWN, 127).astype(np.int8)
                for name, column in COPY_COLUMNS.items()
                if name != "bytes"
            },
        }
    )


def _kind_of_copy(values: dict[str, Integers]) -> Integers:
    """copyKind, but PEER_TO_PEER between two devices, which are told for such copies, whatever their kind is."""
    kind = values["copyKind"]
    here = values.get("deviceId", np.full(len(kind), UNKNOWN, dtype=np.int64))
    source, target = (values.get(name, here) for name in DEVICES_OF_COPY)
    source, target = np.where(source < 0, here, source), np.where(target < 0, here, target)
    apart = (source != target) & (source >= 0) & (target >= 0)
    return np.where(apart & np.isin(kind, WITHIN_DEVICES), PEER_TO_PEER, kind)


def _kernel_names(database: ReportDatabase, ids: list[Integers]) -> npt.NDArray[np.object_]:
    """Names without parameters; with their namespaces if the export has both the short and the full name."""
    short = labels(database, ids[0], "kernel")
    if len(ids) < 2:
        return short
    pairs = pd.MultiIndex.from_arrays([short, labels(database, ids[1], "")])
    codes, unique = pairs.factorize()
    names = np.array([_qualified(str(name), str(signature)) for name, signature in unique], dtype=object)
    return names.take(codes)


_UNNAMED = re.compile(r"(?:\(anonymous namespace\)|<unnamed>)::")


def _qualified(name: str, signature: str) -> str:
    """``deep_ep::intranode::dispatch`` of ``void deep_ep::intranode::dispatch<8>(int*)``; else ``name``."""
    function = re.split(r"[<(]", _UNNAMED.sub("", signature), maxsplit=1)[0].strip().rpartition(" ")[2]
    return function if function.endswith(f"::{name}") else name


def _columns(
    database: ReportDatabase, table: str, columns: list[str], damage: list[str], nullable: Sequence[str] = ()
) -> dict[str, Integers]:
    """Integer columns of a table, as far as damage lets them be read.

    Those of ``nullable`` may hold something else in some rows, which stands as UNKNOWN.
    """
    pieces: list[list[Integers]] = []
    required, columns = columns, [*columns, *nullable]
    try:
        pieces.extend(database.integers(table, columns))
        pieces.extend(_partly_known(database, table, required, nullable))
    except HpcmmError as error:
        damage.append(str(error))
    whole = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    return dict(zip(columns, whole or [np.empty(0, dtype=np.int64)] * len(columns), strict=True))


def _partly_known(
    database: ReportDatabase, table: str, columns: Sequence[str], nullable: Sequence[str]
) -> Iterator[list[Integers]]:
    """The rows in which some of ``nullable`` is no integer."""
    if not nullable:
        return
    there = " AND ".join(f"typeof(\"{column}\") = 'integer'" for column in columns)
    whole = " AND ".join(f"typeof(\"{column}\") = 'integer'" for column in nullable)
    rest = [f'CASE WHEN typeof("{column}") = \'integer\' THEN "{column}" ELSE {UNKNOWN} END' for column in nullable]
    cells = ", ".join([*(f'"{column}"' for column in columns), *rest])
    rows = database.rows(f"SELECT {cells} FROM {table} WHERE {there} AND NOT ({whole})")  # noqa: S608
    if rows:
        yield list(np.array(rows, dtype=np.int64).T)


def _read_calls(database: ReportDatabase, damage: list[str]) -> tuple[pd.DataFrame, tuple[int, int]]:
    """Calls of the CUDA runtime (CALLS_COLUMNS, and ``tid`` and ``correlation``) in the order of the table, and the
    earliest and latest time that is believed of what they launched."""
    if not database.has(RUNTIME, "start", "end", "globalTid", "correlationId"):
        return pd.DataFrame(columns=[*CALLS_COLUMNS, "tid", "correlation"], dtype=np.int64), (
            database.first_ns,
            database.last_ns,
        )
    more = [column for column in ("nameId", "returnValue") if database.has(RUNTIME, column)]
    values = _columns(database, RUNTIME, ["start", "end", "globalTid", "correlationId", *more], damage)
    start, end, thread = values["start"], values["end"], values["globalTid"]
    within = (start >= database.first_ns) & (end >= start) & (end <= database.last_ns)
    session = trust.cuda_session(database, start[within])
    fine = trust.possible(database, session, start, end)
    damage += trust.left_out(int((~fine).sum()), "CUDA call", RUNTIME)
    calls = pd.DataFrame(
        {
            "start_ns": start,
            "end_ns": end,
            "pid": (thread >> PID_SHIFT) & ID_MASK,
            "record": _kinds_of_calls(database, values),
            "tid": thread & ID_MASK,
            "correlation": values["correlationId"],
        }
    )[fine]
    return trust.without_captured(calls), session


def _kinds_of_calls(database: ReportDatabase, values: dict[str, Integers]) -> Integers:
    """What each call does, as :func:`trust.kind_of_call` has it; a launch that failed launches nothing."""
    if "nameId" not in values:
        return np.full(len(values["start"]), NO_LAUNCH, dtype=np.int64)
    used, codes = np.unique(values["nameId"], return_inverse=True)
    kinds = np.array([trust.kind_of_call(str(name)) for name in labels(database, used, "call")], dtype=np.int64)[codes]
    failed = values["returnValue"] != 0 if "returnValue" in values else np.zeros(len(kinds), dtype=bool)
    return np.where(failed & (kinds == UNRECORDED), NO_LAUNCH, kinds)


def _with_launches(activities: pd.DataFrame, calls: pd.DataFrame) -> pd.DataFrame:
    """Add LAUNCH_COLUMNS; an activity without a process gets that of the only process that calls CUDA."""
    caller, call_id = (calls[name].to_numpy(np.int64) for name in ("pid", "correlation"))
    usable = trust.launch_key(caller, call_id) != UNKNOWN
    if not usable.any():
        return activities.assign(**dict.fromkeys(LAUNCH_COLUMNS, np.full(len(activities), UNKNOWN, dtype=np.int64)))
    calls, caller, call_id = calls[usable], caller[usable], call_id[usable]
    pid = activities["pid"].to_numpy(np.int64)
    if (pid == UNKNOWN).any() and (caller == caller[0]).all():
        pid = np.where(pid == UNKNOWN, caller[0], pid)
    start, end, thread = (calls[name].to_numpy(np.int64) for name in ("start_ns", "end_ns", "tid"))
    # Of a runtime call and the driver call within it, both with one id, the outer one begins first.
    order = np.lexsort((start, call_id, caller))
    key = trust.launch_key(caller, call_id)[order]
    wanted = trust.launch_key(pid, activities["correlation"].to_numpy(np.int64))
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    found = key[at] == wanted
    columns = (start[order][at], end[order][at], thread[order][at])
    launches = {name: np.where(found, values, UNKNOWN) for name, values in zip(LAUNCH_COLUMNS, columns, strict=True)}
    return activities.assign(pid=pid, **launches)


def _gpus(database: ReportDatabase, activities: pd.DataFrame) -> npt.NDArray[np.object_]:
    """What tells the GPU of each activity from all others, empty if the report does not say.

    CUDA numbers the devices of each process from 0, in the order that CUDA_VISIBLE_DEVICES gives them.
    """
    pairs = _key_of_device(activities["pid"].to_numpy(np.int64), activities["device"].to_numpy(np.int64))
    used, codes = np.unique(pairs, return_inverse=True)
    told = told_gpus(database)
    names = np.array([told.get((int(pair) >> 32, int(pair) & 0xFFFFFFFF), "") for pair in used], dtype=object)
    return names[codes]


def _key_of_device(pid: Integers, device: Integers) -> Integers:
    return np.where((pid >= 0) & (device >= 0), pid << 32 | (device & 0xFFFFFFFF), UNKNOWN)


_SYNCHRONISES = """(value LIKE 'cu%Synchronize%'
    OR ((value LIKE 'cudaMemcpy%' OR value LIKE 'cuMemcpy%') AND value NOT LIKE '%Async%'))"""
"""SQL's condition on calls that return only once the device has done what it was given."""
_VERSION = re.compile(r"(?:_v\d+)?(?:_pt(?:sz|ds))?$")
MPI_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'MPI!_%!_EVENTS' ESCAPE '!'"


def _read_host_calls(database: ReportDatabase) -> pd.DataFrame:
    """Calls of CUDA that wait for the device or are long, and calls of MPI; of what cannot be read there are none."""
    kinds = [SYNCHRONISING, CUDA_CALL, MPI]
    rows: list[tuple[object, ...]] = []
    tables = [RUNTIME]
    with suppress(HpcmmError):
        tables += [str(name) for (name,) in database.rows(MPI_TABLES)]
    for table in tables:
        name = "nameId" if database.has(table, "nameId") else "textId"
        if not (database.has(table, "start", "end", "globalTid", name) and database.has("StringIds", "id", "value")):
            continue
        of_cuda = table == RUNTIME
        query = f"""
            SELECT start, "end", globalTid >> {PID_SHIFT} & {ID_MASK}, globalTid & {ID_MASK},
            {f"NOT {_SYNCHRONISES}" if of_cuda else kinds.index(MPI)}, StringIds.id
            FROM {table} JOIN {database.strings()} ON StringIds.id = {name}
            WHERE typeof(start) = 'integer' AND typeof("end") = 'integer' AND typeof(globalTid) = 'integer'
            AND start BETWEEN {database.first_ns} AND "end" AND "end" <= {database.last_ns}
            AND {f'({_SYNCHRONISES} OR "end" - start >= {LONG_CALL_NS})' if of_cuda else "TRUE"} LIMIT {MAX_RANGES}
        """  # noqa: S608
        with suppress(HpcmmError):
            rows += database.rows(query)
    *times, kind, name_id = np.array(rows, dtype=np.int64).reshape(-1, len(HOST_CALL_COLUMNS)).T
    names = pd.Series(labels(database, name_id, "call"), dtype="category")
    plain = pd.Series([_VERSION.sub("", str(name), count=1) for name in names.cat.categories], dtype=object)
    codes, functions = pd.factorize(plain)
    return pd.DataFrame(dict(zip(HOST_CALL_COLUMNS, times, strict=False))).assign(
        kind=pd.Categorical.from_codes(kind, pd.Index(kinds)),
        function=pd.Categorical.from_codes(codes[names.cat.codes.to_numpy()], functions),
    )


COMMUNICATOR, SIZE = "NCCL communicator ID", "Message size [bytes]"
RANKS, RANK = "No. of ranks", "Rank"
_FIELDS = (COMMUNICATOR, SIZE, RANKS, RANK)
HEADER = struct.Struct("<QQQQ")
WORD, HALF = struct.Struct("<Q"), struct.Struct("<I")
_HALVES = frozenset({5, 6, 15, 16})
"""Types of a payload's entries that take four bytes: int, unsigned, int32 and uint32; the others take eight."""
MAX_BYTES = 1 << 52
MAX_CALLS = 500_000
MAX_PAYLOAD = 4096
"""Characters or bytes of a payload; NCCL's are below a hundred."""
CALL_COLUMNS = ["start_ns", "end_ns", "pid", "tid", "communicator", "bytes"]

Layout = dict[tuple[int, int], dict[str, tuple[int, struct.Struct]]]
"""Offset and type of each field by (domainId, schemaId)."""


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


def read_communicators(database: ReportDatabase) -> dict[int, dict[str, Member]]:
    """By pid its places in the communicators that it has joined, as NCCL's ranges around the joining tell them."""
    found: dict[int, dict[str, Member]] = {}
    if not database.has("NVTX_EVENTS", "start", "end", "eventType", "globalTid"):
        return found
    layout = {key: fields for key, fields in _layout(database).items() if RANKS in fields}
    for _, _, thread, domain, text, blob in _payloads(database, RANKS, binary=bool(layout)):
        fields = _from_json(text) or _from_bytes(blob, domain, layout)
        if not {COMMUNICATOR, RANKS, RANK} <= fields.keys() or not isinstance(thread, int):
            continue
        if 0 <= fields[RANK] < fields[RANKS] <= MAX_WORLD_SIZE:
            joined = found.setdefault((thread >> PID_SHIFT) & ID_MASK, {})
            name = f"communicator {fields[COMMUNICATOR]:x}"
            told = joined.get(name, Member(fields[RANKS], fields[RANK]))
            joined[name] = Member(fields[RANKS], fields[RANK] if told.rank == fields[RANK] else None)
    return found


def _payloads(database: ReportDatabase, naming: str = "", *, binary: bool = True) -> list[tuple[object, ...]]:
    """Start, end, globalTid, domainId, JSON text and bytes of the ranges that have a payload: of those whose text is
    JSON the ones with ``naming`` in it, and ``binary`` ones."""
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
        AND (instr({text}, ?) OR ({blob} IS NOT NULL AND ?))
        AND length(COALESCE({text}, '')) <= {MAX_PAYLOAD} AND length(COALESCE({blob}, '')) <= {MAX_PAYLOAD}
        LIMIT {MAX_CALLS}
    """  # noqa: S608
    try:
        return database.rows(query, (naming, binary))
    except HpcmmError:
        return []  # the damage is told where the ranges themselves are read


def _layout(database: ReportDatabase) -> Layout:
    table = "NVTX_PAYLOAD_SCHEMA_ENTRIES"
    if not database.has(table, "domainId", "schemaId", "name", "offset"):
        return {}
    kind = database.column(table, "type")
    query = f'SELECT domainId, schemaId, name, COALESCE("offset", 0), {kind} FROM {table} WHERE name IN (?, ?, ?, ?)'  # noqa: S608
    layout: Layout = {}
    try:
        for domain, schema, name, offset, kind_of_it in database.rows(query, _FIELDS):
            if isinstance(domain, int) and isinstance(schema, int) and isinstance(offset, int) and offset >= 0:
                fits = HALF if kind_of_it in _HALVES else WORD
                layout.setdefault((domain, schema), {})[str(name)] = offset, fits
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
    for name in _FIELDS:
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
    return {
        name: fits.unpack_from(payload, offset)[0]
        for name, (offset, fits) in layout.get((domain, schema), {}).items()
        if offset + fits.size <= len(payload)
    }
