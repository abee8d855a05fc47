"""One clock for all reports: UTC of each report, corrected between reports by when synchronising collectives end.

nsys writes UTC of the session's start into each report. On one host that is good to some 0.1 ms, with single outliers
of milliseconds; between hosts it is as good as NTP. A collective that synchronises its ranks ends on all of them within
its own transfer time, so the ends of many give offset and drift of one clock against another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

SAME_HOST_ERROR_NS = 100_000
"""Error of nsys's own UTC stamps on one host, when no outlier is found."""
UNSYNCHRONISED_ERROR_NS = 10_000_000
"""What NTP leaves between nodes, if no collective tells better."""
EPOCH_OUTLIER_NS = 1_000_000
"""A report whose UTC stamp is off by more than this against its own host is corrected."""
MAX_DRIFT = 500e-6
"""Quartz oscillators stay within 100 ppm; a steeper fit is noise of a short run."""
MIN_INSTANCES = 3
OSCILLATOR_DRIFT = 100e-6
"""A drift that oscillators may have, and that a short run need not show."""
MAX_INSTANCES = 4000
"""Collectives used in a fit through ends; more would not make it better."""
MIDDLE_TIMES = 1.5
"""The middle of what causality allows is taken where it is so many times more certain than the fit through the ends."""
MAD_TO_SIGMA = 1.4826

CLOCK_COLUMNS = ["node", "reports", "offset_s", "drift_ppm", "residual_s", "error_s", "collectives", "corrected"]


@dataclass(frozen=True, slots=True)
class ReportClock:
    """Maps a report's own nanoseconds to the run's time: nanoseconds since ``origin_ns`` (UTC) of the run."""

    epoch_ns: int
    origin_ns: int
    offset_ns: float = 0.0
    drift: float = 0.0
    """What to subtract: ``offset_ns + drift * t``, with t the uncorrected run time in ns."""

    @classmethod
    def uncorrected(cls, epoch_ns: int | None, origin_ns: int) -> ReportClock:
        """By the report's own UTC stamp; without one, its time 0 is taken for the run's."""
        return cls(epoch_ns if epoch_ns is not None else origin_ns, origin_ns)

    def __call__(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raw = times + (self.epoch_ns - self.origin_ns)
        corrected: npt.NDArray[np.int64] = raw - np.rint(self.offset_ns + self.drift * raw).astype(np.int64)
        return corrected


class CommonClock(NamedTuple):
    """A clock for each report, the table of nodes (CLOCK_COLUMNS), and the largest error between any two ranks."""

    clocks: list[ReportClock]
    table: pd.DataFrame
    error_ns: float
    shared: tuple[str, ...]
    """For each report the name of the clock that it shares with others: its node's."""


class LineFit(NamedTuple):
    """offset + slope * t through noisy points; ``sigma`` is the robust spread around it."""

    offset: float
    slope: float
    sigma: float
    standard_error: float


def robust_line(t: Floats, y: Floats, *, rounds: int = 20) -> LineFit:
    """Huber regression by reweighted least squares (Huber 1964), k = 1.345.

    A slope within three standard errors of nothing, or beyond what oscillators do, would only add noise: then the
    median is the fit.
    """
    center = float(np.median(t))
    scale = float(np.max(np.abs(t - center))) or 1.0
    x = (t - center) / scale
    slope, offset, sigma = 0.0, float(np.median(y)), 0.0
    weights = np.ones_like(y)
    variance = float((x**2).sum())
    for _ in range(rounds):
        mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
        variance = float((weights * (x - mean_x) ** 2).sum())
        if variance == 0.0:
            break
        slope = float((weights * (x - mean_x) * (y - mean_y)).sum()) / variance
        offset = float(mean_y - slope * mean_x)
        residual = y - offset - slope * x
        sigma = MAD_TO_SIGMA * float(np.median(np.abs(residual)))
        if sigma == 0.0:
            break
        weights = np.minimum(1.0, 1.345 * sigma / np.maximum(np.abs(residual), 1e-12))
    insignificant = variance == 0.0 or abs(slope) < 3 * sigma / np.sqrt(variance)
    if insignificant or abs(slope / scale) > MAX_DRIFT:
        slope, offset = 0.0, float(np.median(y))
        sigma = MAD_TO_SIGMA * float(np.median(np.abs(y - offset)))
    standard_error = 1.2533 * sigma / float(np.sqrt(len(y)))
    return LineFit(offset - slope / scale * center, slope / scale, sigma, standard_error)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Starts and ends of complete synchronising collectives on uncorrected run time, NaN where a report has no part.

    Shapes (instances, reports), in float64 nanoseconds since the run's origin.
    """

    start: Floats
    end: Floats

    def of(self, rows: npt.NDArray[np.intp], reports: npt.NDArray[np.intp]) -> Arrivals:
        return Arrivals(self.start[np.ix_(rows, reports)], self.end[np.ix_(rows, reports)])

    def shortest(self) -> Floats:
        """Of each instance the time that the rank with the shortest part in it took: no less than its transfer."""
        shortest: Floats = np.nanmin(self.end - self.start, axis=1)
        return shortest

    def best(self) -> npt.NDArray[np.intp]:
        """Rows of the shortest ones of each stretch of the run: their ends are the most nearly simultaneous."""
        shortest = self.shortest()
        order = np.argsort(np.nanmax(self.end, axis=1), kind="stable")
        keep: list[npt.NDArray[np.intp]] = []
        for stretch in np.array_split(order, max(1, min(len(order) // 8, 64))):
            limit = np.quantile(shortest[stretch], 0.5) if len(stretch) else 0.0
            keep.append(stretch[shortest[stretch] <= limit])
        chosen = np.concatenate(keep) if keep else order
        return chosen[:: max(1, len(chosen) // MAX_INSTANCES)]


def common_clock(epochs_ns: list[int | None], nodes: list[str], origin_ns: int, arrivals: Arrivals) -> CommonClock:
    """Clocks of reports whose UTC stamps are ``epochs_ns``, on ``nodes``.

    ``arrivals`` must be in run time as :class:`ReportClock` gives it without correction.
    """
    clocks = [ReportClock.uncorrected(epoch, origin_ns) for epoch in epochs_ns]
    # A report that does not tell its epoch shares no clock with its node.
    nodes = [
        node if epoch is not None else f"{node} (report {index})"
        for index, (node, epoch) in enumerate(zip(nodes, epochs_ns, strict=True))
    ]
    best = arrivals.best() if len(arrivals.end) else np.empty(0, dtype=np.intp)
    corrections = np.zeros(len(nodes))
    names = list(dict.fromkeys(nodes))
    columns = {name: np.array([i for i, node in enumerate(nodes) if node == name]) for name in names}
    for members in columns.values():
        corrections[members] = _epoch_outliers(arrivals.of(best, members), arrivals.shortest()[best])
    fits = _align_nodes(Arrivals(arrivals.start - corrections, arrivals.end - corrections), best, columns)
    for name, members in columns.items():
        fit = fits[name]
        for index in members:
            clock = clocks[index]
            # The fit's line is over times that were corrected within the node, the clock's over those that were not.
            offset_ns = fit.offset_ns + corrections[index] * (1 - fit.drift)
            clocks[index] = ReportClock(clock.epoch_ns, origin_ns, offset_ns, fit.drift)
    rows = [
        (name, len(columns[name]), *fits[name].row(), bool(np.any(corrections[columns[name]])) or fits[name].applied)
        for name in names
    ]
    error = max((fit.error_ns for fit in fits.values()), default=SAME_HOST_ERROR_NS)
    return CommonClock(clocks, pd.DataFrame(rows, columns=CLOCK_COLUMNS), error, tuple(nodes))


@dataclass(frozen=True, slots=True)
class NodeFit:
    """How one node's clock runs against the reference node's."""

    offset_ns: float
    drift: float
    sigma_ns: float
    error_ns: float
    collectives: int
    applied: bool

    def row(self) -> tuple[float, float, float, float, int]:
        return self.offset_ns / 1e9, self.drift * 1e6, self.sigma_ns / 1e9, self.error_ns / 1e9, self.collectives


def _epoch_outliers(host: Arrivals, transfer_ns: Floats) -> Floats:
    """Offset of each report of one host against the host's median, where it is beyond doubt; else 0.

    Ranks may leave a collective apart by as much as its transfer takes, ``transfer_ns``, shape (instances,): behind a
    slow link they do so each time. Only a report that is farther off, or leaves before another has arrived, is wrong.
    """
    end = host.end
    shift = np.zeros(end.shape[1])
    if end.shape[1] < 2 or not len(end):
        return shift
    transfer = float(np.median(transfer_ns))
    usable = np.isfinite(end).sum(axis=1) >= 2
    if not usable.any():
        return shift
    delta = end[usable] - np.nanmedian(end[usable], axis=1, keepdims=True)
    for column in range(end.shape[1]):
        own = delta[np.isfinite(delta[:, column]), column]
        if len(own) >= 3:
            median = float(np.median(own))
            spread = MAD_TO_SIGMA * float(np.median(np.abs(own - median)))
            if abs(median) > max(EPOCH_OUTLIER_NS, 3 * spread) and (
                abs(median) > transfer or _contradicts_causality(host, column)
            ):
                shift[column] = median
    return shift


def _contradicts_causality(host: Arrivals, column: int) -> bool:
    """Whether a report leaves collectives before another of its host has arrived, or that one before it."""
    others = np.delete(np.arange(host.end.shape[1]), column)
    both = np.isfinite(host.end[:, column]) & np.isfinite(host.end[:, others]).any(axis=1)
    rows = np.flatnonzero(both)
    corridor = Corridor.between(_row_median(host.end[rows]), host.of(rows, np.array([column])), host.of(rows, others))
    return bool((corridor.low_ns > 0).any() or (corridor.high_ns < 0).any())


def _align_nodes(
    arrivals: Arrivals, best: npt.NDArray[np.intp], columns: dict[str, npt.NDArray[np.intp]]
) -> dict[str, NodeFit]:
    """Fit every node against those already aligned, beginning with the first; nodes may share groups only in chains."""
    names = list(columns)
    start, end = arrivals.start.copy(), arrivals.end.copy()
    tightest = np.zeros(len(end), dtype=bool)
    tightest[best] = True
    fits: dict[str, NodeFit] = {names[0]: NodeFit(0.0, 0.0, 0.0, SAME_HOST_ERROR_NS, 0, False)} if names else {}
    waiting = names[1:]
    present = np.array([np.isfinite(end[:, columns[name]]).any(axis=1) for name in names])
    place = {name: index for index, name in enumerate(names)}
    known = present[0].copy() if names else np.empty(0, dtype=bool)
    while waiting:
        shared = np.count_nonzero(present[[place[name] for name in waiting]] & known, axis=1)
        name = waiting.pop(int(shared.argmax()))
        mine = present[place[name]]
        # Straight to the first node where it can be, for an error passes on from node to node.
        direct = int(np.count_nonzero(mine & present[0]))
        through = names[:1] if direct >= MIN_INSTANCES else list(fits)
        aligned = np.concatenate([columns[other] for other in through])
        reached = present[0] if direct >= MIN_INSTANCES else known
        own, use = columns[name], mine & reached
        fit = _fit_node(
            Arrivals(start[np.ix_(use, own)], end[np.ix_(use, own)]),
            Arrivals(start[np.ix_(use, aligned)], end[np.ix_(use, aligned)]),
            tightest[use],
        )
        if direct < MIN_INSTANCES and use.any():
            met = [fits[other].error_ns for other in through if (present[place[other]] & mine).any()]
            fit = replace(fit, error_ns=fit.error_ns + min(met))
        fits[name] = fit
        known |= mine
        start[:, own] -= fit.offset_ns + fit.drift * start[:, own]
        end[:, own] -= fit.offset_ns + fit.drift * end[:, own]
    return fits


def _fit_node(own: Arrivals, reference: Arrivals, tightest: npt.NDArray[np.bool_]) -> NodeFit:
    """Offset and drift of a node from the collectives it shares with nodes already aligned (same rows).

    Of two lines, the robust fit through the ends of the ``tightest`` and the middle of what causality allows, the one
    that causality bounds more closely is taken. No line fits a clock that was slewed meanwhile: the error says it.
    """
    if len(own.end) < MIN_INSTANCES:
        return NodeFit(0.0, 0.0, float("nan"), UNSYNCHRONISED_ERROR_NS, len(own.end), False)
    at, delta = _row_median(own.end), _row_median(own.end) - _row_median(reference.end)
    corridor = Corridor.between(at, own, reference)
    chosen = tightest if tightest.sum() >= MIN_INSTANCES else np.ones(len(at), dtype=bool)
    line = robust_line(at[chosen], delta[chosen])
    middle = corridor.middle()
    fitted = corridor.error(line.offset, line.slope) + 2 * line.standard_error
    if fitted > MIDDLE_TIMES * corridor.error(*middle):
        line = line._replace(offset=middle[0], slope=middle[1])
        fitted = corridor.error(*middle)
    as_is = corridor.error(0.0, 0.0)
    size = float(np.max(np.abs(line.offset + line.slope * at)))
    # A correction that is within its own error is left alone: the stamps are as good.
    if size <= fitted and as_is <= 2 * fitted:
        return NodeFit(0.0, 0.0, line.sigma, max(SAME_HOST_ERROR_NS, as_is), len(at), False)
    return NodeFit(line.offset, line.slope, line.sigma, max(SAME_HOST_ERROR_NS, fitted), len(at), True)


@dataclass(frozen=True, slots=True)
class Corridor:
    """What causality allows: no rank leaves a synchronising collective before all have arrived.

    A node's clock against the reference's, at time ``at_ns`` of each instance, lies between ``low_ns`` (its last
    arrival minus the reference's first end) and ``high_ns`` (its first end minus the reference's last arrival).
    """

    at_ns: Floats
    low_ns: Floats
    high_ns: Floats

    @classmethod
    def between(cls, at: Floats, own: Arrivals, reference: Arrivals) -> Corridor:
        low = np.nanmax(own.start, axis=1) - np.nanmin(reference.end, axis=1)
        high = np.nanmin(own.end, axis=1) - np.nanmax(reference.start, axis=1)
        return cls(at, low, high)

    def error(self, offset: float, slope: float) -> float:
        """How wrong a node's clock can still be when ``offset + slope * at`` has been subtracted.

        That is how far the line is from any other line that causality allows with the drift of an oscillator, at
        either end of the run. If the line leaves the corridor it is wrong by as much at least.
        """
        line = offset + slope * self.at_ns
        outside = max(abs(float((self.low_ns - line).max())), abs(float((self.high_ns - line).min())))
        slopes = np.append(np.linspace(-OSCILLATOR_DRIFT, OSCILLATOR_DRIFT, 41), slope)
        low = (self.low_ns - slopes[:, None] * self.at_ns).max(axis=1)
        high = (self.high_ns - slopes[:, None] * self.at_ns).min(axis=1)
        allowed = low <= high
        if not allowed.any():
            return outside
        ends = np.array([self.at_ns.min(), self.at_ns.max()])
        above = (high[allowed, None] + slopes[allowed, None] * ends).max(axis=0) - (offset + slope * ends)
        below = (offset + slope * ends) - (low[allowed, None] + slopes[allowed, None] * ends).min(axis=0)
        return max(outside, float(above.max()), float(below.max()))

    def middle(self) -> tuple[float, float]:
        """Offset and slope of the line with the most room on both sides; level where that leaves half as much."""
        slope = self._roomiest()
        if self._room(0.0) > 0 and 2 * self._room(0.0) >= self._room(slope):
            slope = 0.0
        low, high = self._bounds(slope)
        return (low + high) / 2, slope

    def _roomiest(self) -> float:
        """The slope with the most room, which is a concave function of it (ternary search)."""
        low, high = -OSCILLATOR_DRIFT, OSCILLATOR_DRIFT
        for _ in range(60):
            third = (high - low) / 3
            if self._room(low + third) < self._room(high - third):
                low += third
            else:
                high -= third
        return (low + high) / 2

    def _bounds(self, slope: float) -> tuple[float, float]:
        return float((self.low_ns - slope * self.at_ns).max()), float((self.high_ns - slope * self.at_ns).min())

    def _room(self, slope: float) -> float:
        low, high = self._bounds(slope)
        return (high - low) / 2


def _row_median(values: Floats) -> Floats:
    """Median over the columns that have a value; NaN if none has."""
    result = np.full(len(values), np.nan)
    some = np.isfinite(values).any(axis=1)
    if some.any():
        result[some] = np.nanmedian(values[some], axis=1)
    return result
