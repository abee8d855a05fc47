"""What the analysis keeps of one rank: steps, phases, collectives and waits, small beside the report they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hpcmm.analysis import osrt, phases, waitpid
from hpcmm.analysis.intervals import IntervalSet, Times
from hpcmm.annotate import names
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
            blocked=blocked,
        )


def extract_traces(report: Report) -> list[RankTrace]:
    """One trace for each process of ``report`` that ran steps; without any, one for its busiest process.

    The rank is the report's own where one process ran steps, else -1: a report of several ranks does not say which is
    which in its environment.
    """
    ranges = report.nvtx[report.nvtx["domain"] == names.DOMAIN]
    stepping = ranges[ranges["name"] == names.STEP]
    workers = [int(pid) for pid in stepping["pid"].drop_duplicates()]
    roles = waitpid.process_roles(report.osrt, report.processes, frozenset(workers))
    if not workers:
        workers = [pid for pid, role in roles.items() if role == waitpid.WORKER][:1]
    rank = report.identity.rank if len(workers) == 1 and report.identity.rank is not None else -1
    return [_extract(report, pid, rank, roles, len(workers)) for pid in workers]


def _extract(report: Report, pid: int, rank: int, roles: dict[int, str], workers: int) -> RankTrace:
    mine = report.nvtx[report.nvtx["pid"] == pid]
    ranges = mine[(mine["domain"] == names.DOMAIN) & (mine["kind"] != 60)]
    tid = _step_thread(ranges, pid)
    ranges = ranges[ranges["tid"] == tid]
    steps = phases.find_steps(ranges)
    segments = phases.flatten(ranges, steps)
    calls = report.osrt if workers == 1 else report.osrt[report.osrt["pid"] == pid]
    step_set = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    return RankTrace(
        rank=rank,
        node=report.identity.node or "",
        pid=pid,
        report=report.path.name,
        steps=steps,
        segments=segments,
        collectives=_collectives(mine[mine["domain"] == names.COMM_DOMAIN], segments),
        blocked=osrt.blocked_intervals(report.osrt, pid, tid),
        waits=waitpid.find_waits(calls, report.processes, roles, (pid, tid), segments),
        osrt=osrt.summarise(calls, roles, (pid, tid), step_set),
        calls=osrt.calls_by_phase(report.osrt, pid, tid, segments),
    )


def _step_thread(ranges: pd.DataFrame, pid: int) -> int:
    """The thread with the most steps; a process's first thread, whose tid is the pid, when there are none."""
    steps = ranges.loc[ranges["name"] == names.STEP, "tid"]
    return int(steps.mode().iloc[0]) if len(steps) else pid


def _collectives(ranges: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """Collectives of one process in the order of their enqueue, with the step and phase they were enqueued in."""
    parsed = [names.CollectiveName.parse(name) for name in ranges["name"]]
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
    start = frame["start_ns"].to_numpy(np.int64)
    index = np.searchsorted(segments["start_ns"].to_numpy(np.int64), start, side="right") - 1
    inside = (index >= 0) & (start < np.append(segments["end_ns"].to_numpy(np.int64), 0)[index])
    frame["step"] = np.where(inside, np.append(segments["step"].to_numpy(np.int64), 0)[index], phases.OUTSIDE)
    frame["phase"] = np.where(inside, np.append(segments["phase"].to_numpy(object), "")[index], "")
    return frame[COLLECTIVE_COLUMNS]
