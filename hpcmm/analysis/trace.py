"""What the analysis keeps of one rank: steps, phases, collectives and waits, small beside the report they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hpcmm.analysis import gpu_trace, osrt, phases, waitpid
from hpcmm.analysis.intervals import IntervalSet, Times
from hpcmm.annotate import schema
from hpcmm.reports.cuda import CudaEvents
from hpcmm.reports.events import Report

COLLECTIVE_COLUMNS = [
    "op",
    "group",
    "sequence",
    "occurrence",
    "bytes",
    "start_ns",
    "end_ns",
    "closed",
    "step",
    "phase",
]

OnClock = Callable[[Times], Times]
"""Maps a report's own times to the common clock."""


@dataclass(frozen=True, slots=True)
class RankTrace:
    """One training process of one report. All times are nanoseconds of one clock: the report's, then the run's."""

    rank: int
    node: str
    pid: int
    report: str
    steps: pd.DataFrame
    segments: pd.DataFrame
    collectives: pd.DataFrame
    blocked: IntervalSet | None
    """When the step thread waited in the OS; None where OS calls were not traced."""
    waits: pd.DataFrame
    osrt: pd.DataFrame
    calls: pd.DataFrame
    """OS time of the step thread by step, phase and function."""
    spans: int = 0
    """Ranges of the annotation that the process wrote."""
    unnumbered: int = 0
    """Ranges of steps that are left out because they carry no number (or a negative one), while others do."""
    device: int | None = None
    """The GPU that stands for an unknown rank, in a report without steps."""
    gpu: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.gpu_trace.gpu_rows` gives it; None where no GPU activity was traced."""
    projection: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.projection.aggregate` gives it."""
    batches: pd.DataFrame | None = None
    """step, phase and size of each batch that a phase was told of; None where none was."""
    starved: IntervalSet | None = None
    """When its GPUs were idle because the host had not launched more; None where no GPU activity was traced."""
    silences: IntervalSet | None = None
    """When no thread of the process entered or left an OS call, though some do all the time."""

    def on_clock(self, clock: OnClock) -> RankTrace:
        """The same trace with every time put through ``clock``."""

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(
                start_ns=clock(frame["start_ns"].to_numpy(np.int64)), end_ns=clock(frame["end_ns"].to_numpy(np.int64))
            )

        blocked = self.blocked and IntervalSet(clock(self.blocked.start_ns), clock(self.blocked.end_ns))
        return replace(
            self,
            steps=moved(self.steps),
            segments=moved(self.segments),
            collectives=moved(self.collectives),
            waits=moved(self.waits),
            gpu=None if self.gpu is None else moved(self.gpu),
            blocked=blocked,
            starved=self.starved and IntervalSet(clock(self.starved.start_ns), clock(self.starved.end_ns)),
            silences=self.silences and IntervalSet(clock(self.silences.start_ns), clock(self.silences.end_ns)),
        )


def extract_traces(report: Report, *, calls_alone: bool = False) -> list[RankTrace]:
    """One trace for each process of ``report`` that ran steps; without any, one for its busiest process.

    With ``calls_alone`` a trace holds steps and the summary of its OS calls, and what costs time is left out.

    The rank is what the process told in a mark, else the report's own where one process ran steps, else -1: the
    environment of a report of several ranks is their launcher's. Processes that run no steps go with the first that
    does.
    """
    ranges = report.nvtx[report.nvtx["domain"] == schema.DOMAIN]
    stepping = ranges[ranges["name"] == schema.STEP]
    workers = [int(pid) for pid in stepping["pid"].drop_duplicates()]
    roles = waitpid.process_roles(report.osrt, report.processes, frozenset(workers))
    family = waitpid.Family.of(report, roles)
    if not workers and report.cuda is not None:
        return _extract_devices(report, report.cuda, family, calls_alone=calls_alone)
    if not workers:
        workers = [pid for pid, role in roles.items() if role == waitpid.WORKER][:1]
    rank = report.identity.rank if len(workers) == 1 and report.identity.rank is not None else -1
    extract = _extract_calls if calls_alone else _extract
    return [extract(report, pid, report.ranks.get(pid, rank), family, workers) for pid in workers]


def _extract_devices(report: Report, cuda: CudaEvents, family: waitpid.Family, *, calls_alone: bool) -> list[RankTrace]:
    """One trace for each GPU of each process, which stand for ranks that nothing annotated."""
    used = cuda.activities[["pid", "device"]].drop_duplicates().sort_values(["pid", "device"])
    known = report.identity.rank if len(used) == 1 and report.identity.rank is not None else -1
    alone = used["pid"].value_counts()
    traces: list[RankTrace] = []
    pids = [int(pid) for pid in used["pid"].drop_duplicates()]
    for pid, device in used.itertuples(index=False):
        rank = report.ranks.get(int(pid), known) if alone[pid] == 1 else -1
        extract = _extract_calls if calls_alone else _extract
        own = extract(report, int(pid), rank, family, pids, int(device))
        if traces and traces[-1].pid == own.pid:
            # OS calls and ranges are the process's own: its first GPU has them.
            none = own.osrt.iloc[:0], own.waits.iloc[:0], own.calls.iloc[:0]
            own = replace(own, osrt=none[0], waits=none[1], calls=none[2], projection=None)
        traces.append(own)
    return traces


def _extract(
    report: Report, pid: int, rank: int, family: waitpid.Family, workers: list[int], device: int | None = None
) -> RankTrace:
    mine = report.nvtx[report.nvtx["pid"] == pid]
    ranges = mine[(mine["domain"] == schema.DOMAIN) & (mine["kind"] != 60)]
    tid = _step_thread(ranges, pid)
    ranges = ranges[ranges["tid"] == tid]
    steps = phases.find_steps(ranges)
    segments = phases.flatten(ranges, steps)
    calls = _calls_of(report.osrt, pid, workers)
    step_set = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    host = gpu_trace.HostSide(
        pid=pid,
        device=device,
        steps=steps,
        segments=segments,
        collectives=_collectives(mine[mine["domain"] == schema.COMM_DOMAIN], segments),
        blocked=osrt.blocked_intervals(report.osrt, pid, tid),
    )
    gpu = gpu_trace.of_process(host, report.cuda)
    return RankTrace(
        rank=rank,
        node=report.identity.node or "",
        pid=pid,
        report=report.path.name,
        steps=steps,
        segments=segments,
        collectives=gpu.collectives.drop(columns="tid"),
        blocked=gpu.blocked,
        waits=waitpid.find_waits(calls, family, (pid, tid), segments),
        osrt=osrt.summarise(calls, family.roles, (pid, tid), step_set),
        calls=osrt.calls_by_phase(report.osrt, pid, tid, segments),
        spans=len(mine),
        unnumbered=phases.unnumbered_steps(ranges),
        device=device,
        gpu=gpu.rows,
        projection=gpu.projection,
        starved=gpu.starved,
        batches=phases.batch_sizes(ranges, steps),
        silences=osrt.silences(report.osrt, pid),
    )


def _extract_calls(
    report: Report, pid: int, rank: int, family: waitpid.Family, workers: list[int], device: int | None = None
) -> RankTrace:
    """Steps and the summary of OS calls; all else is empty."""
    mine = report.nvtx[(report.nvtx["pid"] == pid) & (report.nvtx["domain"] == schema.DOMAIN)]
    steps_only = mine[(mine["name"] == schema.STEP) & (mine["kind"] != 60)]
    tid = _step_thread(steps_only, pid)
    steps = phases.find_steps(steps_only[steps_only["tid"] == tid])
    nothing = steps_only.iloc[:0]
    segments = phases.flatten(nothing, steps.iloc[:0])
    none = osrt.calls_by_phase(report.osrt.iloc[:0], pid, tid, segments)
    step_set = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    return RankTrace(
        rank=rank,
        node=report.identity.node or "",
        pid=pid,
        report=report.path.name,
        steps=steps,
        segments=segments,
        collectives=_collectives(nothing, segments).drop(columns="tid"),
        blocked=None,
        waits=pd.DataFrame(columns=waitpid.WAIT_COLUMNS),
        osrt=osrt.summarise(_calls_of(report.osrt, pid, workers), family.roles, (pid, tid), step_set),
        calls=none,
        device=device,
    )


def _calls_of(osrt: pd.DataFrame, pid: int, workers: list[int]) -> pd.DataFrame:
    """OS calls of one of ``workers``; the first has those of all other processes, too."""
    if len(workers) == 1:
        return osrt
    process = osrt["pid"]
    return osrt[(process == pid) | ~process.isin(workers)] if pid == workers[0] else osrt[process == pid]


def _step_thread(ranges: pd.DataFrame, pid: int) -> int:
    """The thread with the most steps; a process's first thread, whose tid is the pid, when there are none."""
    steps = ranges.loc[ranges["name"] == schema.STEP, "tid"]
    return int(steps.mode().iloc[0]) if len(steps) else pid


def _collectives(ranges: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """Collectives of one process in the order of their enqueue, with the step and phase they were enqueued in."""
    parsed = [schema.CollectiveName.parse(name) for name in ranges["name"]]
    known = np.array([name is not None for name in parsed], dtype=bool)
    frame = ranges[known].reset_index(drop=True)
    parts = [name for name in parsed if name is not None]
    frame = frame.assign(
        op=[name.op for name in parts],
        group=[name.group for name in parts],
        sequence=np.array([name.sequence for name in parts], dtype=np.int64),
        bytes=np.array([name.bytes for name in parts], dtype=np.int64),
    )
    frame["occurrence"] = frame.groupby(["group", "op", "sequence"]).cumcount()
    frame["step"], frame["phase"] = phases.locate(segments, frame["start_ns"].to_numpy(np.int64))
    return frame[[*COLLECTIVE_COLUMNS, "tid"]]


MAX_PHASES = 100
OTHERS = "(other phases)"


def group_rare_phases(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """``traces`` with the :data:`MAX_PHASES` phases that take most time over all ranks, the rest as :data:`OTHERS`."""
    names = {str(name) for trace in traces for name in trace.segments["phase"].unique()}
    if len(names) <= MAX_PHASES:
        return list(traces)
    lengths = pd.concat(
        [
            pd.DataFrame(
                {"phase": trace.segments["phase"], "ns": trace.segments["end_ns"] - trace.segments["start_ns"]}
            )
            for trace in traces
        ]
    )
    longest = lengths.groupby("phase")["ns"].sum().sort_values(ascending=False, kind="stable")
    kept = {*longest.index[: MAX_PHASES - 1], phases.OTHER, ""}

    def folded(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(phase=frame["phase"].where(frame["phase"].isin(kept), OTHERS))

    return [
        replace(
            trace,
            segments=folded(trace.segments),
            collectives=folded(trace.collectives),
            waits=folded(trace.waits),
            calls=folded(trace.calls),
            batches=None if trace.batches is None else folded(trace.batches),
        )
        for trace in traces
    ]
