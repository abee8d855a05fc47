"""What of a capture is looked at: which of its ranges are steps and phases, and which part of its time counts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pandas as pd

from hpcmm.analysis.range_names import NUMBER, matching
from hpcmm.annotate import schema
from hpcmm.errors import HpcmmError
from hpcmm.reports.report import CudaEvents, Report

NO_WHOLE_STEP = "no step of it lies as a whole in the window that was asked for"
MOST_S = 10**9
"""Longest time that is taken for a part of a run: 30 years."""


def _refuse_endless(option: str, expression: str) -> None:
    """Raises HpcmmError if ``expression`` is not a regular one, or repeats a group that repeats or chooses itself.

    Python's matcher tries all ways of sharing out a text between such repetitions, and their number doubles with each
    character. No name of a range needs that.
    """
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise HpcmmError(f"--{option} {expression!r} is not a regular expression: {error}.") from error
    groups = [False]
    """Of each group that is open, whether it repeats or chooses."""
    inner = False
    """The same of the group that has just ended."""
    for part in _PARTS.findall(expression):
        is_repeated = part[:1] in {"*", "+"} or (part[:1] == "{" and part.endswith(",}"))
        if is_repeated and inner:
            raise HpcmmError(
                f"--{option} {expression!r} can take for ever, since it repeats a group that repeats or chooses by "
                "itself: write it without one of the two."
            )
        inner = part == ")" and groups[-1]
        if part == "(":
            groups.append(False)
        elif part == ")":
            groups.pop()
            groups[-1] |= inner
        elif is_repeated or part == "|":
            groups[-1] = True


_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(|\)|[*+?|]|\{[0-9]*,?[0-9]*\}|.", re.DOTALL)
"""Escapes, classes of characters, and single characters of an expression."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user says of reports; empty if he leaves it to us.

    An expression is regular. It stands for the NVTX ranges whose whole name it matches; if there are none, for those
    that it matches in part. The name of ranges as messages write it, ``iteration {n}``, will do as well. Raises
    HpcmmError for an expression that is none, and for times that are no part of a run.
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
    usual_steps: str = ""
    """What the steps of the other reports are called, with ``{n}`` for a number; empty if it is not known."""
    begin_rule: str = ""
    """By which range all ranks' steps begin if none is one; empty if each may have its own."""
    needs_step_ranges: bool = False
    """Whether steps are ranges themselves: not all ranks of the run name the parts of their loop well enough."""

    def __post_init__(self) -> None:
        for option in ("steps", "phases", "between"):
            if NUMBER not in getattr(self, option):
                _refuse_endless(option, getattr(self, option))
        for option, time_s in (("from", self.from_s), ("to", self.to_s)):
            if time_s is not None and not 0 <= time_s <= MOST_S:
                raise HpcmmError(
                    f"--{option} {time_s:g} is no time of a run: give seconds from its first event, {MOST_S:,} at most."
                )
        begin, end = self.from_s or 0.0, self.to_s
        if end is not None and not end > begin:
            raise HpcmmError(f"--from {begin:g} --to {end:g} leaves nothing of a run: give a --from before --to.")

    @property
    def is_timed(self) -> bool:
        return self.from_s is not None or self.to_s is not None

    @property
    def is_whole(self) -> bool:
        """Whether all of the capture's time counts."""
        return not self.is_timed and not self.between

    @property
    def window(self) -> str:
        """Which part of the run counts, in words; empty if all of it does."""
        told = [f"between the ranges {self.between!r}"] if self.between else []
        told += [f"from {self.from_s:g} s on"] if self.from_s is not None else []
        told += [f"until {self.to_s:g} s"] if self.to_s is not None else []
        return f"only a part of the run is looked at, {', '.join(told)}, and times count from its begin" if told else ""

    @property
    def needs_ranges(self) -> bool:
        """Whether it names ranges."""
        return bool(self.steps or self.phases or self.between)


CHOOSE_FOR_ME = Choice()


@dataclass(frozen=True, slots=True)
class Window:
    """Which time of a report counts, in its own nanoseconds. Nothing does if it ends before it begins."""

    low_ns: int
    high_ns: int

    @property
    def is_empty(self) -> bool:
        return self.low_ns >= self.high_ns


def window_of(report: Report, choice: Choice) -> Window | None:
    """The window that ``choice`` names; None if none of the report's ranges is called so."""
    low, high = report.first_ns, report.last_ns
    if choice.is_timed:
        begin = _run_begins_ns(report, choice)
        low = max(low, begin + round((choice.from_s or 0.0) * 1e9))
        high = high if choice.to_s is None else min(high, begin + round(choice.to_s * 1e9))
    if choice.between:
        named = report.ranges[matching(report.ranges["name"], choice.between)] if len(report.ranges) else report.ranges
        if named.empty:
            return None
        low, high = max(low, int(named["start_ns"].min())), min(high, int(named["end_ns"].max()))
    return Window(low, high)


def _run_begins_ns(report: Report, choice: Choice) -> int:
    """When the run begins, on the report's own clock."""
    if choice.origin_ns is None or report.epoch_ns is None:
        return report.first_ns
    return choice.origin_ns - report.epoch_ns


def why_nothing(report: Report, choice: Choice) -> str:
    """Why nothing of ``report`` lies in the window that ``choice`` names."""
    if not choice.is_timed:
        return "none of its ranges is called so"
    begin = _run_begins_ns(report, choice)
    first_s, last_s = ((at - begin) / 1e9 for at in (report.first_ns, report.last_ns))
    return (
        "nothing was recorded in the window that was asked for, and something before or after it: its first event is "
        f"at {first_s:.3g} s of the run, its last one at {last_s:.3g} s"
    )


def no_whole_step(report: Report, choice: Choice, window: Window) -> str:
    """That no step of ``report``, which has some, lies in ``window``, and which times hold the nearest one."""
    steps = report.nvtx[_steps(report)]
    inside = steps["end_ns"].clip(upper=window.high_ns) - steps["start_ns"].clip(lower=window.low_ns)
    nearest = steps.loc[inside.groupby(steps["pid"]).idxmax()]  # of each process
    begin = _run_begins_ns(report, choice)
    from_s = math.floor((int(nearest["start_ns"].min()) - begin) / 1e7) / 100
    to_s = math.ceil((int(nearest["end_ns"].max()) - begin) / 1e7) / 100
    return f"{NO_WHOLE_STEP}; --from {from_s:.2f} --to {to_s:.2f} holds the nearest one"


def stepped_before(report: Report, window: Window) -> frozenset[int]:
    """Processes of ``report`` that began a step before ``window``: they are warm by then."""
    earlier = report.nvtx[_steps(report) & (report.nvtx["start_ns"] < window.low_ns)]
    return frozenset(int(pid) for pid in earlier["pid"].unique())


def _steps(report: Report) -> pd.Series[bool]:
    return (report.nvtx["domain"] == schema.DOMAIN) & (report.nvtx["name"] == schema.STEP)


def cut(report: Report, window: Window) -> Report:
    """``report`` with what lies within ``window``, which is not empty.

    What reaches beyond the window is cut to it. A step counts only if all of it lies within.
    """
    low, high = window.low_ns, window.high_ns

    def within(frame: pd.DataFrame) -> pd.DataFrame:
        inside = frame[(frame["end_ns"] > low) & (frame["start_ns"] < high)]
        return inside.assign(start_ns=inside["start_ns"].clip(lower=low), end_ns=inside["end_ns"].clip(upper=high))

    whole_steps = ~_steps(report) | ((report.nvtx["start_ns"] >= low) & (report.nvtx["end_ns"] <= high))
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
        is_cut=True,
    )


def _cut_cuda(events: CudaEvents, within: Callable[[pd.DataFrame], pd.DataFrame]) -> CudaEvents | None:
    others = [each.name for each in fields(events) if each.name != "ranges"]  # which the report has cut already
    frames = {name: within(getattr(events, name)).reset_index(drop=True) for name in others}
    return replace(events, **frames) if len(frames["activities"]) else None
