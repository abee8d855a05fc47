"""The duration of each step: median over ranks as a line, fastest to slowest rank as a band."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import seconds

WIDTH, HEIGHT = 1000.0, 200.0
"""Units of the drawing, which is stretched to the page."""
MAX_POINTS = 1500
"""More steps than this are drawn as bins: their least, median and largest."""
MAX_LABELS = 10

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepPlot:
    """Paths in units of WIDTH x HEIGHT, tick positions in percent, and the numbers for the viewer."""

    band: str
    line: str
    mean: float | None
    """Percent from the top of the mean without warm-up."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: dict[str, Any]
    told: str


def step_plot(study: Study) -> StepPlot | None:
    """The plot; None without closed steps."""
    table = study.tables["steps"]
    if table.empty:
        return None
    grouped = table.groupby("step")["duration_s"]
    numbers = np.array([int(str(step)) for step in grouped.groups], dtype=np.int64)
    low, middle, high = (grouped.agg(name).to_numpy(np.float64) for name in ("min", "median", "max"))
    numbers, low, middle, high = _binned(numbers, low, middle, high)
    first, last = int(numbers[0]), max(int(numbers[-1]), int(numbers[0]) + 1)
    ticks = _ticks(float(high.max()))
    top = ticks[-1]
    x = (numbers - first) / (last - first) * WIDTH
    mean = study.steps.mean_s
    slowest = int(middle.argmax())
    return StepPlot(
        band=_path(np.append(x, x[::-1]), _y(np.append(high, low[::-1]), top)) + "Z",
        line=_path(x, _y(middle, top)),
        mean=round(100 * (1 - mean / top), 2) if 0 < mean <= top else None,
        x_ticks=[(round(100 * (tick - first) / (last - first), 2), str(tick)) for tick in _whole_ticks(first, last)],
        y_ticks=[(round(100 * (1 - tick / top), 2), seconds(tick)) for tick in ticks],
        points={
            "step": numbers.tolist(),
            "min": _rounded(low),
            "median": _rounded(middle),
            "max": _rounded(high),
            "top": top,
        },
        told=(
            f"Steps {first} to {int(numbers[-1])}: median {seconds(float(np.median(middle)))}, "
            f"slowest {seconds(float(middle[slowest]))} at step {int(numbers[slowest])}."
        ),
    )


def _binned(numbers: npt.NDArray[np.int64], *series: Floats) -> tuple[npt.NDArray[np.int64], Floats, Floats, Floats]:
    low, middle, high = series
    if len(numbers) <= MAX_POINTS:
        return numbers, low, middle, high
    edges = np.linspace(0, len(numbers), MAX_POINTS + 1).astype(np.intp)[:-1]
    medians = np.array([np.median(part) for part in np.split(middle, edges[1:])])
    return numbers[edges], np.minimum.reduceat(low, edges), medians, np.maximum.reduceat(high, edges)


def _y(values: Floats, top: float) -> Floats:
    return HEIGHT * (1 - values / top)


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _rounded(values: Floats) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def _ticks(most: float) -> list[float]:
    """Round values from 0 to at least ``most``."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.9999)
    return [step * index for index in range(math.ceil(most / step * 0.9999) + 1)]


def _whole_ticks(first: int, last: int) -> list[int]:
    raw = max(1.0, (last - first) / MAX_LABELS)
    power = 10 ** math.floor(math.log10(raw))
    step = next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= raw)
    return list(range(-(-first // step) * step, last + 1, step))
