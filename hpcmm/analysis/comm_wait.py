"""Rank by phase: how long communication kept the step thread, how much of it was waiting, for whom and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis import delay_costs
from hpcmm.analysis.delay_costs import UNEXPLAINED, Floats, Singles
from hpcmm.analysis.findings import AnalysisContext
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import NS_PER_S

COLUMNS = [
    "rank",
    "node",
    "phase",
    "wait_s_per_step",
    "transfer_s_per_step",
    "overlapped_s_per_step",
    "exposed_share",
    "overlapped_share",
    "waited_for_rank",
    "waited_for_s_per_step",
    "waited_for_phase",
    "step_share",
]


def comm_wait(context: AnalysisContext) -> pd.DataFrame:
    """One row a rank and phase with communication (COLUMNS), over the steps that are not warm-up."""
    traces, rows, steps, parts = context.traces, context.rows, context.steps, context.parts
    used = ["trace", "phase", "start_ns", "end_ns", "exposed_wait_ns", "exposed_transfer_ns"]
    inside = rows[used][rows["step"].isin(steps.numbers)]
    if inside.empty or not len(steps.numbers):
        return pd.DataFrame(columns=COLUMNS)
    per_step = NS_PER_S * len(steps.numbers)
    ranks = np.array([trace.rank for trace in traces])
    exposed = [delay_costs.exposed_communication(trace) for trace in traces]
    causes = [group.fractions for group in context.groups]
    found = []
    for phase, of_phase in inside.groupby("phase", sort=True):
        chosen = rows["step"].isin(steps.numbers) & (rows["phase"] == phase)
        matrix, culprit_parts = _waits_and_causes(_only(rows, chosen), causes, len(traces))
        for trace, own in of_phase.groupby("trace"):
            index = int(str(trace))
            wait, transfer = own["exposed_wait_ns"].sum() / per_step, own["exposed_transfer_ns"].sum() / per_step
            flight = IntervalSet.union_of(own["start_ns"], own["end_ns"])
            overlapped = flight.subtract(exposed[index]).total_ns / per_step
            busy = wait + transfer + overlapped
            most = int(matrix[index].argmax())
            waited = matrix[index, most] / per_step
            found.append(
                (
                    ranks[index],
                    traces[index].node,
                    phase,
                    wait,
                    transfer,
                    overlapped,
                    (wait + transfer) / busy if busy else np.nan,
                    overlapped / busy if busy else np.nan,
                    int(ranks[most]) if waited > 0 else None,
                    waited,
                    (*parts.names, UNEXPLAINED)[int(culprit_parts[most].argmax())] if waited > 0 else "",
                    (wait + transfer) / steps.mean_s,
                )
            )
    table = pd.DataFrame(found, columns=COLUMNS).astype({"waited_for_rank": "Int64"})
    return table.sort_values(["rank", "phase"], ignore_index=True)


def wait_matrix(rows: pd.DataFrame, traces: int, chosen: pd.Series[bool]) -> Floats:
    """Who waited (row) for whom (column) in the ``chosen`` rows, shape (traces, traces), nanoseconds."""
    total = np.zeros((traces, traces))
    for arrivals in delay_costs.group_arrivals(_only(rows, chosen)):
        total += delay_costs.waited_for(arrivals, traces)
    return total


def _only(rows: pd.DataFrame, chosen: pd.Series[bool]) -> pd.DataFrame:
    """All rows, with waiting in the ``chosen`` ones alone: which rank was late shows only among all of them."""
    return rows.assign(exposed_wait_ns=rows["exposed_wait_ns"].where(chosen, 0.0))


def _waits_and_causes(rows: pd.DataFrame, causes: Sequence[Singles], traces: int) -> tuple[Floats, Floats]:
    """The wait matrix, and by trace how much of the waiting that it caused arose in which part of its work."""
    matrix = np.zeros((traces, traces))
    by_part = np.zeros((traces, causes[0].shape[2] if causes else 1))
    for arrivals, cause in zip(delay_costs.group_arrivals(rows), causes, strict=True):
        matrix += delay_costs.waited_for(arrivals, traces)
        by_part[arrivals.members] += np.einsum("im,imp->mp", delay_costs.attribute_wait(arrivals).caused, cause)
    return matrix, by_part
