"""One report's events as arrays: its NVTX ranges of the annotation's domains and its OS runtime calls.

Times are nanoseconds of the report's own clock until :mod:`hpcmm.analysis.clock` puts all reports on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.annotate import schema
from hpcmm.errors import HpcmmError
from hpcmm.reports import trust
from hpcmm.reports.cuda import read_communicators, read_cuda, shifted
from hpcmm.reports.identity import read_identity
from hpcmm.reports.nvtx_ranges import IDS_PER_QUERY, MAX_PAYLOAD, no_ranges, read_ranges
from hpcmm.reports.report import (
    ID_MASK,
    LOADER_NAME,
    MARK,
    MARK_COLUMNS,
    MAX_NAME_LENGTH,
    PID_SHIFT,
    PUSH_POP,
    START_END,
    CudaEvents,
    Integers,
    Parts,
    Report,
)
from hpcmm.reports.sqlite import ReportDatabase

DOMAIN_CREATE = 75
OSRT_CALL = 27
"""``eventClass`` of a call; other classes mark the start and end of the tracing itself."""
RANGE_TYPES = f"{PUSH_POP}, {START_END}, 70, 71"
"""Ranges as SQL lists them; the last two were imported."""
DAY_NS = 86_400 * 10**9


def read_report(path: Path, source: Path, parts: Parts = Parts.ALL, *, every_range: bool = False) -> Report:
    """Events of the SQLite export at ``path``; ``source`` is the user's own file.

    ``every_range``: read the ranges of all domains also if hpcmm has annotated the steps, and no GPU was traced.

    Raises HpcmmError when nothing can be read.
    """
    with ReportDatabase(path) as database:
        damage = _unread(database, source)
        epoch = _epoch_ns(database)
        base = _base_ns(database, epoch)
        database.first_ns, database.last_ns = base, trust.last_possible_ns(database, base)
        domains = _domains(database)
        osrt = _read_osrt(database, damage)
        nvtx = _read_nvtx(database, domains, damage, parts)
        damage += _impossible(database)
        marks = _marks(database, domains)
        cuda = None if parts is Parts.OS_CALLS and len(nvtx) else read_cuda(database, damage)
        told = trust.read_diagnostics(database, _recorded_pids(nvtx, cuda))
        span = _spans(database, osrt, cuda)
        first, last = (time - base for time in _overall(span, base))
        # Of a program that hpcmm annotated, the ranges of other domains tell only what they launched.
        has_steps = nvtx["name"].isin((schema.STEP, schema.AUTOMATIC_STEP)).any()
        needed = every_range or cuda is not None or not has_steps
        ranges = read_ranges(database, domains, last + base, damage) if needed else no_ranges()
        if base:
            nvtx, osrt, ranges = (
                each.assign(start_ns=each.start_ns - base, end_ns=each.end_ns - base) for each in (nvtx, osrt, ranges)
            )
            cuda = cuda and shifted(cuda, base)
        cuda = cuda and replace(cuda, ranges=ranges)
        nvtx["end_ns"] = nvtx["end_ns"].where(nvtx["closed"], max(last, first)).astype(np.int64)
        nvtx = nvtx[nvtx["end_ns"] >= nvtx["start_ns"]].reset_index(drop=True)
        return Report(
            path=source,
            nsys_version=_metadata(database, "EXPORT_PRODUCT_VERSION"),
            identity=read_identity(database),
            epoch_ns=base if _normalised(database) else epoch,
            processes=_processes(database),
            nvtx=nvtx,
            osrt=osrt,
            events=sum(count for count, _, _ in span.values()),
            first_ns=first,
            last_ns=last,
            domains=tuple(sorted(set(domains.values()))),
            traced=frozenset(kind for kind, (count, _, _) in span.items() if count),
            damage=(*damage, *told.losses),
            doubts=told.doubts,
            lost_gpu_records=any(map(trust.of_gpus, (*told.losses, *told.doubts))),
            requested=_requested(database),
            cuda=cuda,
            marks=marks.assign(start_ns=marks["start_ns"] - base),
            ranks=_ranks(marks),
            communicators=read_communicators(database),
            communicating=_communicating(database, domains),
            parts=parts,
            ranges=ranges,
            program=_program(database),
        )


def _unread(database: ReportDatabase, source: Path) -> list[str]:
    """A sentence for what the file lacks: its end, or what SQLite has not written into it yet."""
    cut = ["the file is shorter than its header says"] if database.cut_off else []
    log = source.with_name(f"{source.name}-wal")
    if source.suffix != ".sqlite" or not log.is_file() or not log.stat().st_size:
        return cut
    return [
        *cut,
        f"{log.name} beside it holds rows that are not in the file yet: close the program that writes it, or copy it "
        "with sqlite3's .backup",
    ]


def _metadata(database: ReportDatabase, key: str) -> str:
    """A value of the export's metadata table, whose name and key prefix depend on the version."""
    for table in ("META_DATA_EXPORT", "EXPORT_META_DATA"):
        if database.has(table, "name", "value"):
            rows = database.rows(f"SELECT value FROM {table} WHERE name = ? LIMIT 1", (key,))  # noqa: S608
            if rows:
                return str(rows[0][0])[:MAX_NAME_LENGTH]
    return ""


def _epoch_ns(database: ReportDatabase) -> int | None:
    if not database.has("TARGET_INFO_SESSION_START_TIME", "utcEpochNs"):
        return None
    rows = database.rows(
        "SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME WHERE typeof(utcEpochNs) = 'integer' LIMIT 1"
    )
    epoch = rows[0][0] if rows else None
    return epoch if isinstance(epoch, int) and 0 < epoch < 1 << 62 else None


def _normalised(database: ReportDatabase) -> bool:
    return _metadata(database, "EXPORT_PARAM_TIME_NORMALIZE").lower() in {"true", "1"}


def _base_ns(database: ReportDatabase, epoch_ns: int | None) -> int:
    """What the times of the export count from: 0, or of a normalised one a day before its session in UTC.

    A normalised export is shifted to UTC already, while utcEpochNs stays: adding it again would double the epoch.
    """
    if not _normalised(database) or epoch_ns is None:
        return 0
    return max(0, epoch_ns - DAY_NS)


def _requested(database: ReportDatabase) -> frozenset[str]:
    """What was to be traced, which newer versions tell."""
    if not database.has("META_DATA_CAPTURE", "name", "value"):
        return frozenset()
    try:
        rows = database.rows("SELECT value FROM META_DATA_CAPTURE WHERE name LIKE '%CAPTURE_EVENT_TYPE'")
    except HpcmmError:
        return frozenset()
    told = " ".join(str(value) for (value,) in rows).lower()
    return frozenset(kind for kind, word in _EVENT_TYPES.items() if word in told)


_EVENT_TYPES = {"nvtx": "nvtxevents", "cuda": "cuda"}


def _program(database: ReportDatabase) -> str:
    if not database.has("META_DATA_CAPTURE", "name", "value"):
        return ""
    rows = database.rows("SELECT value FROM META_DATA_CAPTURE WHERE name = 'PROCESS_0:COMMAND' LIMIT 1")
    return PurePosixPath(str(rows[0][0])[:MAX_NAME_LENGTH]).name if rows else ""


def _processes(database: ReportDatabase) -> dict[int, str]:
    """Names of the whole machine's processes by pid; of those that nsys does not list, the name of their first thread.

    PyTorch's data loader gives its processes a thread name of their own, which tells more than the program.
    """
    found: dict[int, str] = {}
    try:
        if database.has("PROCESSES", "pid", "name"):
            found |= _names_by_id(database, "SELECT pid, {name} FROM PROCESSES WHERE name != 'nsys-launcher'", "name")
        if database.has("ThreadNames", "nameId", "globalTid") and database.has("StringIds", "id", "value"):
            pid, tid = f"globalTid >> {PID_SHIFT} & {ID_MASK}", f"globalTid & {ID_MASK}"
            query = f"SELECT {tid}, {{name}} FROM ThreadNames JOIN StringIds ON id = nameId WHERE {pid} = {tid}"  # noqa: S608
            first_threads = _names_by_id(database, query, "value")
            found = first_threads | {pid: name for pid, name in found.items() if first_threads.get(pid) != LOADER_NAME}
    except HpcmmError:
        return found
    return found


_OF_COMMUNICATION = ("gloo", "nccl", "pt_autograd", "pt_gloo", "pt_nccl")
"""Starts of the names of threads that a training process has, and neither a launcher nor a loader; in lower case."""


def _communicating(database: ReportDatabase, domains: Mapping[tuple[int, int], str]) -> frozenset[int]:
    """Processes with a thread of a communication library or of PyTorch's backward pass, or with NCCL's own ranges."""
    found = {pid for (pid, _), name in domains.items() if name == "NCCL"}
    if database.has("ThreadNames", "nameId", "globalTid") and database.has("StringIds", "id", "value"):
        query = f"""
            SELECT DISTINCT globalTid >> {PID_SHIFT} & {ID_MASK}, lower(substr(value, 1, {MAX_NAME_LENGTH}))
            FROM ThreadNames JOIN StringIds ON id = nameId WHERE typeof(globalTid) = 'integer'
        """  # noqa: S608
        with suppress(HpcmmError):
            rows = database.rows(query)
            found |= {pid for pid, name in rows if isinstance(pid, int) and str(name).startswith(_OF_COMMUNICATION)}
    return frozenset(found)


def _names_by_id(database: ReportDatabase, query: str, name: str) -> dict[int, str]:
    rows = database.rows(query.format(name=f"substr({name}, 1, {MAX_NAME_LENGTH})"))
    return {number: str(text) for number, text in rows if isinstance(number, int) and text}


def _recorded_pids(nvtx: pd.DataFrame, cuda: CudaEvents | None) -> frozenset[int]:
    """Processes that wrote ranges of ours or used a GPU."""
    users = [nvtx] if cuda is None else [nvtx, cuda.activities]
    return frozenset(int(pid) for frame in users for pid in frame["pid"].unique())


def _spans(database: ReportDatabase, osrt: pd.DataFrame, cuda: CudaEvents | None) -> dict[str, tuple[int, int, int]]:
    """Rows, first start and last end by kind of event."""
    found: dict[str, tuple[int, int, int]] = {}
    for kind, events in (("osrt", osrt), ("cuda", None if cuda is None else cuda.activities)):
        if events is not None and len(events):
            found[kind] = (len(events), int(events["start_ns"].min()), int(events["end_ns"].max()))
    if not database.has("NVTX_EVENTS", "start", "end"):
        return found
    query = f"""
        SELECT COUNT(*), MIN(start), MAX(MAX(start, COALESCE("end", start)))
        FROM NVTX_EVENTS WHERE typeof(start) = 'integer' AND start BETWEEN {database.first_ns} AND {database.last_ns}
        AND ("end" IS NULL OR (typeof("end") = 'integer' AND "end" BETWEEN start AND {database.last_ns}))
    """  # noqa: S608
    with suppress(HpcmmError):
        count, first, last = database.rows(query)[0]
        if isinstance(count, int) and isinstance(first, int) and isinstance(last, int):
            found["nvtx"] = (count, first, last)
    return found


def _overall(spans: dict[str, tuple[int, int, int]], base_ns: int) -> tuple[int, int]:
    if not spans:
        return base_ns, base_ns
    return min(first for _, first, _ in spans.values()), max(last for _, _, last in spans.values())


def _domains(database: ReportDatabase) -> dict[tuple[int, int], str]:
    """Domain names by (pid, domainId); ids are unique within a process only."""
    if not database.has("NVTX_EVENTS", "eventType", "domainId", "globalTid"):
        return {}
    query = f"""
        SELECT globalTid, domainId, {_text_expression(database)} FROM NVTX_EVENTS {_string_join(database)}
        WHERE eventType = {DOMAIN_CREATE} AND typeof(globalTid) = 'integer' AND typeof(domainId) = 'integer'
    """  # noqa: S608
    try:
        rows = database.rows(query)
    except HpcmmError:
        return {}
    return {
        (_pid(thread), domain): str(name)
        for thread, domain, name in rows
        if isinstance(thread, int) and isinstance(domain, int)
    }


def _marks(database: ReportDatabase, domains: dict[tuple[int, int], str]) -> pd.DataFrame:
    """Marks of the annotation's own domain, in their order."""
    own = sorted({number for (_, number), name in domains.items() if name == schema.DOMAIN})
    found: list[tuple[int, int, str]] = []
    first, last = database.first_ns, database.last_ns
    if own and database.has("NVTX_EVENTS", "eventType", "domainId", "globalTid"):
        query = f"""
            SELECT globalTid, domainId, {database.column("NVTX_EVENTS", "start")}, {_text_expression(database)}
            FROM NVTX_EVENTS {_string_join(database)}
            WHERE eventType = {MARK} AND domainId IN ({", ".join(map(str, own))}) AND typeof(globalTid) = 'integer'
        """  # noqa: S608
        with suppress(HpcmmError):
            found = [
                (start if isinstance(start, int) and first <= start <= last else first, _pid(thread), str(text))
                for thread, number, start, text in database.rows(query)
                if isinstance(thread, int)
                and isinstance(number, int)
                and domains.get((_pid(thread), number)) == schema.DOMAIN
            ]
    frame = pd.DataFrame(found, columns=MARK_COLUMNS).astype({"start_ns": np.int64, "pid": np.int64})
    return frame.sort_values("start_ns", kind="stable", ignore_index=True)


def _ranks(marks: pd.DataFrame) -> dict[int, int]:
    """Ranks by pid; the last that a process tells holds."""
    told = [(int(pid), schema.parse_rank(name)) for pid, name in zip(marks["pid"], marks["name"], strict=True)]
    return {pid: rank for pid, rank in told if rank is not None}


def _pid(global_tid: int) -> int:
    return (global_tid >> PID_SHIFT) & ID_MASK


def _text_expression(database: ReportDatabase) -> str:
    """A range's name: its own text or, when it was registered, the shared string."""
    parts = [database.column("NVTX_EVENTS", "text")]
    if database.has("NVTX_EVENTS", "textId") and database.has("StringIds", "id", "value"):
        parts.append("StringIds.value")
    return f"substr(CAST(COALESCE({', '.join([*parts, repr('')])}) AS TEXT), 1, {MAX_NAME_LENGTH})"


def _string_join(database: ReportDatabase) -> str:
    if database.has("NVTX_EVENTS", "textId") and database.has("StringIds", "id", "value"):
        return f"LEFT JOIN {database.strings()} ON StringIds.id = NVTX_EVENTS.textId"
    return ""


NVTX_COLUMNS = ["start_ns", "end_ns", "closed", "pid", "tid", "end_tid", "kind", "domain", "name", "payload"]


def _read_nvtx(
    database: ReportDatabase, domains: dict[tuple[int, int], str], damage: list[str], parts: Parts
) -> pd.DataFrame:
    """Ranges of the annotation's own domains, sorted by start; for OS calls those of steps are enough."""
    only_steps = parts is Parts.OS_CALLS
    chosen = {schema.DOMAIN} if only_steps else {schema.DOMAIN, schema.COMM_DOMAIN}
    wanted = {key: name for key, name in domains.items() if name in chosen}
    rows: list[tuple[object, ...]] = []
    if wanted and database.has("NVTX_EVENTS", "start", "end"):
        try:
            query = _nvtx_query(database, sorted({domain for _, domain in wanted}))
            if only_steps:
                query += f" AND {_text_expression(database)} IN ('{schema.STEP}', '{schema.AUTOMATIC_STEP}')"
            rows = database.rows(query)
        except HpcmmError as error:
            damage.append(str(error))
    frame = pd.DataFrame(
        rows, columns=["start_ns", "end_ns", "closed", "kind", "thread", "end_thread", "domain_id", "name", "payload"]
    ).astype({"start_ns": np.int64, "end_ns": np.int64, "closed": bool, "payload": "Int64"})
    thread = frame["thread"].to_numpy(np.int64)
    frame["pid"], frame["tid"] = (thread >> PID_SHIFT) & ID_MASK, thread & ID_MASK
    frame["end_tid"] = frame["end_thread"].to_numpy(np.int64) & ID_MASK
    keys = zip(frame["pid"], frame["domain_id"], strict=True)
    frame["domain"] = pd.Series([wanted.get(key) for key in keys], dtype="object")
    sane = frame["domain"].notna() & (~frame["closed"] | (frame["end_ns"] >= frame["start_ns"]))
    return frame.loc[sane, NVTX_COLUMNS].sort_values("start_ns", kind="stable").reset_index(drop=True)


def _nvtx_query(database: ReportDatabase, domain_ids: list[int]) -> str:
    def column(name: str) -> str:
        return database.column("NVTX_EVENTS", name)

    integers = [column(name) for name in ("int64Value", "uint64Value", "int32Value", "uint32Value")]
    payload = f"COALESCE({', '.join(integers)})"
    return f"""
        SELECT start, COALESCE("end", 0), "end" IS NOT NULL, eventType, globalTid,
               COALESCE({column("endGlobalTid")}, globalTid), domainId, {_text_expression(database)},
               CASE WHEN typeof({payload}) = 'integer' AND {payload} BETWEEN 0 AND {MAX_PAYLOAD} THEN {payload} END
        FROM NVTX_EVENTS {_string_join(database)} WHERE {_of_domains(domain_ids)} AND {_possible(database)}
    """  # noqa: S608


def _of_domains(domain_ids: list[int]) -> str:
    """SQL's condition on ranges of these domains."""
    return f"eventType IN ({RANGE_TYPES}) AND domainId IN ({', '.join(map(str, domain_ids))})"


def _possible(database: ReportDatabase) -> str:
    """SQL's condition on a range whose values nsys may have written; one without an end was never closed."""
    within = f"BETWEEN {database.first_ns} AND {database.last_ns}"
    return f"""(
        typeof(start) = 'integer' AND start {within}
        AND ("end" IS NULL OR (typeof("end") = 'integer' AND "end" {within}))
        AND typeof(globalTid) = 'integer'
        AND typeof({database.column("NVTX_EVENTS", "endGlobalTid")}) IN ('integer', 'null')
    )"""


def _impossible(database: ReportDatabase) -> list[str]:
    """A sentence on the ranges that are left out for their values; none if all are possible."""
    if not database.has("NVTX_EVENTS", "start", "end", "eventType", "globalTid"):
        return []
    query = f"""
        SELECT COUNT(*) FROM NVTX_EVENTS WHERE eventType IN ({RANGE_TYPES})
        AND NOT ({_possible(database)} AND ("end" IS NULL OR "end" >= start))
    """  # noqa: S608
    try:
        count = database.rows(query)[0][0]
    except HpcmmError:
        return []  # the damage is told where the ranges themselves are read
    return [f"{count} ranges have times or threads that cannot be, and are left out"] if count else []


def _read_osrt(database: ReportDatabase, damage: list[str]) -> pd.DataFrame:
    """All OS runtime calls, in the export's own order."""
    pieces: list[tuple[Integers, ...]] = []
    impossible = 0
    columns = ["start", "end", "globalTid", "nameId"]
    if database.has("OSRT_API", *columns):
        classed = ["eventClass"] if database.has("OSRT_API", "eventClass") else []
        try:
            for start, end, thread, name_id, *event_class in database.integers("OSRT_API", [*columns, *classed]):
                sane = (start >= database.first_ns) & (end >= start) & (end <= database.last_ns)
                for kind in event_class:
                    sane &= kind == OSRT_CALL
                    impossible -= int((kind != OSRT_CALL).sum())
                impossible += int((~sane).sum())
                pieces.append((start[sane], end[sane], thread[sane], name_id[sane]))
        except HpcmmError as error:
            damage.append(str(error))
    damage += trust.left_out(impossible, "OS call", "OSRT_API")
    start, end, thread, name_id = _joined(pieces, len(columns))
    codes, categories = _function_names(database, name_id)
    return pd.DataFrame(
        {
            "start_ns": start,
            "end_ns": end,
            "pid": ((thread >> PID_SHIFT) & ID_MASK).astype(np.int32),
            "tid": (thread & ID_MASK).astype(np.int32),
            "function": pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(categories)),
        },
        copy=False,
    )


def _joined(pieces: list[tuple[Integers, ...]], width: int) -> list[Integers]:
    """Each column of all pieces, which are given up one after another to save memory."""
    columns = [list(column) for column in zip(*pieces, strict=True)] or [[] for _ in range(width)]
    pieces.clear()
    joined: list[Integers] = []
    while columns:
        parts = columns.pop(0)
        joined.append(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))
    return joined


def _function_names(database: ReportDatabase, name_id: Integers) -> tuple[npt.NDArray[np.intp], list[str]]:
    """A code for each call, and the functions' names; ids without a string keep their number."""
    codes, used = pd.factorize(name_id)
    strings: dict[int, str] = {}
    if database.has("StringIds", "id", "value"):
        for first in range(0, len(used), IDS_PER_QUERY):
            ids = tuple(int(key) for key in used[first : first + IDS_PER_QUERY])
            marks = ", ".join("?" * len(ids))
            query = f"SELECT id, substr(value, 1, {MAX_NAME_LENGTH}) FROM StringIds WHERE id IN ({marks})"  # noqa: S608
            strings |= {int(str(key)): str(name) for key, name in database.rows(query, ids)}
    labels = [strings.get(int(key), f"function {key}") for key in used]
    unique = sorted(set(labels))
    position = {label: index for index, label in enumerate(unique)}
    lookup = np.array([position[label] for label in labels], dtype=np.intp)
    return lookup[codes], unique
