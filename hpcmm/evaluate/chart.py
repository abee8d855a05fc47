"""A chart of the models side by side: for each metric a mean over categories with its interval, then by category."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from hpcmm.evaluate.side_by_side import metrics_of, models_of, title
from hpcmm.workloads.anomaly.scoring import MEAN, POOLED

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too; used in turns."""
_LABEL, _PLOT, _STEP, _GAP, _MARGIN, _SCALE = 130, 420, 13, 12, 14, 2
"""Pixels before ``_SCALE``: names, plot, height of a model's line, between categories, around."""


def draw(path: Path, summary: pd.DataFrame) -> None:
    """Write a PNG: a panel for each of image and pixel AUROC by category, and one of all metrics' means."""
    metrics = metrics_of(summary)
    panels = [("Means over categories", [(title(metric), MEAN, metric) for metric in metrics])]
    categories = [str(each) for each in dict.fromkeys(summary["category"]) if each not in {MEAN, POOLED}]
    panels += [
        (f"{title(metric)} by category", [(category, category, metric) for category in categories])
        for metric in metrics
        if metric.endswith("auroc")
    ]
    models = models_of(summary)
    size = len(models) * _STEP + _GAP
    height = 2 * _MARGIN + len(models) * 16 + sum(46 + len(rows) * size for _, rows in panels)
    canvas = _Canvas(_LABEL + _PLOT + 4 * _MARGIN, height)
    top = _MARGIN
    for place, model in enumerate(models):
        canvas.dot(_LABEL + 8, top + 8, COLOURS[place % len(COLOURS)])
        canvas.text(_LABEL + 18, top, model)
        top += 16
    for heading, rows in panels:
        top = _panel(canvas, top + 8, heading, rows, summary, models)
    canvas.image.save(path)


def _panel(
    canvas: _Canvas, top: int, heading: str, rows: list[tuple[str, str, str]], summary: pd.DataFrame, models: list[str]
) -> int:
    """Draw rows of (label, category, metric) below ``top``; returns where the next panel may begin."""
    canvas.text(_MARGIN, top, heading)
    low = min(0.5, float(np.floor(10 * np.nanmin(summary[["mean", "low"]].to_numpy(np.float64))) / 10))
    start, size = top + 20, len(models) * _STEP + _GAP
    end = start + len(rows) * size

    def x(value: float) -> float:
        return _LABEL + _PLOT * (value - low) / (1 - low)

    for tick in np.arange(round(10 * low), 11) / 10:
        canvas.line(x(tick), start, x(tick), end, "#dddddd")
        canvas.text(int(x(tick)) - 8, end + 2, f"{tick:.1f}", "#555555")
    for row, (label, category, metric) in enumerate(rows):
        at = start + row * size + _GAP // 2
        canvas.text(_MARGIN, at + len(models) * _STEP // 2 - 7, label)
        for place, model in enumerate(models):
            own = summary[
                (summary["model"] == model) & (summary["category"] == category) & (summary["metric"] == metric)
            ]
            for mean, lower, upper in own[["mean", "low", "high"]].itertuples(index=False):
                y, colour = at + place * _STEP + _STEP // 2, COLOURS[place % len(COLOURS)]
                if not np.isnan(lower):
                    canvas.line(x(lower), y, x(upper), y, colour, width=2)
                canvas.dot(x(mean), y, colour)
    return end + 18


class _Canvas:
    """Text, lines and dots in plot pixels, drawn ``_SCALE`` times as large so that they are smooth."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _SCALE, height * _SCALE), "white")
        self._pen = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(size=11 * _SCALE)

    def text(self, x: float, y: float, text: str, colour: str = "black") -> None:
        self._pen.text((x * _SCALE, y * _SCALE), text[:60], fill=colour, font=self._font)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str, width: int = 1) -> None:
        self._pen.line([x0 * _SCALE, y0 * _SCALE, x1 * _SCALE, y1 * _SCALE], fill=colour, width=width * _SCALE)

    def dot(self, x: float, y: float, colour: str) -> None:
        self._pen.ellipse([(x - 4) * _SCALE, (y - 4) * _SCALE, (x + 4) * _SCALE, (y + 4) * _SCALE], fill=colour)
