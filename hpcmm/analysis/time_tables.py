"""Tables of where time went: steps, phases with communication set apart, waiting, delays and the start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import collectives, delay_costs
from hpcmm.analysis.collectives import Claims
from hpcmm.analysis.delay_costs import UNEXPLAINED, Floats, Singles
from hpcmm.analysis.findings import AnalysisContext
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, Times
from hpcmm.analysis.phases import StepTimes
from hpcmm.analysis.trace import OUTSIDE, RankTrace

STEP_COLUMNS = ["rank", "node", "step", "start_s", "duration_s", "warmup"]


def steps_table(traces: Sequence[RankTrace], warmup_step: int | None) -> pd.DataFrame:
    """Start and duration of each closed step of each rank (STEP_COLUMNS)."""
    frames = [
        pd.DataFrame(
            {
                "rank": trace.rank,
                "node": trace.node,
                "step": closed["step"],
                "start_s": closed["start_ns"] / NS_PER_S,
                "duration_s": (closed["end_ns"] - closed["start_ns"]) / NS_PER_S,
                "warmup": closed["step"] == (warmup_step if warmup_step is not None else -2),
            }
        )
        for trace in traces
        if len(closed := trace.steps[trace.steps["closed"]])
    ]
    if not frames:
        return pd.DataFrame(columns=STEP_COLUMNS)
    return pd.concat(frames, ignore_index=True).sort_values(["rank", "step"], ignore_index=True)


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
    table["exposed_comm_s"] = table["wait_s"] + table["transfer_s"]
    table["duration_s"] = table["useful_s"] + table["exposed_comm_s"]
    table["comm_s"] = table["exposed_comm_s"] + table["overlapped_comm_s"]
    table["warmup"] = table["step"] == (warmup_step if warmup_step is not None else OUTSIDE - 1)
    table = table.sort_values(["rank", "step", "phase", "within"], ignore_index=True)
    table["step"] = table["step"].astype("Int64").where(table["step"] != OUTSIDE)
    return table[PHASE_COLUMNS]


def _of_trace(trace: RankTrace, claims: Claims | None, rows: pd.DataFrame) -> pd.DataFrame:
    segments = trace.segments
    start, end = segments["start_ns"].to_numpy(np.int64), segments["end_ns"].to_numpy(np.int64)
    grouped = segments.groupby(["step", "phase"], sort=True)
    group = grouped.ngroup().to_numpy(np.intp)
    step, phase = (grouped.size().index.get_level_values(name).to_numpy() for name in ("step", "phase"))

    def seconds(nanoseconds: Times) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = np.bincount(group, nanoseconds, minlength=len(step)) / NS_PER_S
        return total

    exposed = np.zeros(len(segments), dtype=np.int64)
    parts = []
    for op, wait, transfer in _communication(claims, rows, start, end):
        exposed += wait + transfer
        wait_s, transfer_s = seconds(wait), seconds(transfer)
        at = np.flatnonzero(wait_s + transfer_s > 0)
        none = np.zeros(len(at))
        parts.append((step[at], np.full(len(at), op, dtype=object), phase[at], none, wait_s[at], transfer_s[at], none))
    flight = IntervalSet.union_of(claims.begin, claims.end) if claims is not None else IntervalSet.empty()
    none, outermost = np.zeros(len(step)), np.full(len(step), "", dtype=object)
    useful, overlapped = seconds(end - start - exposed), seconds(flight.covered_within(start, end) - exposed)
    parts.insert(0, (step, phase, outermost, useful, none, none, overlapped))
    names = ("step", "phase", "within", "useful_s", "wait_s", "transfer_s", "overlapped_comm_s")
    return pd.DataFrame(dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True)))


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
    warm-up left out; ``s_per_step`` spreads its time over all of them. The warm-up step is ``warmup_s``. ``step_share``
    is of the rank's time from the end of one step to the end of the next.
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
    )
    period_s = table.index.get_level_values("rank").map(steps.periods_s).to_numpy(np.float64)
    table["step_share"] = (table["s_per_step"] / period_s).clip(upper=1.0)
    summary: pd.DataFrame = table.reset_index().sort_values(key, ignore_index=True)
    return summary[SUMMARY_COLUMNS]


COMM_WAIT_COLUMNS = [
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
    """One row a rank and phase with communication (COMM_WAIT_COLUMNS), over the steps that are not warm-up."""
    traces, rows, steps, parts = context.traces, context.rows, context.steps, context.parts
    used = ["trace", "phase", "start_ns", "end_ns", "exposed_wait_ns", "exposed_transfer_ns"]
    inside = rows[used][rows["step"].isin(steps.numbers)]
    if inside.empty or not len(steps.numbers):
        return pd.DataFrame(columns=COMM_WAIT_COLUMNS)
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
                    # What was begun in the last step may end after it.
                    min((wait + transfer) / steps.periods_s[traces[index].rank], 1.0),
                )
            )
    table = pd.DataFrame(found, columns=COMM_WAIT_COLUMNS).astype({"waited_for_rank": "Int64"})
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


DELAY_COLUMNS = ["rank", "node", "step", "phase", "lost_s"]


def delays_table(context: AnalysisContext) -> pd.DataFrame:
    """What each rank's delays cost, by step and part of its work (DELAY_COLUMNS), seconds as a mean over all ranks."""
    step, trace, part = np.nonzero(context.losses)
    names = np.array([*context.parts.names, UNEXPLAINED], dtype=object)
    table = pd.DataFrame(
        {
            "rank": np.array([trace.rank for trace in context.traces], dtype=np.int64)[trace],
            "node": np.array([trace.node for trace in context.traces], dtype=object)[trace],
            "step": context.steps.numbers[step],
            "phase": names[part],
            "lost_s": context.losses[step, trace, part],
        }
    )
    return table.sort_values(["rank", "step", "phase"], ignore_index=True)[DELAY_COLUMNS].astype(
        {"node": "str", "phase": "str"}
    )


STARTUP_COLUMNS = ("attempt", "part", "median_s", "longest_s", "slowest_rank", "ranks")
FIRST_STEP = "first step"
SET_UP = "imports and set-up"
BEFORE_STEPS = "before the first step"
"""Of a capture whose ranks recorded nothing: all since its first event."""


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The first step of a rank whose program notes none."""

    rank: int
    set_up_s: float
    """From the beginning of its process to the step's."""
    duration_s: float


def startup_table(records: Mapping[int, Iterable[Mapping[str, Any]]], firsts: Iterable[FirstStep] = ()) -> pd.DataFrame:
    """One row for each attempt and part of the start, in the order in which the parts happen.

    ``records``: by rank, the records of its metrics file. ``firsts`` count if these have no step, or if there are none.
    ``median_s`` and ``longest_s`` are over the ranks, of which ``ranks`` recorded the part. The last part, ``first
    step``, is the first step of the attempt. The parts of one rank follow one another, but ranks wait for each other in
    ``rendezvous`` and ``engine``, so the medians add up only roughly to the time of the whole start. Records that lack
    what they should hold are left out.
    """
    noted = [part for rank, of_rank in records.items() for part in _parts(rank, of_rank)]
    if noted and not any(name == FIRST_STEP for _, name, *_ in noted):
        newest, last = max(part[0] for part in noted), max(part[3] for part in noted)
        for first in firsts:
            noted.append((newest, SET_UP, first.rank, last + 1, first.set_up_s))
            noted.append((newest, FIRST_STEP, first.rank, last + 2, first.duration_s))
    if not noted:
        for first in firsts:
            noted.append((1, BEFORE_STEPS, first.rank, 1, first.set_up_s))
            noted.append((1, FIRST_STEP, first.rank, 2, first.duration_s))
    parts = pd.DataFrame(
        noted,
        columns=["attempt", "part", "rank", "order", "duration_s"],
    )
    rows = []
    for (attempt, part), group in parts.groupby(["attempt", "part"], sort=False):
        slowest = group.sort_values(["duration_s", "rank"]).iloc[-1]
        rows.append(
            {
                "attempt": attempt,
                "part": part,
                "median_s": group["duration_s"].median(),
                "longest_s": slowest["duration_s"],
                "slowest_rank": slowest["rank"],
                "ranks": group["rank"].nunique(),
                "order": group["order"].median(),
            }
        )
    table = pd.DataFrame(rows, columns=[*STARTUP_COLUMNS, "order"])
    return table.sort_values(["attempt", "order"], kind="stable", ignore_index=True)[list(STARTUP_COLUMNS)]


def _parts(rank: int, records: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, str, int, int, float]]:
    """(attempt, part, rank, order, duration_s) of each part of each attempt of one rank."""
    stepped: set[int] = set()
    for order, record in enumerate(records):
        event, attempt = record.get("event"), record.get("attempt", 1)
        if not isinstance(attempt, int):
            continue
        if event == "startup":
            part, duration_s = record.get("part"), record.get("duration_s")
        elif event in ("step", "lost") and attempt not in stepped:
            stepped.add(attempt)
            part, duration_s = FIRST_STEP, record.get("step_s")
        else:
            continue
        if isinstance(part, str) and isinstance(duration_s, int | float) and math.isfinite(duration_s):
            yield attempt, part, rank, order, float(duration_s)
