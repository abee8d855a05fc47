"""Rank by phase: how long communication kept the step thread, how much of it was waiting, and for whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis.delay import Floats, exposed_communication, group_arrivals, waited_for
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.steps import StepTimes
from hpcmm.analysis.trace import RankTrace

COLUMNS = [
    "rank",
    "node",
    "phase",
    "wait_s_per_step",
    "transfer_s_per_step",
    "overlapped_s_per_step",
    "waited_for_rank",
    "waited_for_s_per_step",
    "step_share",
]


def comm_wait(traces: Sequence[RankTrace], rows: pd.DataFrame, steps: StepTimes) -> pd.DataFrame:
    """One row a rank and phase with communication (COLUMNS), over the steps that are not warm-up."""
    inside = rows[rows["step"].isin(steps.numbers)]
    if inside.empty or not len(steps.numbers):
        return pd.DataFrame(columns=COLUMNS)
    per_step = NS_PER_S * len(steps.numbers)
    ranks = np.array([trace.rank for trace in traces])
    found = []
    for phase, of_phase in inside.groupby("phase", sort=True):
        matrix = wait_matrix(rows, len(traces), rows["step"].isin(steps.numbers) & (rows["phase"] == phase))
        for trace, own in of_phase.groupby("trace"):
            index = int(str(trace))
            wait, transfer = own["exposed_wait_ns"].sum() / per_step, own["exposed_transfer_ns"].sum() / per_step
            flight = IntervalSet.union_of(own["start_ns"], own["end_ns"])
            overlapped = flight.subtract(exposed_communication(traces[index])).total_ns / per_step
            most = int(matrix[index].argmax())
            waited = matrix[index, most] / per_step
            late = int(ranks[most]) if waited > 0 else None
            share = (wait + transfer) / steps.mean_s
            found.append((ranks[index], traces[index].node, phase, wait, transfer, overlapped, late, waited, share))
    table = pd.DataFrame(found, columns=COLUMNS).astype({"waited_for_rank": "Int64"})
    return table.sort_values(["rank", "phase"], ignore_index=True)


def wait_matrix(rows: pd.DataFrame, traces: int, chosen: pd.Series[bool]) -> Floats:
    """Who waited (row) for whom (column) in the ``chosen`` rows, shape (traces, traces), nanoseconds."""
    # Instances stay whole: which rank was late shows only among all of them.
    rows = rows.assign(exposed_wait_ns=rows["exposed_wait_ns"].where(chosen, 0.0))
    total = np.zeros((traces, traces))
    for arrivals in group_arrivals(rows):
        total += waited_for(arrivals, traces)
    return total
