"""What the GPUs tell of one rank: device time by step, projected ranges, and the true times of its collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from hpcmm.analysis import nccl, phases
from hpcmm.analysis.gpu import HOST, device_time, gpu_rows
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.projection import aggregate
from hpcmm.reports.cuda import CudaEvents


@dataclass(frozen=True, slots=True)
class HostSide:
    """What is known of a process before its GPUs are looked at."""

    pid: int
    device: int | None
    """The one device to look at; None for all of the process."""
    steps: pd.DataFrame
    segments: pd.DataFrame
    collectives: pd.DataFrame
    """From the ranges of domain hpcmm.comm, with the thread that they began on as tid."""
    blocked: IntervalSet | None


class GpuSide(NamedTuple):
    """What changes once they have been: ``rows`` and ``projection`` are None without GPU activity."""

    collectives: pd.DataFrame
    blocked: IntervalSet | None
    rows: pd.DataFrame | None = None
    projection: pd.DataFrame | None = None
    starved: IntervalSet | None = None
    """When all its devices were idle because the host had not launched more."""


def of_process(host: HostSide, cuda: CudaEvents | None) -> GpuSide:
    """GPU time, projected ranges and collectives of one process, or of one of its devices."""
    if cuda is None:
        return GpuSide(host.collectives, host.blocked)
    chosen = cuda.activities["pid"] == host.pid
    if host.device is not None:
        chosen &= cuda.activities["device"] == host.device
    activities = cuda.activities[chosen].reset_index(drop=True)
    if activities.empty:
        return GpuSide(host.collectives, host.blocked)
    kernels = nccl.nccl_kernels(activities)
    if len(host.collectives) or kernels["device"].nunique() > 1:
        collectives = nccl.timed_by_kernels(host.collectives, kernels)
    else:
        collectives = _placed(nccl.collectives_of_kernels(kernels, cuda), kernels, host.segments)
    return GpuSide(
        collectives=collectives.sort_values("start_ns", kind="stable", ignore_index=True),
        blocked=_blocked(host.blocked, collectives, activities),
        rows=gpu_rows(activities, host.steps, _synchronisations(cuda, host.pid)),
        projection=aggregate(cuda, host.pid),
        starved=_starved(activities, host.steps),
    )


def _starved(activities: pd.DataFrame, steps: pd.DataFrame) -> IntervalSet:
    low = min(int(activities["start_ns"].min()), int(steps["start_ns"].min()) if len(steps) else 1 << 62)
    high = max(int(activities["end_ns"].max()), int(steps["end_ns"].max()) if len(steps) else 0)
    whole = IntervalSet.union_of([low], [high])
    for _, own in activities.groupby("device"):
        whole = whole.intersect(device_time(own.reset_index(drop=True), low, high).idle[HOST])
    return whole


def _synchronisations(cuda: CudaEvents, pid: int) -> IntervalSet:
    own = cuda.synchronisations[cuda.synchronisations["pid"] == pid]
    return IntervalSet.union_of(own["start_ns"], own["end_ns"])


def _placed(collectives: pd.DataFrame, kernels: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """Collectives in the step and phase that launched their kernels."""
    step, phase = phases.locate(segments, kernels["launch_ns"].to_numpy(np.int64))
    return collectives.assign(step=step, phase=phase, tid=kernels["launch_tid"].to_numpy(np.int64))


def _blocked(host: IntervalSet | None, collectives: pd.DataFrame, activities: pd.DataFrame) -> IntervalSet | None:
    """When communication kept the rank from computing.

    For collectives on the GPU that is while no other kernel runs there; for those on the host, while the step thread is
    blocked.
    """
    on_gpu = (collectives["basis"] != nccl.BY_NAME).to_numpy()
    if not on_gpu.any():
        return host
    exposed = [IntervalSet.empty()]
    for _, own in activities.groupby("device"):
        time = device_time(own.reset_index(drop=True), 0, 0)
        exposed.append(time.comm.subtract(time.compute))
    ours = collectives[~on_gpu]
    on_host = IntervalSet.union_of(ours["start_ns"], ours["end_ns"])
    exposed.append(on_host if host is None else on_host.intersect(host))
    return IntervalSet.union_of(
        np.concatenate([each.start_ns for each in exposed]), np.concatenate([each.end_ns for each in exposed])
    )
