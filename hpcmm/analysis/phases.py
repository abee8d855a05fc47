"""From a rank's nested NVTX ranges to steps and to a partition of each step into phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, first_claims
from hpcmm.analysis.trace import OTHER, OUTSIDE, DeviceWork, RankTrace
from hpcmm.annotate import schema
from hpcmm.reports.report import UNKNOWN

SEGMENT_COLUMNS = ["step", "phase", "start_ns", "end_ns"]
STEP_COLUMNS = ["step", "start_ns", "end_ns", "closed"]


def settle_steps(ranges: pd.DataFrame) -> pd.DataFrame:
    """``ranges`` with one kind of steps in each process: its own, or, if it has none, the automatic ones.

    An automatic step ends when the work of the next one begins. A program's last one therefore lasts until nsys ends
    it with the process: it is cut where its optimizer ended. It stays open if other work of a step came after that.
    """
    annotated = ranges["domain"] == schema.DOMAIN
    automatic = annotated & (ranges["name"] == schema.AUTOMATIC_STEP)
    if not automatic.any():
        return ranges
    own = ranges.loc[annotated & (ranges["name"] == schema.STEP), "pid"].unique()
    last = ranges[automatic & ~ranges["pid"].isin(own)].groupby("pid")["start_ns"].idxmax()
    nothing: list[Any] = []
    """Last steps that brought a batch and did nothing with it."""
    settled = ranges.assign(name=ranges["name"].mask(automatic, schema.STEP))
    for index in last:
        pid, tid, start_ns, end_ns = ranges.loc[index, ["pid", "tid", "start_ns", "end_ns"]]
        here = annotated & (ranges["pid"] == pid) & (ranges["tid"] == tid) & ranges["name"].isin(AUTOMATIC_PHASES)
        within = ranges[here & ranges["start_ns"].between(start_ns, end_ns)]
        ended = within.loc[within["end_ns"].idxmax()] if len(within) else None
        if ended is not None and ended["name"] == "optimizer":
            settled.loc[index, ["end_ns", "closed"]] = ended["end_ns"], ended["closed"]
        elif ended is None or ended["name"] != "data":  # else its loader had no more batches
            settled.loc[index, "closed"] = False
        elif not within["name"].isin(("backward", "optimizer")).any():
            nothing.append(index)
    return settled[~(automatic & ranges["pid"].isin(own))].drop(nothing)


AUTOMATIC_PHASES = ("data", "forward", "backward", "optimizer")


def find_steps(ranges: pd.DataFrame) -> pd.DataFrame:
    """Steps of one process from its ranges of the annotation's domain: step, start_ns, end_ns, closed.

    The number is the range's payload, and ranges without one are left out; if no range has one, or they do not
    increase, it is the ordinal.
    """
    steps = ranges[ranges["name"] == schema.STEP].sort_values("start_ns", kind="stable").reset_index(drop=True)
    if steps["payload"].notna().any():
        steps = steps[steps["payload"].notna()].reset_index(drop=True)
    number = steps["payload"]
    increasing = number.notna().all() and bool((number.to_numpy()[1:] > number.to_numpy()[:-1]).all())
    number = number if increasing else pd.Series(range(len(steps)))
    end = steps["end_ns"].to_numpy(np.int64)
    next_start = np.append(steps["start_ns"].to_numpy(np.int64)[1:], np.iinfo(np.int64).max)
    # A step without an end can at most last until the next one begins.
    end = np.where(steps["closed"].to_numpy(bool), end, np.minimum(end, next_start))
    start, end = first_claims(steps["start_ns"].to_numpy(np.int64), end)
    disjoint = steps.assign(step=number.astype(np.int64), start_ns=start, end_ns=end)
    return disjoint.loc[end > start, STEP_COLUMNS].reset_index(drop=True)


def unnumbered_steps(ranges: pd.DataFrame) -> int:
    """How many steps :func:`find_steps` leaves out for want of a number."""
    numbers = ranges.loc[ranges["name"] == schema.STEP, "payload"]
    return int(numbers.isna().sum()) if numbers.notna().any() else 0


def flatten(ranges: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Disjoint segments of the step thread: step, phase, start_ns, end_ns, sorted by start.

    Time belongs to the innermost phase. What a step leaves uncovered is phase :data:`OTHER`; a phase outside any step
    has step :data:`OUTSIDE`.
    """
    phases = ranges[ranges["name"] != schema.STEP].sort_values(["start_ns", "end_ns"], ascending=[True, False])
    pieces = _innermost(
        phases["start_ns"].to_numpy(np.int64), phases["end_ns"].to_numpy(np.int64), phases["name"].to_list()
    )
    frame = pd.DataFrame(pieces, columns=["phase", "start_ns", "end_ns"])
    start, end = frame["start_ns"].to_numpy(np.int64), frame["end_ns"].to_numpy(np.int64)
    index = np.searchsorted(steps["start_ns"].to_numpy(np.int64), start, side="right") - 1
    step_end = np.append(steps["end_ns"].to_numpy(np.int64), -1)
    number = np.append(steps["step"].to_numpy(np.int64), OUTSIDE)
    frame["step"] = np.where(start < step_end[index], number[index], OUTSIDE)
    frame["end_ns"] = np.where(frame["step"] == OUTSIDE, end, np.minimum(end, step_end[index]))
    whole = pd.concat([frame, _gaps(frame, steps)], ignore_index=True)
    return whole.loc[whole["end_ns"] > whole["start_ns"], SEGMENT_COLUMNS].sort_values("start_ns", ignore_index=True)


def batch_sizes(ranges: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Sizes of batches that phases within steps carry as their payload: step, phase, size."""
    told = ranges[(ranges["name"] != schema.STEP) & ranges["payload"].notna()]
    start = told["start_ns"].to_numpy(np.int64)
    index = np.searchsorted(steps["start_ns"].to_numpy(np.int64), start, side="right") - 1
    inside = (index >= 0) & (start < np.append(steps["end_ns"].to_numpy(np.int64), -1)[index])
    return pd.DataFrame(
        {
            "step": np.append(steps["step"].to_numpy(np.int64), OUTSIDE)[index[inside]],
            "phase": told["name"].to_numpy(object)[inside],
            "size": told["payload"].to_numpy(np.float64, na_value=np.nan)[inside],
        }
    )


def _innermost(start: np.ndarray, end: np.ndarray, labels: list[str]) -> list[tuple[str, int, int]]:
    """Disjoint pieces of nested ranges, sorted by start then longest first; a child is cut to its parent's end."""
    pieces: list[tuple[str, int, int]] = []
    stack: list[tuple[str, int]] = []
    cursor = 0
    # The stack holds the ranges that are open; time up to ``cursor`` is given out.
    for label, begin, finish in zip(labels, start.tolist(), end.tolist(), strict=True):
        while stack and stack[-1][1] <= begin:
            closed, closed_end = stack.pop()
            pieces.append((closed, cursor, closed_end))
            cursor = max(cursor, closed_end)
        if stack:
            pieces.append((stack[-1][0], cursor, begin))
        cursor = begin
        stack.append((label, min(finish, stack[-1][1]) if stack else finish))
    while stack:
        closed, closed_end = stack.pop()
        pieces.append((closed, cursor, closed_end))
        cursor = max(cursor, closed_end)
    return [piece for piece in pieces if piece[2] > piece[1]]


def _gaps(segments: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """What the phases leave of each step."""
    covered = IntervalSet.union_of(segments["start_ns"], segments["end_ns"])
    # Steps follow one another, so adjoining ones would merge: each keeps its own bounds.
    whole = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    free = whole.subtract(covered)
    index = np.searchsorted(whole.start_ns, free.start_ns, side="right") - 1
    return pd.DataFrame(
        {
            "step": steps["step"].to_numpy(np.int64)[index] if len(index) else np.empty(0, dtype=np.int64),
            "phase": OTHER,
            "start_ns": free.start_ns,
            "end_ns": free.end_ns,
        }
    )


def locate(segments: pd.DataFrame, at_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and phase at each time: :data:`OUTSIDE` and no name where no segment is."""
    index = np.searchsorted(segments["start_ns"].to_numpy(np.int64), at_ns, side="right") - 1
    inside = (index >= 0) & (at_ns < np.append(segments["end_ns"].to_numpy(np.int64), 0)[index])
    step = np.where(inside, np.append(segments["step"].to_numpy(np.int64), 0)[index], OUTSIDE)
    return step, np.where(inside, np.append(segments["phase"].to_numpy(object), "")[index], "")


BACK_TO_BACK_NS = 10_000
"""A gap up to this between activities that were both launched in time is what a device needs between two kernels."""


def work_on_devices(
    activities: pd.DataFrame, communication: npt.NDArray[np.bool_], segments: pd.DataFrame
) -> DeviceWork:
    """When the GPUs of a process ran what each of its phases had launched, from all their ``activities``.

    ``communication`` (activities,) says which of them communicate. An activity whose launch is not known belongs to no
    phase.
    """
    start, end, launch = (activities[name].to_numpy(np.int64) for name in ("start_ns", "end_ns", "launch_ns"))
    _, phase = locate(segments, launch)
    known = (launch != UNKNOWN) & ~communication
    by_phase: dict[str, IntervalSet] = {}
    claimed = IntervalSet.empty()
    for name in dict.fromkeys(phase[known]):
        own = known & (phase == name)
        wide = IntervalSet.union_of(start[own], end[own] + BACK_TO_BACK_NS)
        by_phase[str(name)] = IntervalSet(wide.start_ns, wide.end_ns - BACK_TO_BACK_NS).subtract(claimed)
        claimed = IntervalSet.union(claimed, by_phase[str(name)])
    moves = IntervalSet.union_of(start[communication], end[communication])
    stray = ~communication & (launch == UNKNOWN)
    return DeviceWork(
        by_phase, moves.subtract(claimed), IntervalSet.union_of(start[stray], end[stray]).subtract(claimed)
    )


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
    kept = {*longest.index[: MAX_PHASES - 1], OTHER, ""}

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
            device_work=trace.device_work and trace.device_work.renamed(lambda name: name if name in kept else OTHERS),
        )
        for trace in traces
    ]


MAD_TO_SIGMA = 1.4826
ADJOINING = 1.05
"""Steps adjoin if the time from one to the next is up to so many times as long as they are."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Durations of the steps that every rank with steps completed; warm-up (the first) is kept apart.

    There is none if the capture shows earlier steps, or if all ranks have one step alone.
    """

    numbers: npt.NDArray[np.int64]
    """Step numbers without warm-up, shape (steps,)."""
    duration_s: npt.NDArray[np.float64]
    """Mean over ranks of each of them, shape (steps,)."""
    warmup_number: int | None
    warmup_s: float
    left_out: tuple[int, ...] = ()
    """Ranks that have fewer than half of the steps that most ranks have; they are no part of the above."""
    periods_s: Mapping[int, float] = field(default_factory=dict)
    """By rank the mean time from the end of one step to the end of the next: no more can be lost to anything."""

    @property
    def mean_s(self) -> float:
        return float(self.duration_s.mean()) if len(self.duration_s) else 0.0

    @property
    def period_s(self) -> float:
        """Mean over ranks of the time from the end of one step to the end of the next."""
        return float(np.mean(list(self.periods_s.values()))) if self.periods_s else 0.0

    @property
    def adjoin(self) -> bool:
        """Whether hardly any time lies between the steps."""
        return self.period_s <= ADJOINING * self.mean_s

    @property
    def median_s(self) -> float:
        return float(np.median(self.duration_s)) if len(self.duration_s) else 0.0

    @property
    def noise_s(self) -> float:
        """Robust standard deviation of a step's duration from step to step."""
        if not len(self.duration_s):
            return 0.0
        return MAD_TO_SIGMA * float(np.median(np.abs(self.duration_s - np.median(self.duration_s))))


def step_times(traces: Sequence[RankTrace]) -> StepTimes:
    """Steps that all of ``traces`` with any closed steps have closed. The first of the run is warm-up if others follow.

    A rank whose steps are mostly others than those of most ranks, because their numbers are damaged or it stopped
    early, would leave nothing of the run to look at: it is left out.
    """
    known = {trace.rank: closed for trace in traces if len(closed := trace.steps[trace.steps["closed"]])}
    if not known:
        return StepTimes(np.empty(0, dtype=np.int64), np.empty(0), None, 0.0)
    usual = pd.concat([frame["step"] for frame in known.values()]).value_counts()
    usual = usual[usual > len(known) / 2].index
    odd = [rank for rank, frame in known.items() if 2 * frame["step"].isin(usual).sum() < len(usual)]
    frames = [frame for rank, frame in known.items() if rank not in odd]
    first = min(int(frame["step"].min()) for frame in frames)
    whole = pd.concat(
        [pd.DataFrame({"step": f["step"], "duration": (f["end_ns"] - f["start_ns"]) / NS_PER_S}) for f in frames]
    )
    by_step = whole.groupby("step")["duration"].agg(["mean", "size"])
    common = by_step[by_step["size"] == len(frames)]
    is_warm = any(trace.is_warm for trace in traces if trace.rank in known and trace.rank not in odd)
    warms_up = (common.index == first) & (len(common) > 1) & (not is_warm)
    warm, steady = common[warms_up], common[~warms_up]
    numbers = steady.index.to_numpy(np.int64)
    return StepTimes(
        numbers=numbers,
        duration_s=steady["mean"].to_numpy(np.float64),
        warmup_number=first if len(warm) else None,
        warmup_s=float(warm["mean"].iloc[0]) if len(warm) else 0.0,
        left_out=tuple(odd),
        periods_s=_periods_s(traces, numbers),
    )


def _periods_s(traces: Sequence[RankTrace], numbers: npt.NDArray[np.int64]) -> dict[int, float]:
    """By rank the time from the end of one step to the end of the next, as a mean over the steps ``numbers``.

    A step ends with what its GPUs do in it: a host that waits for nothing has launched the last step when they are in
    the first. A step before which nothing was recorded for a while, as before the first one, does not count unless all
    are like that; they are as long as themselves then.
    """
    found = {}
    for trace in traces:
        chosen = trace.steps["step"].isin(numbers).to_numpy(bool)
        if chosen.any():
            start, end = trace.steps["start_ns"].to_numpy(np.float64), step_ends_ns(trace)
            known = np.append(False, trace.follows)
            before = np.where(known, np.append(start[0], end[:-1]), start)
            counted = chosen & known if (chosen & known).any() else chosen
            if (end - before)[counted].sum() <= ADJOINING * (end - start)[counted].sum():
                counted = chosen  # nothing lies between the steps, nor did before the first
            found[trace.rank] = float((end - before)[counted].mean()) / NS_PER_S
    return found


def step_ends_ns(trace: RankTrace) -> npt.NDArray[np.float64]:
    """When each step of a rank has ended on its host and on its GPUs."""
    end = trace.steps["end_ns"].to_numpy(np.float64)
    if trace.gpu is None:
        return end
    at = pd.Index(trace.steps["step"]).get_indexer(pd.Index(trace.gpu["step"]))
    end = end.copy()
    np.maximum.at(end, at[at >= 0], trace.gpu["end_ns"].to_numpy(np.float64)[at >= 0])
    return end
