"""What of a capture is looked at: which of its ranges are steps and phases, and which part of its time counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from hpcmm.analysis.range_names import matching
from hpcmm.annotate import schema
from hpcmm.errors import HpcmmError
from hpcmm.reports.report import CudaEvents, Report


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user says of reports; empty if he leaves it to us.

    An expression is regular. It stands for the NVTX ranges whose whole name it matches; if there are none, for those
    that it matches in part. Raises HpcmmError for an expression that is none, and for times that are no part of a run.
    """

    steps: str = ""
    """An expression for the ranges that are steps."""
    phases: str = ""
    """An expression for the ranges within steps that are phases."""
    from_s: float | None = None
    """Leave out what came before, in seconds of the run, which begins with the first event of the first report."""
    to_s: float | None = None
    """Leave out what came after."""
    between: str = ""
    """An expression: leave out what came before the first of these ranges, and after the last, in each report."""
    origin_ns: int | None = None
    """UTC at which the run begins; None: each report counts from its own first event."""

    def __post_init__(self) -> None:
        for option in ("steps", "phases", "between"):
            text = getattr(self, option)
            try:
                re.compile(text)
            except re.error as error:
                raise HpcmmError(f"--{option} {text!r} is not a regular expression: {error}.") from error
        begin, end = self.from_s or 0.0, self.to_s
        if not (np.isfinite(begin) and begin >= 0) or (end is not None and not end > begin):
            told = "" if end is None else f" --to {end:g}"
            raise HpcmmError(
                f"--from {begin:g}{told} is not a part of a run: give seconds from its first event, --from before --to."
            )

    @property
    def is_timed(self) -> bool:
        return self.from_s is not None or self.to_s is not None

    @property
    def is_whole(self) -> bool:
        """Whether all of the capture's time counts."""
        return not self.is_timed and not self.between

    @property
    def needs_ranges(self) -> bool:
        """Whether it names ranges."""
        return bool(self.steps or self.phases or self.between)


CHOOSE_FOR_ME = Choice()


def cut(report: Report, choice: Choice) -> Report | None:
    """``report`` with what lies within the window that ``choice`` names; None if its ranges name no such choice.

    What reaches beyond the window is cut to it. A step counts only if all of it lies within.
    """
    if choice.is_whole:
        return report
    low, high = report.first_ns, report.last_ns
    if choice.is_timed:
        known = choice.origin_ns is not None and report.epoch_ns is not None
        begin = (choice.origin_ns or 0) - (report.epoch_ns or 0) if known else report.first_ns
        low = max(low, begin + round((choice.from_s or 0.0) * 1e9))
        high = high if choice.to_s is None else min(high, begin + round(choice.to_s * 1e9))
    if choice.between:
        named = report.ranges[matching(report.ranges["name"], choice.between)] if len(report.ranges) else report.ranges
        if named.empty:
            return None
        low, high = max(low, int(named["start_ns"].min())), min(high, int(named["end_ns"].max()))
    if low >= high:
        return None

    def within(frame: pd.DataFrame) -> pd.DataFrame:
        inside = frame[(frame["end_ns"] > low) & (frame["start_ns"] < high)]
        return inside.assign(start_ns=inside["start_ns"].clip(lower=low), end_ns=inside["end_ns"].clip(upper=high))

    own = (report.nvtx["domain"] == schema.DOMAIN) & (report.nvtx["name"] == schema.STEP)
    whole_steps = ~own | ((report.nvtx["start_ns"] >= low) & (report.nvtx["end_ns"] <= high))
    marks = report.marks[report.marks["start_ns"] < high]
    ranges = within(report.ranges).reset_index(drop=True)
    return replace(
        report,
        nvtx=within(report.nvtx[whole_steps]).reset_index(drop=True),
        osrt=within(report.osrt).reset_index(drop=True),
        ranges=ranges,
        marks=marks,
        cuda=report.cuda and _cut_cuda(replace(report.cuda, ranges=ranges), within),
        first_ns=low,
        last_ns=high,
    )


def _cut_cuda(events: CudaEvents, within: Callable[[pd.DataFrame], pd.DataFrame]) -> CudaEvents | None:
    others = [each.name for each in fields(events) if each.name != "ranges"]  # which the report has cut already
    frames = {name: within(getattr(events, name)).reset_index(drop=True) for name in others}
    return replace(events, **frames) if len(frames["activities"]) else None
