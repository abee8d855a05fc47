"""The timeline's data for the viewer: every rank's phases and collectives as packed arrays, fit for one page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import process_groups
from hpcmm.analysis.findings import CAUSES
from hpcmm.analysis.study import Study
from hpcmm.analysis.trace import OTHER, OUTSIDE, RankTrace
from hpcmm.page.headlines import plain, trace_name
from hpcmm.page.step_charts import kinds, ordered


def worst_step(study: Study, row: dict[Any, Any]) -> int | None:
    """Of a row of ``bottlenecks``: its own column ``worst_step`` if it has one, else the step with the most of it.

    For a rank or node that is its excess over the median of the others in the row's phases; for transfer and waiting
    the largest sum over ranks; else the largest mean over ranks.
    """
    given = row.get("worst_step")
    if given is not None and not pd.isna(given):
        return int(given)
    phases = [name for name in str(row["phase"] or "").split(", ") if name]
    lost = _loss_by_step(study, row, phases)
    lost = lost[lost.index.isin(study.steps.numbers)].dropna()
    if lost.empty or float(lost.max()) <= 0:
        lost = _durations(study, []).mean(axis=1)
        lost = lost[lost.index.isin(study.steps.numbers)].dropna()
    return int(str(lost.idxmax())) if len(lost) else None


def culprits(study: Study, row: dict[Any, Any]) -> list[int]:
    """Ranks that a row of ``bottlenecks`` is about; none if it blames nobody."""
    if not pd.isna(row["rank"]):
        return [int(row["rank"])]
    return [trace.rank for trace in study.traces if row["node"] and trace.node == row["node"]]


def _loss_by_step(study: Study, row: dict[Any, Any], phases: list[str]) -> pd.Series[float]:
    own = culprits(study, row)
    if own:
        durations = _durations(study, phases)
        mine = durations[[rank for rank in own if rank in durations]].mean(axis=1)
        others = durations.drop(columns=own, errors="ignore").median(axis=1)
        return mine - others.fillna(0.0)
    column = {CAUSES["transfer"]: "exposed_transfer_s", CAUSES["imbalance"]: "exposed_wait_s"}.get(str(row["cause"]))
    if column is None and str(row["cause"]).startswith("communication"):
        column = "exposed_transfer_s"
    if column is None:
        return _durations(study, phases).mean(axis=1)
    table = study.tables["collectives"]
    chosen = table[table["phase"].isin(phases)] if phases else table
    return chosen.groupby("step")[column].sum()


def _durations(study: Study, phases: list[str]) -> pd.DataFrame:
    """Seconds by step (row) and rank (column): in ``phases``, or of the whole step where none of them is a phase."""
    table = study.tables["phases"]
    chosen = table[table["phase"].isin(phases) & table["step"].notna()]
    if chosen.empty:
        return study.tables["steps"].pivot_table(index="step", columns="rank", values="duration_s", aggfunc="sum")
    return chosen.pivot_table(index="step", columns="rank", values="duration_s", aggfunc="sum", fill_value=0.0)


MIN_UNIT_NS = 1000
"""Times are unsigned 32-bit counts of a unit: a microsecond, or longer if the run is longer than 71 minutes."""
MAX_SEGMENTS = 1_000_000
"""More than this would make the page heavy: the shortest are left out, and the page says so."""
MAX_COLLECTIVES = 400_000
"""Likewise."""
MAX_NAMES = 255
SHORTEST_OTHER_NS = 20_000
"""Slivers between two phases that are shorter are not drawn."""
NO_RANK = -(2**31)

Arrays = dict[str, npt.NDArray[Any]]


class _Lane(NamedTuple):
    """A row of the timeline: a rank, or one of its GPUs with what that does as its segments."""

    name: str
    rank: int
    """NO_RANK for a GPU, which no row of ``bottlenecks`` names."""
    trace: RankTrace


def _lanes(study: Study) -> Iterator[_Lane]:
    for trace in study.traces:
        if len(trace.segments) or len(trace.collectives):
            yield _Lane(trace_name(trace), trace.rank, trace)
        if trace.device_time is None:
            continue
        for device, own in trace.device_time.groupby("device"):
            segments = own.rename(columns={"doing": "phase"}).assign(step=OUTSIDE)
            name = trace_name(trace) if trace.device is not None else f"GPU {device} of {trace_name(trace)}"
            gpu = replace(trace, segments=segments, collectives=trace.collectives.iloc[:0])
            yield _Lane(f"{name}: what it does" if trace.device is not None else name, NO_RANK, gpu)


def timeline(study: Study) -> dict[str, Any]:
    """JSON-ready data of the viewer: unit, lanes, names, and arrays over all lanes in turn.

    An array is its bytes in little-endian order, first bytes of all elements first, deflated, base64.
    ``phase``: gap (from the end of the one before), length, code, step. ``comm``: delta (from the start of the one
    before), length, wait, code, sequence, bytes, late. ``steps``: number, start and end over all lanes.
    """
    lanes = list(_lanes(study))
    traces = [lane.trace for lane in lanes]
    span = max((_last_ns(trace) for trace in traces), default=0)
    unit = max(MIN_UNIT_NS, -(-span // (2**32 - 1)))
    names = ordered(str(name) for trace in traces for name in trace.segments["phase"].unique())[:MAX_NAMES]
    shortest, short = _shortest_drawn(traces)
    phases = [_phase_arrays(trace, names, unit, shortest) for trace in traces]
    comm, comm_names, comm_short = _collective_arrays(study, traces, unit)
    return {
        "unit_ns": int(unit),
        "phases": [plain(name) for name in names],
        "kinds": kinds(names),
        "collectives": comm_names,
        "left_out": {"phases": short, "collectives": comm_short},
        "lanes": [
            {
                "rank": lane.rank,
                "name": lane.name,
                "node": plain(lane.trace.node),
                "phases": len(own["gap"]),
                "comm": len(part["delta"]),
            }
            for lane, own, part in zip(lanes, phases, comm, strict=True)
        ],
        "phase": _pack_all(phases),
        "comm": _pack_all(comm),
        "steps": _steps(traces, unit),
    }


def _last_ns(trace: RankTrace) -> int:
    return max(int(frame["end_ns"].max()) for frame in (trace.segments, trace.collectives) if len(frame))


def _units(times_ns: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.uint32]:
    return np.clip(times_ns // unit, 0, 2**32 - 1).astype(np.uint32)


def _shortest_drawn(traces: Sequence[RankTrace]) -> tuple[int, int]:
    """Segments shorter than the first number (ns) are not drawn; the second is how many those are."""
    lengths = [trace.segments["end_ns"].to_numpy() - trace.segments["start_ns"].to_numpy() for trace in traces]
    whole = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
    if len(whole) <= MAX_SEGMENTS:
        return 0, 0
    limit = int(np.partition(whole, len(whole) - MAX_SEGMENTS)[len(whole) - MAX_SEGMENTS]) + 1
    return limit, int((whole < limit).sum())


def _phase_arrays(trace: RankTrace, names: Sequence[str], unit: int, shortest_ns: int) -> Arrays:
    segments = trace.segments
    length = segments["end_ns"] - segments["start_ns"]
    drawn = (length >= shortest_ns) & ((segments["phase"] != OTHER) | (length >= SHORTEST_OTHER_NS))
    segments = segments[drawn]
    start = _units(segments["start_ns"].to_numpy(np.int64), unit)
    end = np.maximum(_units(segments["end_ns"].to_numpy(np.int64), unit), start)
    code = {name: index for index, name in enumerate(names)}
    return {
        "gap": start - np.append(np.uint32(0), end)[: len(start)],
        "length": end - start,
        "code": segments["phase"].map(code).fillna(len(names) - 1).to_numpy(np.uint8),
        "step": segments["step"].to_numpy(np.int32),
    }


def _collective_arrays(study: Study, traces: Sequence[RankTrace], unit: int) -> tuple[list[Arrays], list[str], int]:
    """Arrays by trace, the collectives' names, and how many were left out."""
    rows = study.collectives
    left_out = max(0, len(rows) - MAX_COLLECTIVES)
    if left_out:
        length = (rows["end_ns"] - rows["start_ns"]).to_numpy(np.int64)
        rows = rows.iloc[np.sort(np.argpartition(length, left_out)[left_out:])]
    labels = rows["op"].astype(str) + " in " + process_groups.labels(rows) if len(rows) else pd.Series(dtype=str)
    codes, names = pd.factorize(labels, sort=True)
    rows = rows.assign(code=np.minimum(codes, 2**16 - 1)).sort_values("start_ns", kind="stable")
    start = _units(rows["start_ns"].to_numpy(np.int64), unit)
    end = np.maximum(_units(rows["end_ns"].to_numpy(np.int64), unit), start)
    whole = {
        "length": end - start,
        "wait": _units(rows["wait_ns"].fillna(0).to_numpy(np.float64).astype(np.int64), unit),
        "code": rows["code"].to_numpy(np.uint16),
        "sequence": rows["sequence"].clip(0, 2**32 - 1).to_numpy(np.uint32),
        "bytes": rows["bytes"].to_numpy(np.float32),
        "late": rows["late_rank"].fillna(NO_RANK).to_numpy(np.int32),
    }
    index_of = {id(trace): index for index, trace in enumerate(study.traces)}
    number = rows["trace"].to_numpy(np.intp)
    arrays = []
    for trace in traces:
        own = np.flatnonzero(number == index_of.get(id(trace), -1))
        delta = {"delta": np.diff(start[own], prepend=np.uint32(0))}
        arrays.append(delta | {name: values[own] for name, values in whole.items()})
    return arrays, [plain(name) for name in names[: 2**16]], left_out


def _steps(traces: Sequence[RankTrace], unit: int) -> dict[str, list[int]]:
    """Number, first start and last end of each step over the ranks."""
    frames = [trace.steps[["step", "start_ns", "end_ns"]] for trace in traces if len(trace.steps)]
    if not frames:
        return {"number": [], "start": [], "end": []}
    whole = pd.concat(frames, ignore_index=True)
    whole = whole[whole["step"] != OUTSIDE].groupby("step").agg({"start_ns": "min", "end_ns": "max"})
    whole = whole.sort_values("start_ns")
    return {
        "number": [int(str(number)) for number in whole.index],
        "start": _units(whole["start_ns"].to_numpy(np.int64), unit).tolist(),
        "end": _units(whole["end_ns"].to_numpy(np.int64), unit).tolist(),
    }


def _pack_all(lanes: Sequence[Arrays]) -> dict[str, str]:
    return {key: _pack([own[key] for own in lanes]) for key in lanes[0]} if lanes else {}


def _pack(arrays: Sequence[npt.NDArray[Any]]) -> str:
    whole = np.concatenate(arrays)
    raw = whole.astype(whole.dtype.newbyteorder("<")).view(np.uint8).reshape(len(whole), whole.dtype.itemsize)
    # Bytes of one weight lie together: the high ones hardly change, which deflate packs well.
    return base64.b64encode(zlib.compress(raw.T.tobytes(), 6)).decode("ascii")
