"""Tables ``phases`` and ``phases_summary``: where each step of each rank went, communication set apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import collectives
from hpcmm.analysis.collectives import Claims
from hpcmm.analysis.intervals import IntervalSet, Times
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.phases import OUTSIDE
from hpcmm.analysis.steps import StepTimes
from hpcmm.analysis.trace import RankTrace

PHASE_COLUMNS = [
    "rank",
    "node",
    "step",
    "phase",
    "within",
    "duration_s",
    "useful_s",
    "wait_s",
    "transfer_s",
    "exposed_comm_s",
    "overlapped_comm_s",
    "comm_s",
    "warmup",
]
SUMMARY_COLUMNS = [
    "rank",
    "node",
    "phase",
    "within",
    "steps",
    "mean_s",
    "p50_s",
    "p95_s",
    "max_s",
    "variation",
    "s_per_step",
    "step_share",
    "warmup_s",
]


def phases_table(traces: Sequence[RankTrace], rows: pd.DataFrame, warmup_step: int | None) -> pd.DataFrame:
    """Time of each phase, and of each communication within it, in each step of each rank (PHASE_COLUMNS).

    ``rows`` are the matched collectives with waits. The rows of a step add up to the step.
    """
    claims = {claim.trace: claim for claim in collectives.claimed(rows, traces)}
    frames = [
        _of_trace(trace, claims.get(index), rows).assign(rank=trace.rank, node=trace.node)
        for index, trace in enumerate(traces)
        if len(trace.segments)
    ]
    if not frames:
        return pd.DataFrame(columns=PHASE_COLUMNS)
    table = pd.concat(frames, ignore_index=True)
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else OUTSIDE - 1)
    table = table.sort_values(["rank", "step", "phase", "within"], ignore_index=True)
    table["step"] = table["step"].astype("Int64").where(table["step"] != OUTSIDE)
    return table[PHASE_COLUMNS]


def _of_trace(trace: RankTrace, claims: Claims | None, rows: pd.DataFrame) -> pd.DataFrame:
    segments = trace.segments
    start, end = segments["start_ns"].to_numpy(np.int64), segments["end_ns"].to_numpy(np.int64)
    grouped = segments.groupby(["step", "phase"], sort=True)
    group = grouped.ngroup().to_numpy(np.intp)
    key = grouped.size().index.to_frame(index=False)

    def seconds(nanoseconds: Times) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = np.bincount(group, nanoseconds, minlength=len(key)) / NS_PER_S
        return total

    exposed = np.zeros(len(segments), dtype=np.int64)
    frames = []
    for op, wait, transfer in _communication(claims, rows, start, end):
        exposed += wait + transfer
        frames.append(
            key.assign(
                phase=op, within=key["phase"], useful_s=0.0, wait_s=seconds(wait), transfer_s=seconds(transfer)
            ).assign(overlapped_comm_s=0.0)
        )
    frames = [frame[frame["wait_s"] + frame["transfer_s"] > 0] for frame in frames]
    flight = IntervalSet.union_of(claims.begin, claims.end) if claims is not None else IntervalSet.empty()
    work = key.assign(within="", useful_s=seconds(end - start - exposed), wait_s=0.0, transfer_s=0.0)
    work["overlapped_comm_s"] = seconds(flight.covered_within(start, end) - exposed)
    table = pd.concat([work, *frames], ignore_index=True)
    table["exposed_comm_s"] = table["wait_s"] + table["transfer_s"]
    table["duration_s"] = table["useful_s"] + table["exposed_comm_s"]
    table["comm_s"] = table["exposed_comm_s"] + table["overlapped_comm_s"]
    return table


def _communication(
    claims: Claims | None, rows: pd.DataFrame, start: Times, end: Times
) -> Iterator[tuple[str, Times, Times]]:
    """Each op with its exposed wait and transfer within each segment, in nanoseconds."""
    if claims is None:
        return
    ops = rows["op"].to_numpy(object)[claims.at]
    for op in sorted(set(ops)):
        own = ops == op
        wait = _exposed(claims, claims.begin[own], claims.split[own])
        transfer = _exposed(claims, claims.split[own], claims.end[own])
        yield str(op), wait.covered_within(start, end), transfer.covered_within(start, end)


def _exposed(claims: Claims, start: Times, end: Times) -> IntervalSet:
    flight = IntervalSet.union_of(start, end)
    return flight if claims.blocked is None else flight.intersect(claims.blocked)


def phases_summary(phases: pd.DataFrame, steps: StepTimes) -> pd.DataFrame:
    """One row a rank, phase and communication within it (SUMMARY_COLUMNS), from table ``phases``.

    Mean, quantiles and variation (sample standard deviation over mean) are over the steps in which the phase occurs,
    warm-up left out; ``s_per_step`` spreads its time over all of them. The warm-up step is ``warmup_s``.
    """
    if phases.empty:
        return pd.DataFrame(columns=SUMMARY_COLUMNS)
    key = ["rank", "node", "phase", "within"]
    steady = phases[phases["step"].isin(steps.numbers)].groupby(key)["duration_s"]
    table = steady.agg(steps="size", mean_s="mean", max_s="max", total_s="sum", deviation_s="std")
    quantiles = steady.quantile(np.array([0.5, 0.95])).unstack()
    warm = phases[phases["warmup"]].groupby(key)["duration_s"].sum().rename("warmup_s")
    table = table.join(warm, how="outer")
    count = max(len(steps.numbers), 1)
    table = table.assign(
        steps=table["steps"].fillna(0).astype(np.int64),
        p50_s=quantiles[0.5] if len(quantiles) else np.nan,
        p95_s=quantiles[0.95] if len(quantiles) else np.nan,
        variation=table["deviation_s"] / table["mean_s"],
        s_per_step=table["total_s"].fillna(0.0) / count,
        step_share=table["total_s"].fillna(0.0) / count / steps.mean_s if steps.mean_s else np.nan,
    )
    summary: pd.DataFrame = table.reset_index().sort_values(key, ignore_index=True)
    return summary[SUMMARY_COLUMNS]
