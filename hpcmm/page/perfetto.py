"""``trace.json.gz``: all ranks on the common clock, for Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing).

Trace Event Format: a process is a rank; its threads are the steps with their phases, the waits, the collectives (as
many lanes as are in flight at once) and the GPUs. Times are microseconds since the run's first event.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.collectives import Claims, claimed
from hpcmm.analysis.intervals import Times
from hpcmm.analysis.study import Study
from hpcmm.analysis.trace import OTHER, RankTrace
from hpcmm.page.headlines import plain, rank_name, seconds, trace_name

MAX_EVENTS = 500_000
"""Viewers stay quick up to this; a longer trace is cut in time, the same for all ranks."""

_STEPS, _WAITS, _GPUS, _COLLECTIVES, _GPU_TIME = 1, 2, 10, 100, 900_000
_TIDS_PER_PROCESS = 1_000_000


@dataclass(frozen=True, slots=True)
class _Slices:
    """Events of one thread of one rank."""

    process: int
    thread: int
    thread_name: str
    start_ns: Times
    end_ns: Times
    name: Sequence[str]
    arguments: Sequence[dict[str, Any]]


def write_trace(study: Study, file: IO[bytes], max_events: int = MAX_EVENTS) -> None:
    """Write the gzipped trace of ``study``; where it was cut to ``max_events``, its last event says so."""
    starts, last = _all_starts(study)
    origin = min(int(starts.min(initial=0)), 0)
    cut, note = last, ""
    if len(starts) > max_events:
        cut = int(np.partition(starts, max_events)[max_events])
        note = (
            f"cut after {seconds(cut / 1e9)} of {seconds(last / 1e9)}: {max_events:,} of {len(starts):,} events are "
            "shown, the tables hold all"
        )
    slices = list(_all_slices(study, cut))
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as packed:
        other = {"title": plain(study.name), "clock_error_us": study.clock.error_ns / 1e3, "note": note}
        packed.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(other)},"traceEvents":[\n'.encode())
        packed.write(",\n".join(_metadata(study, slices)).encode())
        for part in slices:
            lines = _lines(part, origin)
            if lines:
                packed.write((",\n" + ",\n".join(lines)).encode())
        if note:
            at = (cut - origin) / 1e3
            event = {"name": note, "ph": "i", "s": "g", "ts": at, "pid": 1, "tid": _TIDS_PER_PROCESS + _STEPS}
            packed.write((",\n" + json.dumps(event)).encode())
        packed.write(b"\n]}\n")


def _all_starts(study: Study) -> tuple[Times, int]:
    """Starts of all events, and the last end."""
    frames = [frame for trace in study.traces for frame in (trace.steps, _segments(trace))]
    frames += [each for trace in study.traces for each in (trace.gpu, trace.device_time) if each is not None]
    frames += [study.collectives, study.collectives[study.collectives["wait_ns"] > 0]]
    frames = [frame for frame in frames if len(frame)]
    last = max((int(frame["end_ns"].max()) for frame in frames), default=0)
    starts = [frame["start_ns"].to_numpy(np.int64) for frame in frames]
    return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64), last


def _all_slices(study: Study, cut_ns: int) -> Iterator[_Slices]:
    """What begins before ``cut_ns``, and of it what lies before."""

    def kept(frame: pd.DataFrame) -> pd.DataFrame:
        if frame["start_ns"].max() < cut_ns and frame["end_ns"].max() <= cut_ns:
            return frame
        early = frame[frame["start_ns"] < cut_ns]
        return early.assign(end_ns=early["end_ns"].clip(upper=cut_ns))

    rows = study.collectives
    own = dict(iter(kept(rows).groupby("trace"))) if len(rows) else {}
    claims = {claim.trace: claim for claim in claimed(rows, study.traces)} if len(rows) else {}
    for index, trace in enumerate(study.traces):
        process = index + 1
        yield _steps(process, kept(trace.steps))
        yield _phases(process, kept(_segments(trace)))
        if index in own:
            yield from _collectives(process, own[index])
        if index in claims:
            yield _waits(process, rows, claims[index], cut_ns, study.names)
        if trace.gpu is not None:
            yield from _gpus(process, kept(trace.gpu[trace.gpu["step"] >= 0]))
        if trace.device_time is not None:
            yield from _gpu_time(process, kept(trace.device_time))


def _segments(trace: RankTrace) -> pd.DataFrame:
    """The phases; what none covers shows as a gap."""
    return trace.segments[trace.segments["phase"] != OTHER]


def _steps(process: int, steps: pd.DataFrame) -> _Slices:
    names = [f"step {number}" for number in steps["step"]]
    return _slices(process, _STEPS, "steps and phases", steps, names, [{}] * len(steps))


def _phases(process: int, segments: pd.DataFrame) -> _Slices:
    return _slices(process, _STEPS, "steps and phases", segments, segments["phase"].tolist(), [{}] * len(segments))


def _slices(
    process: int,
    thread: int,
    title: str,
    frame: pd.DataFrame,
    names: Sequence[str],
    arguments: Sequence[dict[str, Any]],
) -> _Slices:
    start, end = frame["start_ns"].to_numpy(np.int64), frame["end_ns"].to_numpy(np.int64)
    return _Slices(process, thread, title, start, end, names, arguments)


def _collectives(process: int, rows: pd.DataFrame) -> Iterator[_Slices]:
    """Collectives in flight together lie on lanes of their own, since the slices of a thread must nest."""
    rows = rows.sort_values("start_ns", kind="stable")
    lanes = _lanes(rows["start_ns"].to_numpy(np.int64), rows["end_ns"].to_numpy(np.int64))
    arguments = np.array(_arguments(rows), dtype=object)
    for lane in range(int(lanes.max(initial=-1)) + 1):
        own = lanes == lane
        title = "collectives" if lane == 0 else f"collectives {lane + 1}"
        yield _slices(process, _COLLECTIVES + lane, title, rows[own], rows["op"][own].tolist(), list(arguments[own]))


def _arguments(rows: pd.DataFrame) -> list[dict[str, Any]]:
    wait_ms, lateness_ms = rows["wait_ns"].to_numpy(np.float64) / 1e6, rows["lateness_ns"].to_numpy(np.float64) / 1e6
    late = _late_ranks(rows)
    plain_columns = (rows[name].tolist() for name in ("group", "sequence", "bytes"))
    found = []
    for group, sequence, size, wait, by, rank in zip(*plain_columns, wait_ms, lateness_ms, late, strict=True):
        arguments = {"group": group, "sequence": sequence, "bytes": size}
        if math.isfinite(wait):
            arguments["wait_ms"] = round(wait, 6)
        if rank is not None:
            arguments |= {"late_rank": int(rank), "lateness_ms": round(by, 6)}
        found.append(arguments)
    return found


def _late_ranks(rows: pd.DataFrame) -> npt.NDArray[np.object_]:
    """The late rank of each row; None if nobody is blamed."""
    late = rows["late_rank"]
    return late.astype(object).where(late.notna(), None).to_numpy(np.object_)


def _waits(process: int, rows: pd.DataFrame, claims: Claims, cut_ns: int, known: Mapping[int, str]) -> _Slices:
    waits = (claims.split > claims.begin) & (claims.begin < cut_ns)
    waiting = rows.loc[claims.at[waits]]
    late = _late_ranks(waiting)
    names = [f"waits for {rank_name(int(rank), names=known)}" if rank is not None else "waits" for rank in late]
    arguments = [{"op": op} for op in waiting["op"]]
    end = np.minimum(claims.split[waits], cut_ns)
    return _Slices(process, _WAITS, "waits", claims.begin[waits], end, names, arguments)


def _gpus(process: int, gpu: pd.DataFrame) -> Iterator[_Slices]:
    for device, rows in gpu.groupby("device"):
        milliseconds = {f"{name}_ms": rows[f"{name}_ns"].to_numpy(np.float64) / 1e6 for name in ("compute", "comm")}
        arguments = [
            {name: round(float(values[index]), 6) for name, values in milliseconds.items()}
            for index in range(len(rows))
        ]
        names = [f"step {number}" for number in rows["step"]]
        yield _slices(process, _GPUS + int(str(device)), f"GPU {device}", rows, names, arguments)


def _gpu_time(process: int, stretches: pd.DataFrame) -> Iterator[_Slices]:
    """What each GPU does at each time: computation, communication, copies, and idle time by cause."""
    for device, own in stretches.groupby("device"):
        title, thread = f"GPU {device}: what it does", _GPU_TIME + int(str(device))
        yield _slices(process, thread, title, own, own["doing"].tolist(), [{}] * len(own))


def _lanes(start: Times, end: Times) -> npt.NDArray[np.int64]:
    """The lowest free lane for each interval, sorted by start."""
    lanes = np.zeros(len(start), dtype=np.int64)
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    count = 0
    for index, (begin, finish) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, count)
            count += 1
        lanes[index] = heapq.heappop(free)
        heapq.heappush(busy, (finish, int(lanes[index])))
    return lanes


def _metadata(study: Study, slices: Sequence[_Slices]) -> Iterator[str]:
    def event(kind: str, process: int, thread: int, arguments: dict[str, Any]) -> str:
        return json.dumps({"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments})

    for index, trace in enumerate(study.traces):
        process = index + 1
        who = trace_name(trace)
        yield event("process_name", process, 0, {"name": f"{who} ({plain(trace.node)})" if trace.node else who})
        yield event("process_sort_index", process, 0, {"sort_index": index})
    named = {(part.process, part.thread): part.thread_name for part in slices}
    for (process, thread), name in named.items():
        tid = process * _TIDS_PER_PROCESS + thread
        yield event("thread_name", process, tid, {"name": name})
        yield event("thread_sort_index", process, tid, {"sort_index": thread})


def _lines(part: _Slices, origin: int) -> list[str]:
    """Complete events ("X"), one JSON object a slice."""
    names = {name: json.dumps(plain(name)) for name in set(part.name)}
    where = f'"ph":"X","pid":{part.process},"tid":{part.process * _TIDS_PER_PROCESS + part.thread}'
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    starts = (part.start_ns - origin).tolist()
    lengths = np.maximum(part.end_ns - part.start_ns, 0).tolist()
    return [
        f'{{"name":{names[name]},{where},"ts":{_microseconds(start)},"dur":{_microseconds(length)}'
        + (f',"args":{encode(arguments)}}}' if arguments else "}")
        for start, length, name, arguments in zip(starts, lengths, part.name, part.arguments, strict=True)
    ]


def _microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
