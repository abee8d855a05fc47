"""Sets of time intervals: union, intersection, difference, and how much of a window they cover.

Intervals are half-open [start, end) in int64 nanoseconds. Everything is vectorised: n intervals cost O(n log n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.int64]
OnClock = Callable[[Times], Times]
"""Maps a report's own times to the common clock, in their order."""


@dataclass(frozen=True, slots=True)
class IntervalSet:
    """Disjoint intervals sorted by start; two arrays of one shape (n,)."""

    start_ns: Times
    end_ns: Times

    @classmethod
    def empty(cls) -> IntervalSet:
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def union_of(cls, start_ns: npt.ArrayLike, end_ns: npt.ArrayLike) -> IntervalSet:
        """The union of any intervals; those that are empty or end before they start count for nothing."""
        start, end = np.asarray(start_ns, dtype=np.int64), np.asarray(end_ns, dtype=np.int64)
        real = end > start
        start, end = start[real], end[real]
        if not len(start):
            return cls.empty()
        # A gap opens where as many intervals have ended as have begun, so starts and ends can be sorted apart.
        # Reports are in the order of time, nearly, which a stable sort makes use of.
        start, end = np.sort(start, kind="stable"), np.sort(end, kind="stable")
        gap = start[1:] > end[:-1]
        return cls(start[np.append(True, gap)], end[np.append(gap, True)])

    @classmethod
    def union(cls, *sets: IntervalSet) -> IntervalSet:
        """The union of sets; empty if there are none."""
        if not sets:
            return cls.empty()
        return cls.union_of(
            np.concatenate([each.start_ns for each in sets]), np.concatenate([each.end_ns for each in sets])
        )

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def total_ns(self) -> int:
        """Length of the union."""
        return int((self.end_ns - self.start_ns).sum())

    def on_clock(self, clock: OnClock) -> IntervalSet:
        """The same with every time put through ``clock``."""
        return IntervalSet(clock(self.start_ns), clock(self.end_ns))

    def covered_until(self, at_ns: npt.ArrayLike) -> Times:
        """For each time, how much of the set lies before it."""
        at = np.asarray(at_ns, dtype=np.int64)
        if not len(self):
            return np.zeros(at.shape, dtype=np.int64)
        before = np.concatenate(([0], np.cumsum(self.end_ns - self.start_ns)))
        index = np.searchsorted(self.start_ns, at, side="right")
        overshoot = np.where(index > 0, np.maximum(self.end_ns[index - 1] - at, 0), 0)
        return before[index] - overshoot

    def covered_within(self, start_ns: npt.ArrayLike, end_ns: npt.ArrayLike) -> Times:
        """For each window, how much of it the set covers; an inverted window counts as empty."""
        start, end = np.asarray(start_ns, dtype=np.int64), np.asarray(end_ns, dtype=np.int64)
        return self.covered_until(np.maximum(start, end)) - self.covered_until(start)

    def intersect(self, other: IntervalSet) -> IntervalSet:
        """What lies in both sets."""
        if not len(self) or not len(other):
            return IntervalSet.empty()
        # Each interval of self meets a run of intervals of other: from the first that ends after it starts ...
        first = np.searchsorted(other.end_ns, self.start_ns, side="right")
        last = np.searchsorted(other.start_ns, self.end_ns, side="left")
        count = np.maximum(last - first, 0)
        mine = np.repeat(np.arange(len(self)), count)
        theirs = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        start = np.maximum(self.start_ns[mine], other.start_ns[theirs])
        end = np.minimum(self.end_ns[mine], other.end_ns[theirs])
        return IntervalSet(start, end)

    def subtract(self, other: IntervalSet) -> IntervalSet:
        """What lies in this set and not in ``other``."""
        if not len(self) or not len(other):
            return self
        low, high = min(self.start_ns[0], other.start_ns[0]), max(self.end_ns[-1], other.end_ns[-1])
        outside = IntervalSet.union_of(np.append(low, other.end_ns), np.append(other.start_ns, high))
        return self.intersect(outside)


def first_claims(start_ns: Times, end_ns: Times) -> tuple[Times, Times]:
    """Cut intervals, sorted by start, to the part that no earlier one covers. The pieces are disjoint.

    Returns the pieces' starts and ends in the same order; a piece may be empty (start equals end).
    """
    if not len(start_ns):
        return start_ns, end_ns
    reach = np.concatenate(([np.iinfo(np.int64).min], np.maximum.accumulate(end_ns)[:-1]))
    start = np.maximum(start_ns, reach)
    return start, np.maximum(end_ns, start)


def highest_covering(low: npt.NDArray[np.intp], high: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    """For each of ``count`` positions the last of the stretches [low, high) that hold it, -1 if none does.

    Every stretch marks two stretches whose length is a power of two; marks are then handed down by halves.
    """
    found = np.full(count, -1, dtype=np.intp)
    level = np.where(high > low, np.frexp(np.maximum(high - low, 1))[1] - 1, -1)
    for power in range(int(level.max(initial=-1)), -1, -1):
        mine = np.flatnonzero(level == power)
        np.maximum.at(found, low[mine], mine)
        np.maximum.at(found, high[mine] - (1 << power), mine)
        half = (1 << power) >> 1
        if half:
            marks = found.copy()
            np.maximum(found[half:], marks[: count - half], out=found[half:])
    return found


NS_PER_S = 1e9
