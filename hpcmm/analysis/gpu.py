"""Where each GPU's time went: compute, communication, their overlap, idle time and whose fault that is.

With the definitions of HolisticTraceAnalysis: compute is the union of all kernels but NCCL's, communication the union
of NCCL's, overlap what lies in both, exposed communication the rest of it, and idle what no activity covers.

A step's window on a device starts when the host begins the step, or when the device has finished what earlier steps
launched, whichever is later. It ends with the last activity that the step launched, or with the step itself. So work
that runs behind the host counts in the step that launched it, and the windows of a device never meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet, Times
from hpcmm.analysis.nccl import is_nccl
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.reports.cuda import COPY, GRAPH, KERNEL, SET, UNKNOWN

BACK_TO_BACK_NS = 10_000
"""A gap up to this between activities that were both launched in time is what a device needs between two kernels."""

HOST = "host"
"""The next activity was launched only after the device had become idle."""
LATENCY, BACK_TO_BACK, DEPENDENCY, UNTRACED = (
    "launch latency",
    "gaps between kernels",
    "waiting for another stream or device",
    "launch not traced",
)
CAUSES = (HOST, LATENCY, BACK_TO_BACK, DEPENDENCY, UNTRACED)

GPU_COLUMNS = [
    "device", "step", "start_ns", "end_ns", "span_ns", "compute_ns", "comm_ns", "memory_ns", "overlap_ns",
    *(f"idle_{index}_ns" for index in range(len(CAUSES))), "idle_sync_ns",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """What one device did, as sets of intervals; ``idle`` by cause, within the span that was asked for."""

    compute: IntervalSet
    comm: IntervalSet
    memory: IntervalSet
    overlap: IntervalSet
    idle: dict[str, IntervalSet]
    idle_sync: IntervalSet
    """What of idle[HOST] began while the host waited for the device."""


def device_time(
    activities: pd.DataFrame, low_ns: int, high_ns: int, synchronisations: IntervalSet | None = None
) -> DeviceTime:
    """Sort the time of one device, whose ``activities`` are sorted by start, into sets; idle within [low, high).

    ``synchronisations``: when the host waited for the device.
    """
    start, end = activities["start_ns"].to_numpy(np.int64), activities["end_ns"].to_numpy(np.int64)
    kind = activities["kind"].to_numpy(str)
    nccl = is_nccl(activities)
    compute = _union(start, end, np.isin(kind, [KERNEL, GRAPH]) & ~nccl)
    comm = _union(start, end, nccl)
    memory = _union(start, end, np.isin(kind, [COPY, SET]))
    busy = IntervalSet.union_of(start, end)
    whole = IntervalSet.union_of([low_ns], [high_ns])
    idle = _by_cause(whole.subtract(busy), activities)
    waited = synchronisations or IntervalSet.empty()
    begun = waited.covered_within(idle[HOST].start_ns - 1, idle[HOST].start_ns + 1) > 0
    after = IntervalSet(idle[HOST].start_ns[begun], idle[HOST].end_ns[begun])
    return DeviceTime(compute, comm, memory, compute.intersect(comm), idle, after)


def _union(start: Times, end: Times, chosen: npt.NDArray[np.bool_]) -> IntervalSet:
    return IntervalSet.union_of(start[chosen], end[chosen])


def _by_cause(gaps: IntervalSet, activities: pd.DataFrame) -> dict[str, IntervalSet]:
    """Split idle gaps by when the activity that ends each was launched. After the last one nothing was launched."""
    order = np.lexsort((activities["launch_ns"], activities["start_ns"]))
    start = activities["start_ns"].to_numpy(np.int64)[order]
    following = np.searchsorted(start, gaps.end_ns, side="left")
    last = following == len(start)
    at = order[np.minimum(following, len(start) - 1)] if len(start) else following
    launch, launched = (activities[name].to_numpy(np.int64)[at] for name in ("launch_ns", "launch_end_ns"))
    known = launch != UNKNOWN
    cause = np.select(
        [last | (known & (launch >= gaps.start_ns)), ~known, launched > gaps.start_ns,
         gaps.end_ns - gaps.start_ns <= BACK_TO_BACK_NS],
        [HOST, UNTRACED, LATENCY, BACK_TO_BACK],
        DEPENDENCY,
    )  # fmt: skip
    return {name: IntervalSet(gaps.start_ns[cause == name], gaps.end_ns[cause == name]) for name in CAUSES}


def gpu_rows(
    activities: pd.DataFrame, steps: pd.DataFrame, synchronisations: IntervalSet | None = None
) -> pd.DataFrame:
    """One row a device and step of a process (GPU_COLUMNS), and one a device for what lies outside its steps.

    ``activities`` are those of the process, ``steps`` its steps on the host. Without steps there is one row a device,
    from its first activity to its last. The columns idle_0_ns ... are in the order of :data:`CAUSES`.
    """
    frames = [
        _device_rows(int(str(device)), own.reset_index(drop=True), steps, synchronisations)
        for device, own in activities.groupby("device", sort=True)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=GPU_COLUMNS)


def _device_rows(
    device: int, activities: pd.DataFrame, steps: pd.DataFrame, synchronisations: IntervalSet | None
) -> pd.DataFrame:
    start, end = step_windows(activities, steps)
    low = min(int(activities["start_ns"].min()), int(start.min(initial=np.iinfo(np.int64).max)))
    high = max(int(activities["end_ns"].max()), int(end.max(initial=0)))
    time = device_time(activities, low, high, synchronisations)
    sets = (time.compute, time.comm, time.memory, time.overlap, *time.idle.values(), time.idle_sync)
    within = np.stack([each.covered_within(start, end) for each in (IntervalSet.union_of([low], [high]), *sets)])
    whole = np.array([high - low, *(each.total_ns for each in sets)])
    # Windows are disjoint, so what is left lies outside every step.
    rows = np.concatenate((within, (whole - within.sum(axis=1))[:, None]), axis=1)
    number = np.append(steps["step"].to_numpy(np.int64), OUTSIDE)
    frame = pd.DataFrame(
        np.concatenate((np.stack((np.append(start, low), np.append(end, high))), rows)).T, columns=GPU_COLUMNS[2:]
    )
    frame.insert(0, "step", number)
    frame.insert(0, "device", device)
    return frame[(frame["step"] != OUTSIDE) | (frame["span_ns"] > 0)]


def step_windows(activities: pd.DataFrame, steps: pd.DataFrame) -> tuple[Times, Times]:
    """Start and end of each step's window on one device. A window is empty where its step had no time on the device."""
    host_start, host_end = steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64)
    if not len(host_start):
        return host_start, host_end
    launch = activities["launch_ns"].to_numpy(np.int64)
    index = np.searchsorted(host_start, launch, side="right") - 1
    inside = (launch != UNKNOWN) & (index >= 0) & (launch < host_end[index])
    end = host_end.copy()
    np.maximum.at(end, index[inside], activities["end_ns"].to_numpy(np.int64)[inside])
    busy_until = np.concatenate(([np.iinfo(np.int64).min], np.maximum.accumulate(end)[:-1]))
    start = np.maximum(host_start, busy_until)
    return start, np.maximum(start, end)
