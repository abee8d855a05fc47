"""Is a rank late more than chance would have it? A test that knows nothing of the size or shape of the noise.

Where nobody is at fault ranks are exchangeable: in each step any of them might as well have had any other's delay. The
sum of a rank's delays is then a sum of independent draws, one from each step's delays, whose mean, variance and largest
value are known exactly; Bennett's inequality (1962) bounds how likely so large a sum is. A few large delays do not pass
for a pattern, since the bound is loose where one draw can make the sum.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CAPS = (1.5, 4.0, math.inf)
"""Delays are also compared when cut to so many times the usual largest one of a step, so that rare pauses do not hide a
small delay that is always there."""


def chance_of_sum(delays: Floats, unit: int) -> float:
    """Bound of the probability that any of the units (ranks or nodes) gets as large a sum as ``unit`` by chance.

    ``delays`` has shape (steps, units).
    """
    if delays.shape[1] < 2:
        return 1.0
    usual = float(np.median(delays.max(axis=1)))
    bounds = [_bennett(np.minimum(delays, cap * usual) if usual > 0 else delays, unit) for cap in CAPS]
    return min(1.0, min(bounds) * len(CAPS) * int(delays.shape[1]))


def _bennett(delays: Floats, unit: int) -> float:
    """P(sum of independent draws - its mean >= t) <= exp(-v / b^2 h(b t / v)), h(u) = (1 + u) ln(1 + u) - u.

    v is the sum's variance, b the largest deviation of a draw above its mean.
    """
    mean = delays.mean(axis=1)
    variance = float(delays.var(axis=1).sum())
    above = float(delays[:, unit].sum() - mean.sum())
    largest = float((delays.max(axis=1) - mean).max())
    if variance <= 0 or above <= 0:
        return 1.0
    u = largest * above / variance
    exponent = variance / largest**2 * ((1 + u) * math.log1p(u) - u)
    return math.exp(-exponent)
