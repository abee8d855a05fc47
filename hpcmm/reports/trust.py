"""What of a report cannot be true, and what nsys itself says that it lost.

CUPTI writes 0 for a time that it could not take, and some of its versions write an end before the start. Such records
are counted and left out: taken as they are, one of them makes a capture of seconds one of minutes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.errors import HpcmmError
from hpcmm.reports.report import (
    ID_MASK,
    IMPOSSIBLE,
    MAX_NAME_LENGTH,
    NO_LAUNCH,
    PID_SHIFT,
    RECORDED,
    UNKNOWN,
    UNRECORDED,
    Integers,
)
from hpcmm.reports.sqlite import MAX_NS, ReportDatabase

Flags = npt.NDArray[np.bool_]

NS_PER_S = 10**9
TOLERANCE_NS = 10 * NS_PER_S
"""How far outside of the session that nsys notes a true record may lie; 0.4 s before its begin has been seen."""
FAR_NS, FAR_EXTENTS = 60 * NS_PER_S, 10
"""If no session is noted: how far from the bulk of the CUDA calls, at least, and as a multiple of their extent."""
MAX_CORRELATION = 0xFFFFFFFF
BEFORE_LAUNCH_NS = NS_PER_S
"""How long before its own launch a true record may begin: the clocks of host and device differ by much less."""


def last_possible_ns(database: ReportDatabase, base_ns: int) -> int:
    """The latest time that is believed: shortly after the session's end, if the export tells that.

    ``base_ns`` is what its times count from. Depending on the version of nsys, times count from the session's start or
    from what it counts its end from: the later end holds.
    """
    whole = base_ns + MAX_NS
    ends = [end for row in _details(database, "stopTime", "duration") for end in row if base_ns < end < whole]
    last = min(whole, max(ends) + TOLERANCE_NS) if ends else whole
    some = _some_times(database) if last < whole else []
    return last if not some or statistics.median(some) <= last else whole


_EVENT_TABLES = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_KERNEL", "NVTX_EVENTS", "OSRT_API")


def _some_times(database: ReportDatabase) -> list[int]:
    """When some of the events began, from all over the tables: what is noted of the session has to fit them."""
    found: list[int] = []
    for table in (each for each in _EVENT_TABLES if database.has(each, "start")):
        place = f"(SELECT MAX(rowid) FROM {table}) * ? / 10"  # noqa: S608
        query = f"SELECT start FROM {table} WHERE typeof(start) = 'integer' AND rowid >= {place} LIMIT 1"  # noqa: S608
        with suppress(HpcmmError):
            rows = [database.rows(query, (tenth,)) for tenth in (1, 3, 5, 7, 9)]
            found += [int(str(row[0][0])) for row in rows if row]
    return found


def _details(database: ReportDatabase, *columns: str) -> list[list[int]]:
    """Integers of what the export notes of the session; none if it notes nothing."""
    if not database.has("ANALYSIS_DETAILS", *columns):
        return []
    try:
        rows = database.rows(f"SELECT {', '.join(columns)} FROM ANALYSIS_DETAILS LIMIT 100")  # noqa: S608
    except HpcmmError:
        return []
    return [[cell for cell in row if isinstance(cell, int)] for row in rows]


def cuda_session(database: ReportDatabase, calls_ns: Integers) -> tuple[int, int]:
    """The earliest and the latest time that is believed of a CUDA call or of what it launched.

    ``calls_ns``: when the calls of the CUDA runtime began. They tell the session if nsys did not note it.
    """
    low, high = database.first_ns, database.last_ns
    if not len(calls_ns):
        return low, high
    first, bulk, last = (int(each) for each in np.quantile(calls_ns, [0.01, 0.1, 0.99], method="nearest"))
    noted = [begin for row in _details(database, "startTime") for begin in row]
    # Depending on the version, times may count from another moment than the session's start does.
    begins = [begin for begin in noted if low <= begin <= bulk]
    if noted:
        return max(low, min(begins) - TOLERANCE_NS) if begins else low, high
    far = max(FAR_NS, FAR_EXTENTS * (last - first))
    return max(low, first - far), min(high, last + far)


def possible(database: ReportDatabase, session: tuple[int, int], start_ns: Integers, end_ns: Integers) -> Flags:
    """Which CUDA calls or GPU records, by their times, lie within ``session`` and end after they started.

    The report's time 0 comes long before its process can call CUDA: it stands for a time that was not taken.
    """
    low, high = session
    return (start_ns > database.first_ns) & (start_ns >= low) & (end_ns >= start_ns) & (end_ns <= high)


def after_launch(start_ns: Integers, launch_ns: Integers) -> Flags:
    """Which GPU records begin after their launching call has begun, or nearly; also those whose launch is UNKNOWN."""
    return np.asarray((launch_ns == UNKNOWN) | (start_ns >= launch_ns - BEFORE_LAUNCH_NS))


def left_out(count: int, what: str, table: str) -> list[str]:
    """A sentence on records that cannot be, ``what`` each of them is; none if all can."""
    told = f"{what}s have times that cannot be, and are" if count != 1 else f"{what} has times that cannot be, and is"
    return [f"{count:,} {told} left out ({table})"] if count else []


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What nsys says of its own capture, as sentences."""

    losses: tuple[str, ...] = ()
    """Records are missing."""
    doubts: tuple[str, ...] = ()
    """Records may be missing."""


MAX_DIAGNOSTICS = 1_000
MAX_TOLD = 4
"""Messages that are repeated, of each kind."""
WARNINGS = frozenset({"warning", "error", "fatal"})
_LOST = re.compile(r"\b(?:dropped|lost|discarded|overwritten|overflow\w*|overran)\b", re.IGNORECASE)
_NONE_LOST = re.compile(
    r"\b(?:no|0)\s+(?:\w+\s+){0,3}(?:dropped|lost|discarded)|(?:dropped|lost|discarded)[\w\s]{0,30}[:=]\s*0\b(?![.,]?\d)",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\bnot all\b.*\bcollected\b"
    r"|\b(?:might|may|could) (?:have been |have |be )?(?:not |missing|lost|dropped|incomplete)"
    r"|\bincomplete\b|\bbuffers? (?:is|was|were|are) (?:full|exhausted)"
    r"|\bnot supported by this build\b(?!.*\bwill be collected\b)",
    re.IGNORECASE,
)
_OF_GPU = re.compile(r"cuda|cupti|gpu|kernel|driver|\brecords?\b", re.IGNORECASE)


def read_diagnostics(database: ReportDatabase, pids: Collection[int]) -> Diagnostics:
    """Warnings and errors of nsys on lost records, each once. ``pids``: processes that left events.

    What it doubts of other processes, which have nothing to record, is not repeated.
    """
    if not database.has("DIAGNOSTIC_EVENT", "text"):
        return Diagnostics()
    severity, process = (database.column("DIAGNOSTIC_EVENT", name) for name in ("severity", "globalPid"))
    query = f"""
        SELECT DISTINCT substr(CAST(text AS TEXT), 1, {MAX_NAME_LENGTH}), {severity}, {process}
        FROM DIAGNOSTIC_EVENT LIMIT {MAX_DIAGNOSTICS}
    """  # noqa: S608
    try:
        rows = database.rows(query)
    except HpcmmError:
        return Diagnostics()
    grave = _grave(database)
    losses: dict[str, None] = {}
    doubts: dict[str, None] = {}
    for text, level, owner in rows:
        if isinstance(level, int) and level not in grave:
            continue
        told = str(text).strip()
        pid = (owner >> PID_SHIFT) & ID_MASK if isinstance(owner, int) else None
        unsure = _DOUBT.search(told)
        lost = _LOST.search(told)
        if lost and not _NONE_LOST.search(told) and not (unsure and unsure.start() <= lost.start()):
            losses[told] = None
        elif unsure and (pid is None or not pids or pid in pids):
            doubts[told] = None
    return Diagnostics(_quoted(list(losses)), _quoted(list(doubts)))


def _grave(database: ReportDatabase) -> frozenset[int]:
    """Numbers of the severities that are warnings or worse: as the export names them, else as nsys numbers them."""
    table = "ENUM_DIAGNOSTIC_SEVERITY_LEVEL"
    if database.has(table, "id", "name"):
        try:
            rows = database.rows(f"SELECT id, name FROM {table} LIMIT 100")  # noqa: S608
        except HpcmmError:
            rows = []
        if rows:
            return frozenset(key for key, name in rows if isinstance(key, int) and str(name).lower() in WARNINGS)
    return frozenset({2, 3})


def _quoted(messages: Sequence[str]) -> tuple[str, ...]:
    told = tuple(f'nsys says: "{message}"' for message in messages[:MAX_TOLD])
    return (*told, f"and {len(messages) - MAX_TOLD} more of the kind") if len(messages) > MAX_TOLD else told


def of_gpus(sentence: str) -> bool:
    """Whether what nsys says concerns records of GPUs."""
    return _OF_GPU.search(sentence) is not None


_LAUNCH = re.compile(r"cu(?:da)?(?:Graph)?Launch(?!HostFunc)")
_CAPTURE = re.compile(r"cu(?:da)?Stream(Begin|End)Capture")
_BEGIN_CAPTURE, _END_CAPTURE = -2, -1


def kind_of_call(name: str) -> int:
    """UNRECORDED for a launch, until its record is found; NO_LAUNCH for other calls, but for what begins and ends the
    capture of a CUDA graph, which :func:`without_captured` looks for."""
    capture = _CAPTURE.match(name)
    if capture:
        return _BEGIN_CAPTURE if capture[1] == "Begin" else _END_CAPTURE
    return UNRECORDED if _LAUNCH.match(name) else NO_LAUNCH


def without_captured(calls: pd.DataFrame) -> pd.DataFrame:
    """Launches that a CUDA graph captures run nothing yet: they are none."""
    record = calls["record"].to_numpy(np.int64, copy=True)
    for begin in calls.loc[record == _BEGIN_CAPTURE, "pid"].unique():
        own = np.flatnonzero((calls["pid"] == begin).to_numpy())
        order = own[np.argsort(calls["start_ns"].to_numpy(np.int64)[own], kind="stable")]
        kinds = record[order]
        open_captures = np.cumsum(kinds == _BEGIN_CAPTURE) - np.cumsum(kinds == _END_CAPTURE)
        record[order[(open_captures > 0) & (kinds == UNRECORDED)]] = NO_LAUNCH
    return calls.assign(record=np.maximum(record, NO_LAUNCH))


def launch_key(pid: Integers, correlation: Integers) -> Integers:
    """Process and correlation id as one number; UNKNOWN if either is."""
    valid = (pid >= 0) & (correlation > 0) & (correlation <= MAX_CORRELATION)
    return np.where(valid, pid << 32 | correlation, UNKNOWN)


def with_records(calls: pd.DataFrame, activities: pd.DataFrame, fine: Flags) -> pd.DataFrame:
    """``calls`` with what became of each launch as ``record``; ``fine``: which records of ``activities`` can be.

    If some records do not tell their launch, no launch is known to lack its record.
    """
    key = launch_key(calls["pid"].to_numpy(np.int64), calls["correlation"].to_numpy(np.int64))
    of_record = launch_key(activities["pid"].to_numpy(np.int64), activities["correlation"].to_numpy(np.int64))
    record = calls["record"].to_numpy(np.int64, copy=True)
    if not (of_record != UNKNOWN).all():
        record[record == UNRECORDED] = NO_LAUNCH
    record[(record == UNRECORDED) & np.isin(key, of_record[fine])] = RECORDED
    impossible = np.setdiff1d(of_record[~fine], np.append(of_record[fine], UNKNOWN))
    record[np.isin(key, impossible)] = IMPOSSIBLE
    calls = calls.assign(record=record)
    # A runtime call and the driver call within it are one launch.
    return calls[(calls["record"] == NO_LAUNCH) | ~calls.duplicated(["pid", "correlation", "record"])]
