"""When a whole process stood still: no thread of it entered or left any OS call, though some do so all the time.

A process that is stopped (SIGSTOP, a debugger, a freezer, a machine that swaps) while it is in a collective looks like
a slow transfer to all others; its silence tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis.delay_costs import Floats, exposed_communication
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.steps import StepTimes
from hpcmm.analysis.trace import RankTrace


def find_process_stalls(
    traces: Sequence[RankTrace], steps: StepTimes, collectives: pd.DataFrame
) -> list[tuple[int, Floats]]:
    """Traces whose process stood still within a collective, and the seconds that each such step lost by it.

    The loss, shape (steps,), is a mean over ranks: what of the silence the ranks spent in exposed transfer.
    """
    found: list[tuple[int, Floats]] = []
    if not any(trace.silences is not None and len(trace.silences) for trace in traces):
        return found
    exposed = [exposed_communication(trace) for trace in traces]
    for index, trace in enumerate(traces):
        if trace.silences is None or not len(trace.silences):
            continue
        own = collectives[(collectives["trace"] == index) & collectives["closed"].astype(bool)]
        inside = _began_within(trace.silences, own)
        if not len(inside):
            continue
        shared = sum(
            (_by_step(inside.intersect(mine), trace.steps, steps) for mine in exposed), np.zeros(len(steps.numbers))
        )
        lost = np.asarray(shared / len(traces), dtype=np.float64)
        if lost.any():
            found.append((index, lost))
    return found


def _began_within(silences: IntervalSet, collectives: pd.DataFrame) -> IntervalSet:
    """The silences that began while a collective of the process was in flight, each cut to that collective's end."""
    start, end = collectives["start_ns"].to_numpy(np.int64), collectives["end_ns"].to_numpy(np.int64)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order]) if len(end) else end
    index = np.searchsorted(start, silences.start_ns, side="right") - 1
    within = (index >= 0) & (np.append(reach, 0)[index] > silences.start_ns)
    bound = np.append(reach, 0)[index]
    return IntervalSet(silences.start_ns[within], np.minimum(silences.end_ns, bound)[within])


def _by_step(intervals: IntervalSet, own_steps: pd.DataFrame, steps: StepTimes) -> Floats:
    bounds = own_steps.set_index("step")[["start_ns", "end_ns"]].reindex(steps.numbers).to_numpy(np.float64)
    there = np.isfinite(bounds).all(axis=1)
    found = np.zeros(len(steps.numbers))
    found[there] = (
        intervals.covered_within(bounds[there, 0].astype(np.int64), bounds[there, 1].astype(np.int64)) / NS_PER_S
    )
    return found
