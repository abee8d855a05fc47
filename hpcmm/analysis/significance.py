"""Is a rank late more than chance would have it? A test that knows nothing of the size or shape of the noise.

Where nobody is at fault ranks are exchangeable: in each step any of them might as well have had any other's delay. The
sum of a rank's delays is then a sum of independent draws, one from each step's delays, whose distribution is known
exactly; Chernoff's inequality (1952) bounds how likely so large a sum is. A few large delays do not pass for a pattern:
that the two largest of eight ranks' fall on one of them happens once in eight runs.
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
