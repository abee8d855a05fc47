"""The timeline's data for the viewer: every rank's phases and collectives as packed arrays, fit for one page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import first_claims
from hpcmm.analysis.phases import OTHER, OUTSIDE
from hpcmm.analysis.study import Study
from hpcmm.analysis.trace import RankTrace
from hpcmm.annotate.names import PHASES
from hpcmm.page.verdict import plain

MIN_UNIT_NS = 1000
"""Times are unsigned 32-bit counts of a unit: a microsecond, or longer where the run is longer than 71 minutes."""
MAX_COLLECTIVES = 2_000_000
"""More than this would make the page heavy; the rest is left out, and the page says so."""
SHORTEST_OTHER_NS = 20_000
"""Slivers between two phases that are shorter are not drawn."""


def timeline(study: Study) -> dict[str, Any]:
    """JSON-ready data of the viewer: unit, lanes, names, and arrays (deflated, base64) over all lanes in turn."""
    traces = [trace for trace in study.traces if len(trace.segments) or len(trace.collectives)]
    span = max((_last_ns(trace) for trace in traces), default=0)
    unit = max(MIN_UNIT_NS, -(-span // (2**32 - 1)))
    names = _phase_names(traces)
    phases = [_phase_arrays(trace, names, unit) for trace in traces]
    comm, comm_names, left_out = _collective_arrays(study, traces, unit)
    return {
        "unit_ns": int(unit),
        "phases": names,
        "collectives": comm_names,
        "left_out": left_out,
        "lanes": [
            {"rank": trace.rank, "node": plain(trace.node), "phases": len(own["start"]), "comm": len(part["start"])}
            for trace, own, part in zip(traces, phases, comm, strict=True)
        ],
        "phase": {key: _pack([own[key] for own in phases]) for key in ("start", "length", "code", "step")},
        "comm": {
            key: _pack([part[key] for part in comm])
            for key in ("start", "length", "begin", "end", "wait", "code", "sequence", "bytes", "late")
        },
        "steps": _step_marks(traces, unit),
    }


def _last_ns(trace: RankTrace) -> int:
    return max(int(frame["end_ns"].max()) for frame in (trace.segments, trace.collectives) if len(frame))


def _phase_names(traces: Sequence[RankTrace]) -> list[str]:
    """The usual phases first, in their order, then any other, then what no phase covers."""
    seen = {str(name) for trace in traces for name in trace.segments["phase"].unique()}
    extra = sorted(seen - set(PHASES) - {OTHER})
    return [*PHASES, *(plain(name) for name in extra), OTHER][:255]


def _units(times_ns: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.uint32]:
    return np.clip(times_ns // unit, 0, 2**32 - 1).astype(np.uint32)


def _phase_arrays(trace: RankTrace, names: Sequence[str], unit: int) -> dict[str, npt.NDArray[Any]]:
    segments = trace.segments
    length = segments["end_ns"] - segments["start_ns"]
    segments = segments[(segments["phase"] != OTHER) | (length >= SHORTEST_OTHER_NS)]
    start, end = segments["start_ns"].to_numpy(np.int64), segments["end_ns"].to_numpy(np.int64)
    code = {name: index for index, name in enumerate(names)}
    codes = [code.get(plain(name), len(names) - 1) for name in segments["phase"]]
    return {
        "start": _units(start, unit),
        "length": _units(end, unit) - _units(start, unit),
        "code": np.array(codes, dtype=np.uint8),
        "step": segments["step"].to_numpy(np.int32),
    }


def _collective_arrays(
    study: Study, traces: Sequence[RankTrace], unit: int
) -> tuple[list[dict[str, npt.NDArray[Any]]], list[str], int]:
    """Arrays by trace, the collectives' names, and how many were left out."""
    rows = study.collectives
    left_out = max(0, len(rows) - MAX_COLLECTIVES)
    rows = rows.sort_values("start_ns", kind="stable").head(MAX_COLLECTIVES)
    labels = rows["op"].astype(str) + " in group " + rows["group"].astype(str) if len(rows) else pd.Series(dtype=str)
    codes, names = pd.factorize(labels, sort=True)
    rows = rows.assign(code=codes)
    index_of = {trace.rank: index for index, trace in enumerate(study.traces)}
    arrays = []
    for trace in traces:
        own = rows[rows["trace"] == index_of[trace.rank]].sort_values("start_ns", kind="stable")
        start, end = own["start_ns"].to_numpy(np.int64), own["end_ns"].to_numpy(np.int64)
        begin, finish = first_claims(start, end)
        arrays.append(
            {
                "start": _units(start, unit),
                "length": _units(end, unit) - _units(start, unit),
                "begin": _units(begin, unit),
                "end": _units(finish, unit),
                "wait": _units(own["wait_ns"].fillna(0).to_numpy(np.float64).astype(np.int64), unit),
                "code": own["code"].to_numpy(np.uint16),
                "sequence": own["sequence"].clip(0, 2**32 - 1).to_numpy(np.uint32),
                "bytes": own["bytes"].to_numpy(np.float32),
                "late": own["late_rank"].fillna(-(2**31)).to_numpy(np.int32),
            }
        )
    return arrays, [plain(name) for name in names], left_out


def _step_marks(traces: Sequence[RankTrace], unit: int) -> list[list[int]]:
    """[step, start] of each step of the first rank that has steps."""
    steps = next((trace.steps for trace in traces if len(trace.steps)), None)
    if steps is None:
        return []
    numbers = steps["step"].to_numpy()
    starts = _units(steps["start_ns"].to_numpy(np.int64), unit)
    return [[int(number), int(start)] for number, start in zip(numbers, starts, strict=True) if number != OUTSIDE]


def _pack(arrays: Sequence[npt.NDArray[Any]]) -> str:
    """Little-endian array of all lanes, deflated, base64."""
    if not arrays:
        return ""
    whole = np.concatenate(arrays)
    raw = whole.astype(whole.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
