"""What chance explains: whether a rank is late more often than that, and how far two means differ by noise alone.

Late ranks: a test that knows nothing of the size or shape of the noise. If nobody causes delays, ranks are
exchangeable: in each step any of them might as well have had any other's delay. The sum of a rank's delays is then a
sum of independent draws, one from each step's delays, whose distribution is known exactly; Chernoff's inequality (1952)
bounds how likely so large a sum is. A few large delays do not pass for a pattern: that the two largest of eight ranks'
fall on one of them happens once in eight runs.

Means: neighbouring steps resemble one another, so the noise of a mean is from a circular block bootstrap (Politis and
Romano 1992) with blocks of about sqrt(steps). All metrics are drawn together and their intervals are simultaneous: the
largest studentised deviation of each draw gives the critical value. Of twenty comparisons of alike runs, one shows a
difference in any metric at all.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CAPS = (1.5, 4.0, math.inf)
"""Delays are also compared when cut to so many times the usual largest one of a step, so that rare pauses do not hide a
small delay that is always there."""


EXPONENTS = np.geomspace(0.01, 1000.0, 60)
"""Exponents over which the bound is minimised, for delays in units of the largest."""
MAX_CELLS = 4_000_000
"""Numbers that are worked on at once."""


def chance_of_sum(delays: Floats, unit: int) -> float:
    """Bound of the probability that any of the units (ranks or nodes) gets as large a sum as ``unit`` by chance.

    ``delays`` has shape (steps, units).
    """
    if delays.shape[1] < 2:
        return 1.0
    usual = float(np.median(delays.max(axis=1)))
    bounds = [_chernoff(np.minimum(delays, cap * usual) if usual > 0 else delays, unit) for cap in CAPS]
    return min(1.0, min(bounds) * len(CAPS) * int(delays.shape[1]))


def _chernoff(delays: Floats, unit: int) -> float:
    """P(sum of independent draws >= s) <= min over t > 0 of exp(-t s) prod_k E[exp(t draw_k)].

    Draw k is any of the delays of step k. Relative to a step's largest delay, so that nothing overflows.
    """
    largest = float(delays.max())
    if largest <= 0 or delays[:, unit].sum() <= delays.mean(axis=1).sum():
        return 1.0
    below = (delays - delays.max(axis=1, keepdims=True)) / largest
    sum_below = float(below[:, unit].sum())
    log_bound = 0.0
    for exponents in np.array_split(EXPONENTS, min(len(EXPONENTS), 1 + below.size * len(EXPONENTS) // MAX_CELLS)):
        moments = np.exp(exponents[:, None, None] * below).mean(axis=2)
        log_bound = min(log_bound, float((np.log(moments).sum(axis=1) - exponents * sum_below).min()))
    return math.exp(log_bound)


LEVEL = 0.95
DRAWS = 2000
MIN_STEPS = 8
"""Fewer say nothing about their noise."""


def half_widths(values_a: Floats, values_b: Floats) -> Floats:
    """Half widths of the simultaneous intervals of mean(b) - mean(a), shape (metrics,).

    ``values`` have shape (steps, metrics). NaN throughout where either run has fewer than :data:`MIN_STEPS` steps.
    """
    if min(len(values_a), len(values_b)) < MIN_STEPS:
        unknown: Floats = np.full(values_a.shape[1], np.nan)
        return unknown
    random = np.random.default_rng(0)
    drawn_a, blocks_a = _block_bootstrap(values_a, random)
    drawn_b, blocks_b = _block_bootstrap(values_b, random)
    deviation = drawn_b - drawn_a
    error = deviation.std(axis=0)
    noisy = error > 0
    if not noisy.any():
        return np.zeros(values_a.shape[1])
    largest = np.abs(deviation[:, noisy] / error[noisy]).max(axis=1)
    critical = _student(float(np.quantile(largest, LEVEL)), blocks_a + blocks_b - 2)
    # Blocks of a short run miss what lasts longer than they do; a first-order process does not.
    widths: Floats = critical * np.maximum(error, np.hypot(_lasting_error(values_a), _lasting_error(values_b)))
    return widths


def _lasting_error(values: Floats) -> Floats:
    """Standard error of each mean if its noise is a first-order autoregressive process, shape (metrics,).

    The lag-one correlation of a short series is estimated too low by about (1 + 3 r) / n (Kendall 1954); that is added.
    """
    count = len(values)
    centred = values - values.mean(axis=0)
    square = (centred**2).sum(axis=0)
    lagged = (centred[1:] * centred[:-1]).sum(axis=0)
    raw = np.divide(lagged, square, out=np.zeros_like(square), where=square > 0)
    correlation = np.clip(raw + (1 + 3 * raw) / count, 0.0, 0.95)
    error: Floats = np.sqrt(square / (count - 1) / count * (1 + correlation) / (1 - correlation))
    return error


def _block_bootstrap(values: Floats, random: np.random.Generator) -> tuple[Floats, int]:
    """Deviations of drawn means from the mean, shape (DRAWS, metrics), and the number of blocks in a draw."""
    count = len(values)
    length = max(1, round(math.sqrt(count)))
    blocks = math.ceil(count / length)
    centred = values - values.mean(axis=0)
    circle = np.concatenate(
        (np.zeros((1, values.shape[1])), np.cumsum(np.concatenate((centred, centred[:length])), axis=0))
    )
    of_block = (circle[length : length + count] - circle[:count]) / length
    starts = random.integers(0, count, (DRAWS, blocks))
    drawn = np.concatenate(
        [of_block[part].mean(axis=1) for part in np.array_split(starts, max(1, DRAWS * blocks // 20_000))]
    )
    # Means of few blocks scatter too little, as a sample's standard deviation does.
    return drawn * math.sqrt(blocks / (blocks - 1)), blocks


def _student(normal: float, freedom: int) -> float:
    """Student's t quantile from the normal one, by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    return normal + first / freedom + second / freedom**2
