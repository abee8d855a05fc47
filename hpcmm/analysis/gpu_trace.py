"""What the GPUs tell of one rank: where their time went, projected ranges, and the true times of its collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import completeness, copies, idle, nccl, phases
from hpcmm.analysis.idle import Host
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, Times
from hpcmm.analysis.nccl import is_communication
from hpcmm.analysis.phases import BACK_TO_BACK_NS
from hpcmm.analysis.projection import aggregate
from hpcmm.analysis.trace import OUTSIDE, DeviceWork, RankTrace, rows_of_ranks
from hpcmm.reports.report import COPY, GRAPH, KERNEL, SET, UNKNOWN, CudaEvents

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
    "device", "step", "start_ns", "end_ns", "span_ns", "compute_ns", "comm_ns", "memory_ns", "overlap_ns", "set_ns",
    *(f"idle_{index}_ns" for index in range(len(CAUSES))), "idle_sync_ns", "graph_ns", "shared_ns", "untraced_ns",
]  # fmt: skip
"""``set_ns``: memory sets alone. ``graph_ns``: whole CUDA graphs. ``shared_ns``: idle for this process while another
used the GPU. ``untraced_ns``: no records, although there was work."""


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """What one device did, as sets of intervals; ``idle`` by cause, within the span that was asked for."""

    compute: IntervalSet
    comm: IntervalSet
    memory: IntervalSet
    overlap: IntervalSet
    sets: IntervalSet
    """Memory sets with neither a kernel nor a copy beside them."""
    idle: dict[str, IntervalSet]

    @property
    def gaps(self) -> IntervalSet:
        """All that is idle."""
        return IntervalSet.union(*self.idle.values())

    def without(self, other: IntervalSet) -> DeviceTime:
        """The same with nothing idle in ``other``."""
        return replace(self, idle={cause: each.subtract(other) for cause, each in self.idle.items()})


def device_time(activities: pd.DataFrame, low_ns: int, high_ns: int) -> DeviceTime:
    """Sort the time of one device, whose ``activities`` are sorted by start, into sets; idle within [low, high)."""
    start, end = activities["start_ns"].to_numpy(np.int64), activities["end_ns"].to_numpy(np.int64)
    kind = activities["kind"].to_numpy(str)
    communication = is_communication(activities)
    compute = _union(start, end, np.isin(kind, [KERNEL, GRAPH]) & ~communication)
    comm = _union(start, end, communication)
    memory = _union(start, end, np.isin(kind, [COPY, SET]))
    sets = memory.subtract(_union(start, end, kind != SET))
    gaps = IntervalSet.union_of([low_ns], [high_ns]).subtract(IntervalSet.union_of(start, end))
    return DeviceTime(compute, comm, memory, compute.intersect(comm), sets, _by_cause(gaps, activities))


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


@dataclass(frozen=True, slots=True)
class NotIdle:
    """When a device without a record of the process is not known to be idle."""

    untraced: IntervalSet = field(default_factory=IntervalSet.empty)
    """Records are missing; may reach far beyond the capture."""
    others: Mapping[int, IntervalSet] = field(default_factory=dict)
    """When other processes used the same GPU, by device."""
    window_ns: tuple[int, int] | None = None
    """What of the run is looked at; None for all of it, as far as the device did something."""


class GpuRows(NamedTuple):
    """What is kept of the GPUs of a process: ``rows`` (GPU_COLUMNS), and the rows of the modules of these names."""

    rows: pd.DataFrame
    idle: pd.DataFrame
    copies: pd.DataFrame
    kernels: pd.DataFrame
    device_time: pd.DataFrame
    """As :func:`drawn_time` gives it."""


DRAWN_COLUMNS = ["device", "start_ns", "end_ns", "doing"]
MOST_DRAWN = 20_000
"""Of a device: the longest are kept."""


def drawn_time(time: DeviceTime) -> pd.DataFrame:
    """What a device does at each time, for a timeline: disjoint stretches (start_ns, end_ns, doing), sorted by start.

    Computation hides communication, and both hide copies, which hide memory sets.
    """
    copying = time.memory.subtract(time.compute).subtract(time.comm).subtract(time.sets)
    sets = [("computation", time.compute), ("communication", time.comm.subtract(time.compute)), ("copies", copying)]
    sets += [("memory sets", time.sets)]
    sets += [("idle: until the host launches" if cause == HOST else "idle", gaps) for cause, gaps in time.idle.items()]
    start, end = (np.concatenate([getattr(each, name) for _, each in sets]) for name in ("start_ns", "end_ns"))
    doing = np.repeat(np.array([told for told, _ in sets], dtype=object), [len(each) for _, each in sets])
    longest = np.argsort(start - end, kind="stable")[:MOST_DRAWN]
    at = longest[np.argsort(start[longest], kind="stable")]
    return pd.DataFrame({"start_ns": start[at], "end_ns": end[at], "doing": doing[at]})


def gpu_rows(activities: pd.DataFrame, steps: pd.DataFrame, host: Host, not_idle: NotIdle | None = None) -> GpuRows:
    """One row a device and step of a process (GPU_COLUMNS), and one a device for what lies outside its steps.

    ``activities`` are those of the process, ``steps`` its steps on the host. Without steps there is one row a device,
    of the window, or from its first activity to its last. Columns idle_0_ns ... are in the order of :data:`CAUSES`.
    """
    found = [
        _device_rows(int(str(device)), own.reset_index(drop=True), steps, host, not_idle or NotIdle())
        for device, own in activities.groupby("device", sort=True)
    ]
    columns = (GPU_COLUMNS, idle.COLUMNS, copies.COLUMNS, KERNEL_COLUMNS, DRAWN_COLUMNS)
    return GpuRows(
        *(
            pd.concat(frames, ignore_index=True)[names] if frames else pd.DataFrame(columns=names)
            for names, *frames in zip(columns, *found, strict=True)
        )
    )


def _device_rows(device: int, activities: pd.DataFrame, steps: pd.DataFrame, host: Host, not_idle: NotIdle) -> GpuRows:
    start, end = step_windows(activities, steps)
    low = min(int(activities["start_ns"].min()), int(start.min(initial=np.iinfo(np.int64).max)))
    high = max(int(activities["end_ns"].max()), int(end.max(initial=0)))
    if not_idle.window_ns is not None and steps.empty:
        low, high = not_idle.window_ns
    time = device_time(activities, low, high)
    shared = time.gaps.intersect(not_idle.others.get(device, IntervalSet.empty()))
    untraced = time.gaps.intersect(not_idle.untraced).subtract(shared)
    time = time.without(shared).without(untraced)
    whole_graphs = activities[activities["kind"] == GRAPH]
    graphs = IntervalSet.union_of(whole_graphs["start_ns"], whole_graphs["end_ns"])
    windows = pd.DataFrame({"step": steps["step"], "start_ns": start, "end_ns": end}, dtype=np.int64)
    explained = idle.split(time.idle, HOST, activities, host, windows)
    busy = (time.compute, time.comm, time.memory, time.overlap, time.sets)
    sets = (*busy, *time.idle.values(), explained.synchronising, graphs, shared, untraced)
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
    return GpuRows(
        frame[(frame["step"] != OUTSIDE) | (frame["span_ns"] > 0)],
        explained.rows.assign(device=device),
        copies.of_device(activities, time.compute, time.comm),
        kernel_rows(activities).assign(device=device),
        drawn_time(time).assign(device=device),
    )


def step_windows(activities: pd.DataFrame, steps: pd.DataFrame) -> tuple[Times, Times]:
    """Start and end of each step's window on one device. A window is empty if its step had no time on the device."""
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
    osrt: pd.DataFrame
    """OS calls of the report."""
    lost_gpu_records: bool = False
    """Whether nsys says that records of GPUs were lost, or may have been."""
    window_ns: tuple[int, int] | None = None
    """What of the run was asked for; None for all of it."""


class GpuSide(NamedTuple):
    """What changes once they have been: the fields but the first two are None without GPU activity."""

    collectives: pd.DataFrame
    blocked: IntervalSet | None
    found: GpuRows | None = None
    projection: pd.DataFrame | None = None
    starved: IntervalSet | None = None
    """When all its devices were idle because the host had not launched more."""
    device_work: DeviceWork | None = None
    missing: str = ""
    """Which records of its GPUs are missing, in words."""
    busy: Mapping[str, IntervalSet] = {}
    """When it used each GPU that has a UUID."""

    def kept(self) -> dict[str, Any]:
        """The fields of a RankTrace that tell of GPUs."""
        rows = {} if self.found is None else self.found._asdict()
        own = {name: getattr(self, name) for name in ("projection", "starved", "device_work")}
        return {"gpu": rows.pop("rows", None), **own, **rows}


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
    of_all = cuda.activities[cuda.activities["pid"] == host.pid]
    calls = cuda.calls[cuda.calls["pid"] == host.pid]
    untraced = completeness.untraced(of_all, calls, host.steps, host.lost_gpu_records)
    collective = nccl.is_nccl(cuda.activities)
    sharing = {
        int(device): completeness.sharing(cuda.activities, collective, host.pid, int(device))
        for device in activities["device"].unique()
    }
    not_idle = NotIdle(untraced, {device: found.others for device, found in sharing.items()}, host.window_ns)
    gpus = {device: shared.gpu for device, shared in sharing.items()}
    found = gpu_rows(activities, host.steps, idle.host_of(cuda, host.osrt, host.pid), not_idle)
    return GpuSide(
        collectives=collectives.sort_values("start_ns", kind="stable", ignore_index=True),
        blocked=_blocked(host.blocked, collectives, activities),
        projection=aggregate(cuda, host.pid),
        found=found._replace(rows=found.rows.assign(gpu=found.rows["device"].map(gpus))),
        starved=_starved(activities, host.steps, not_idle),
        device_work=phases.work_on_devices(activities, is_communication(activities), host.segments),
        missing=completeness.in_words(untraced, of_all, calls, host.steps),
        busy=completeness.busy(activities, gpus),
    )


def _starved(activities: pd.DataFrame, steps: pd.DataFrame, not_idle: NotIdle) -> IntervalSet:
    low = min(int(activities["start_ns"].min()), int(steps["start_ns"].min()) if len(steps) else 1 << 62)
    high = max(int(activities["end_ns"].max()), int(steps["end_ns"].max()) if len(steps) else 0)
    whole = IntervalSet.union_of([low], [high])
    # Without any launch it is not known that work was there: what the host does while the device is idle holds it up.
    is_launch_known = (activities["launch_ns"] != UNKNOWN).any()
    for device, own in activities.groupby("device"):
        time = device_time(own.reset_index(drop=True), low, high)
        idle = time.idle[HOST] if is_launch_known else time.gaps
        whole = whole.intersect(idle.subtract(not_idle.others.get(int(str(device)), IntervalSet.empty())))
    return whole.subtract(not_idle.untraced)


def _placed(collectives: pd.DataFrame, kernels: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """Collectives in the step and phase that launched their kernels, or in which these began if that is not known."""
    launched = (kernels["launch_ns"] != UNKNOWN).to_numpy(bool)
    at = kernels["launch_ns"].where(launched, kernels["start_ns"])
    step, phase = phases.locate(segments, at.to_numpy(np.int64))
    return collectives.assign(step=step, phase=phase, launched=launched, tid=kernels["launch_tid"].to_numpy(np.int64))


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
    return IntervalSet.union(*exposed)


GPU_TABLE_COLUMNS = [
    "rank", "node", "pid", "device", "step", "warmup", "start_s", "span_s", "compute_s", "comm_s", "memory_s",
    "overlap_s", "overlap_share", "exposed_comm_s", "comm_wait_s", "idle_s", "idle_host_s", "idle_sync_s",
    "idle_other_s", "idle_other_cause", "set_s", "graph_s", "shared_s", "untraced_s", "gpu",
]  # fmt: skip


def gpu_table(traces: Sequence[RankTrace], rows: pd.DataFrame, warmup_step: int | None) -> pd.DataFrame:
    """The ``gpu`` table (GPU_TABLE_COLUMNS). ``rows``: matched collectives with ``wait_ns``, for comm_wait_s."""
    of_kernels = rows[rows["device"].notna() & rows["wait_ns"].notna()] if "device" in rows else rows.iloc[:0]
    waiting = dict(iter(of_kernels.groupby("trace"))) if len(of_kernels) else {}
    whole = rows_of_ranks(
        (trace, None if trace.gpu is None else trace.gpu.assign(wait_ns=_waiting(waiting.get(index), trace.gpu)))
        for index, trace in enumerate(traces)
    )
    if whole is None:
        return pd.DataFrame(columns=GPU_TABLE_COLUMNS)
    table = _in_seconds(whole)
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else -2)
    table["step"] = table["step"].astype("Int64").where(table["step"] != OUTSIDE)
    table["gpu"] = pd.factorize(table["gpu"])[0]
    return table.sort_values(["rank", "device", "step"], ignore_index=True)[GPU_TABLE_COLUMNS]


def traced(gpu: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of table ``gpu`` have the records of (nearly) all their time."""
    return gpu["untraced_s"] <= completeness.MOST_UNTRACED * gpu["span_s"]


def traced_share(gpu: pd.DataFrame) -> float:
    """Share of the steps of table ``gpu`` that have their records; 1 if none has, or nothing was traced."""
    in_steps = gpu[gpu["step"].notna()] if len(gpu) else gpu
    share = float(traced(in_steps).mean()) if len(in_steps) else 1.0
    return share or 1.0


def counted(gpu: pd.DataFrame) -> pd.DataFrame:
    """The rows of table ``gpu`` that means are over: steps whose records are there, without the warm-up if there are
    others; or all rows of a capture without steps."""
    in_steps = gpu["step"].notna()
    if not in_steps.any():
        return gpu
    steady = in_steps & ~gpu["warmup"].astype(bool)
    return gpu[(steady if steady.any() else in_steps) & traced(gpu)]


def _waiting(rows: pd.DataFrame | None, gpu: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Nanoseconds of each row of ``gpu`` in which a collective's kernel on that device waited for another rank.

    ``rows``: collectives of the rank whose kernels and waits are known; None if there are none.
    """
    waited = np.zeros(len(gpu))
    for device, own in () if rows is None else rows.groupby("device"):
        begin = own["start_ns"].to_numpy(np.int64)
        waits = IntervalSet.union_of(begin, begin + own["wait_ns"].to_numpy(np.float64).astype(np.int64))
        at = np.flatnonzero(gpu["device"] == device)
        inside = (gpu["step"] != OUTSIDE).to_numpy()[at]
        covered = waits.covered_within(gpu["start_ns"].to_numpy(np.int64)[at], gpu["end_ns"].to_numpy(np.int64)[at])
        # The row of what lies outside the steps spans them.
        waited[at] = np.where(inside, covered, waits.total_ns - covered[inside].sum())
    return waited


def _in_seconds(gpu: pd.DataFrame) -> pd.DataFrame:
    idle = gpu[[f"idle_{index}_ns" for index in range(len(CAUSES))]].to_numpy(np.float64)
    other = idle[:, 1:]
    cause = np.array(CAUSES[1:], dtype=object)[other.argmax(axis=1)]
    comm, overlap = gpu["comm_ns"].to_numpy(np.float64), gpu["overlap_ns"].to_numpy(np.float64)
    seconds = {
        "start_s": gpu["start_ns"],
        **{name: gpu[f"{name[:-2]}_ns"] for name in ("span_s", "compute_s", "comm_s", "memory_s", "overlap_s")},
        "exposed_comm_s": comm - overlap,
        "comm_wait_s": gpu["wait_ns"],
        "idle_s": idle.sum(axis=1),
        "idle_host_s": idle[:, 0],
        "idle_sync_s": gpu["idle_sync_ns"],
        "idle_other_s": other.sum(axis=1),
        **{f"{name}_s": gpu[f"{name}_ns"] for name in ("set", "graph", "shared", "untraced")},
    }
    share = np.divide(overlap, comm, out=np.full(len(gpu), np.nan), where=comm > 0)
    return gpu[["rank", "node", "pid", "device", "step", "gpu"]].assign(
        overlap_share=share,
        idle_other_cause=np.where(other.sum(axis=1) > 0, cause, ""),
        **{name: np.asarray(values, dtype=np.float64) / NS_PER_S for name, values in seconds.items()},
    )


KERNEL_COLUMNS = ["device", "name", "calls", "total_ns", "time_share", "communication"]
MOST_KERNELS, OTHER_KERNELS = 100, "(other kernels)"


def kernel_rows(activities: pd.DataFrame) -> pd.DataFrame:
    """The kernels of one device by name (KERNEL_COLUMNS), longest in all first; beyond MOST_KERNELS they are summed."""
    kernels = activities[activities["kind"].isin([KERNEL, GRAPH])]
    frame = pd.DataFrame(
        {
            "name": kernels["name"].astype(object).where(kernels["kind"] == KERNEL, "(CUDA graph)"),
            "communication": is_communication(activities)[activities["kind"].isin([KERNEL, GRAPH])],
            "total_ns": kernels["end_ns"] - kernels["start_ns"],
        }
    )
    most = frame.groupby("name")["total_ns"].sum().nlargest(MOST_KERNELS).index
    frame["name"] = frame["name"].where(frame["name"].isin(most), OTHER_KERNELS)
    table = frame.groupby(["name", "communication"], as_index=False).agg(
        calls=("total_ns", "size"), total_ns=("total_ns", "sum")
    )
    table["time_share"] = table["total_ns"] / max(int(table["total_ns"].sum()), 1)
    return table.assign(device=0).sort_values("total_ns", ascending=False, kind="stable")[KERNEL_COLUMNS]


KERNELS_TABLE_COLUMNS = ["rank", "node", "pid", "device", "name", "calls", "total_s", "time_share", "communication"]


def kernels_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """The ``kernels`` table (KERNELS_TABLE_COLUMNS), longest in all first within a device."""
    table = rows_of_ranks((trace, trace.kernels) for trace in traces)
    if table is None:
        return pd.DataFrame(columns=KERNELS_TABLE_COLUMNS)
    return table.assign(total_s=table["total_ns"] / NS_PER_S)[KERNELS_TABLE_COLUMNS]
