"""The tables ``gpu`` and ``projection`` as they are written; ``docs/tables.md`` explains the columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.gpu import CAUSES
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.trace import RankTrace

GPU_COLUMNS = [
    "rank", "node", "pid", "device", "step", "warmup", "start_s", "span_s", "compute_s", "comm_s", "memory_s",
    "overlap_s", "overlap_share", "exposed_comm_s", "comm_wait_s", "idle_s", "idle_host_s", "idle_sync_s",
    "idle_other_s", "idle_other_cause",
]  # fmt: skip
PROJECTION_COLUMNS = [
    "rank", "node", "pid", "domain", "range", "calls", "host_s", "gpu_envelope_s", "gpu_union_s", "gpu_self_s",
    "kernels", "copies",
]  # fmt: skip


def gpu_table(traces: Sequence[RankTrace], rows: pd.DataFrame, warmup_step: int | None) -> pd.DataFrame:
    """The ``gpu`` table (GPU_COLUMNS). ``rows``: matched collectives with ``wait_ns``, for comm_wait_s."""
    frames = [
        _in_seconds(trace, trace.gpu, _waiting(rows, index, trace.gpu))
        for index, trace in enumerate(traces)
        if trace.gpu is not None and len(trace.gpu)
    ]
    if not frames:
        return pd.DataFrame(columns=GPU_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else -2)
    table["step"] = table["step"].astype("Int64").where(table["step"] != OUTSIDE)
    return table.sort_values(["rank", "device", "step"], ignore_index=True)[GPU_COLUMNS]


def _waiting(rows: pd.DataFrame, trace: int, gpu: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Nanoseconds of each row of ``gpu`` in which a collective's kernel on that device waited for another rank."""
    waited = np.zeros(len(gpu))
    if rows.empty or "device" not in rows:
        return waited
    mine = rows[(rows["trace"] == trace) & rows["device"].notna() & rows["wait_ns"].notna()]
    for device, own in mine.groupby("device"):
        begin = own["start_ns"].to_numpy(np.int64)
        waits = IntervalSet.union_of(begin, begin + own["wait_ns"].to_numpy(np.float64).astype(np.int64))
        at = np.flatnonzero(gpu["device"] == device)
        inside = (gpu["step"] != OUTSIDE).to_numpy()[at]
        covered = waits.covered_within(gpu["start_ns"].to_numpy(np.int64)[at], gpu["end_ns"].to_numpy(np.int64)[at])
        # The row of what lies outside the steps spans them.
        waited[at] = np.where(inside, covered, waits.total_ns - covered[inside].sum())
    return waited


def _in_seconds(trace: RankTrace, gpu: pd.DataFrame, waited_ns: npt.NDArray[np.float64]) -> pd.DataFrame:
    idle = gpu[[f"idle_{index}_ns" for index in range(len(CAUSES))]].to_numpy(np.float64)
    other = idle[:, 1:]
    cause = np.array(CAUSES[1:], dtype=object)[other.argmax(axis=1)]
    comm, overlap = gpu["comm_ns"].to_numpy(np.float64), gpu["overlap_ns"].to_numpy(np.float64)
    seconds = {
        "start_s": gpu["start_ns"],
        **{name: gpu[f"{name[:-2]}_ns"] for name in ("span_s", "compute_s", "comm_s", "memory_s", "overlap_s")},
        "exposed_comm_s": comm - overlap,
        "comm_wait_s": waited_ns,
        "idle_s": idle.sum(axis=1),
        "idle_host_s": idle[:, 0],
        "idle_sync_s": gpu["idle_sync_ns"],
        "idle_other_s": other.sum(axis=1),
    }
    share = np.divide(overlap, comm, out=np.full(len(gpu), np.nan), where=comm > 0)
    return gpu[["device", "step"]].assign(
        rank=trace.rank,
        node=trace.node,
        pid=trace.pid,
        overlap_share=share,
        idle_other_cause=np.where(other.sum(axis=1) > 0, cause, ""),
        **{name: np.asarray(values, dtype=np.float64) / NS_PER_S for name, values in seconds.items()},
    )


def projection_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """The ``projection`` table (PROJECTION_COLUMNS): most GPU time first within a rank."""
    times = ("host", "gpu_envelope", "gpu_union", "gpu_self")
    frames = [
        trace.projection.assign(
            rank=trace.rank,
            node=trace.node,
            pid=trace.pid,
            **{f"{name}_s": trace.projection[f"{name}_ns"] / NS_PER_S for name in times},
        )
        for trace in traces
        if trace.projection is not None and len(trace.projection)
    ]
    if not frames:
        return pd.DataFrame(columns=PROJECTION_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values("rank", kind="stable", ignore_index=True)[PROJECTION_COLUMNS]
