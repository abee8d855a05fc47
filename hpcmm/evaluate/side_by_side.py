"""Models side by side: means over seeds with their intervals, as cells, a Markdown page, LaTeX tables and a chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from hpcmm.evaluate.evaluation import MEAN, Evaluation
from hpcmm.files import write_whole
from hpcmm.page.outputs import escape

CONFIDENCE = 0.95
COLUMNS = ["model", "category", "metric", "seeds", "mean", "low", "high"]


def over_seeds(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Rows (model, seed, category, metrics) to COLUMNS: a mean over seeds and its confidence interval.

    The interval is Student's t over the seeds' values, cut to 0 and 1; nan for one seed, which has no spread to see.
    """
    from scipy.stats import t as student  # noqa: PLC0415 - takes a second

    metrics = [metric for metric in metrics if metric in table]
    long = table.melt(["model", "seed", "category"], metrics, "metric", "value").dropna(subset="value")
    rows = []
    for (model, category, metric), own in long.groupby(["model", "category", "metric"], sort=False):
        values = own["value"].to_numpy(np.float64)
        count, mean = len(values), float(values.mean())
        half = np.nan
        if count > 1:
            half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
        rows.append((model, category, metric, count, mean, max(0.0, mean - half), min(1.0, mean + half)))
    found = pd.DataFrame(rows, columns=COLUMNS)
    if found.empty:
        return found
    found.loc[found["seeds"] < 2, ["low", "high"]] = np.nan
    return found


def separated(intervals: pd.DataFrame, metric: str) -> list[tuple[str, str]]:
    """Pairs (better, worse) of models whose intervals of ``metric``, in the mean over categories, do not touch."""
    rows = intervals[(intervals["category"] == MEAN) & (intervals["metric"] == metric)].dropna(subset=["low"])
    models = [str(model) for model in rows["model"]]
    low, high = rows["low"].to_numpy(np.float64), rows["high"].to_numpy(np.float64)
    return [(models[i], models[j]) for i, j in zip(*np.nonzero(low[:, None] > high[None, :]), strict=True)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of several runs, and what may be concluded of their models."""

    evaluation: Evaluation
    table: pd.DataFrame
    """Rows (run, model, seed, trained_on, scored_on, category) with a column a metric."""
    summary: pd.DataFrame
    """:data:`COLUMNS`, made of it by :func:`over_seeds`."""

    @classmethod
    def of(cls, evaluation: Evaluation, table: pd.DataFrame) -> Comparison:
        """The comparison of the runs in ``table``."""
        return cls(evaluation, table, over_seeds(table, evaluation.metrics))

    @property
    def metrics(self) -> list[str]:
        """The metrics that any model has, in their order."""
        present = set(self.summary["metric"])
        return [metric for metric in self.evaluation.metrics if metric in present]

    @property
    def models(self) -> list[str]:
        return [str(model) for model in dict.fromkeys(self.summary["model"])]

    @property
    def categories(self) -> list[str]:
        """All rows of a model: categories, then what is pooled, then the mean."""
        return [str(category) for category in dict.fromkeys(self.summary["category"])]

    def title(self, metric: str) -> str:
        return self.evaluation.titles.get(metric, metric.replace("_", " "))

    def wide(self, metric: str) -> pd.DataFrame:
        """One row a category, the mean over categories last; one column a model with ``mean [low, high]``."""
        rows = [
            [category, *(self._cell(model, category, metric) for model in self.models)] for category in self.categories
        ]
        return pd.DataFrame(rows, columns=["category", *self.models])

    def means(self) -> pd.DataFrame:
        """One row a model, one column a metric: the means over categories."""
        rows = [[model, *(self._cell(model, MEAN, metric) for metric in self.metrics)] for model in self.models]
        return pd.DataFrame(rows, columns=["mean over categories", *map(self.title, self.metrics)])

    def remarks(self) -> list[str]:
        """What may be concluded: on which data, over how many seeds, and which models the intervals tell apart."""
        seeds = self.summary.groupby("model", sort=False)["seeds"].max()
        many = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
        trained_on, scored_on = (_listed(self.table[column]) for column in ("trained_on", "scored_on"))
        said = [
            f"Trained on {trained_on}, scored on {scored_on}; {many} seed{'s' if many != '1' else ''} a model. "
            "Brackets: 95% confidence interval over the seeds (Student's t)."
        ]
        if len(seeds) > 1:
            alone = ["One seed a model gives no interval: none is ranked above another."]
            said += self._ranking() if seeds.max() > 1 else alone
        return said + self.evaluation.remarks(self.table)

    def published(self) -> tuple[str, pd.DataFrame] | None:
        """The plural of the metric, and its published values beside the measured ones; None for another experiment."""
        known = self.evaluation.published(self.table)
        models = [] if known is None else [model for model in self.models if model in known.values]
        if known is None or not models:
            return None
        metric = self.title(known.metric)
        rows = [[model, self._cell(model, MEAN, known.metric), f"{known.values[model]:.4f}"] for model in models]
        table = pd.DataFrame(rows, columns=["model", metric, f"published {metric}"])
        return known.plural, table

    def markdown(self) -> str:
        """A page with all tables."""
        means = ["## Means over categories", _markdown(self.means())]
        parts = ["# Models side by side", *map(escape, self.remarks()), *means]
        beside = self.published()
        if beside is not None:
            parts += [f"## Beside the published {escape(beside[0])}", _markdown(beside[1])]
        for metric in self.metrics:
            parts += [f"## {escape(self.title(metric))} by category", _markdown(self.wide(metric))]
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """The same tables for a paper, with booktabs' rules."""
        tables = [("Means over categories", self.means())]
        tables += [(f"{self.title(metric)} by category", self.wide(metric)) for metric in self.metrics]
        said = "".join(f"% {_one_line(remark)}\n" for remark in self.remarks())
        return said + "".join(_latex(caption, each, self.evaluation.pooled) for caption, each in tables)

    def draw_chart(self, path: Path) -> None:
        """Write a PNG: a panel of all metrics' means with their intervals, then one by category for some metrics."""
        panels = [("Means over categories", [(self.title(metric), MEAN, metric) for metric in self.metrics])]
        categories = [each for each in self.categories if each not in {MEAN, self.evaluation.pooled}]
        panels += [
            (f"{self.title(metric)} by category", [(category, category, metric) for category in categories])
            for metric in self.metrics
            if metric in self.evaluation.charted
        ]
        models = self.models
        size = len(models) * _STEP + _GAP
        height = 2 * _MARGIN + len(models) * 16 + sum(46 + len(rows) * size for _, rows in panels)
        canvas = _Canvas(_LABEL + _PLOT + 4 * _MARGIN, height)
        top = _MARGIN
        for place, model in enumerate(models):
            canvas.dot(_LABEL + 8, top + 8, COLOURS[place % len(COLOURS)])
            canvas.text(_LABEL + 18, top, model)
            top += 16
        for heading, rows in panels:
            top = _panel(canvas, top + 8, heading, rows, self.summary, models)
        write_whole(path, lambda file: canvas.image.save(file, format="PNG"))

    def _cell(self, model: str, category: str, metric: str) -> str:
        """``mean [low, high]``, the mean alone of one seed, a dash if there is none."""
        summary = self.summary
        own = (summary["model"] == model) & (summary["category"] == category) & (summary["metric"] == metric)
        if not own.any():
            return "-"
        mean, low, high = (float(summary.loc[own, name].iloc[0]) for name in ("mean", "low", "high"))
        return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    def _ranking(self) -> list[str]:
        """Which models are better than others, if their intervals do not touch, and nothing on all the rest."""
        said, undecided = [], []
        for metric in self.metrics:
            pairs = separated(self.summary, metric)
            if pairs:
                told = "; ".join(f"{better} is better than {worse}" for better, worse in pairs)
                said.append(f"In {self.title(metric)}: {told}; other intervals touch.")
            else:
                undecided.append(self.title(metric))
        if undecided:
            said.append(
                f"In {', '.join(undecided)} the intervals separate no two models: none is ranked above another."
            )
        return said


def _listed(names: pd.Series) -> str:
    return " and ".join(str(name) for name in dict.fromkeys(names))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _markdown(frame: pd.DataFrame) -> str:
    rule = ["---"] + ["---:"] * (frame.shape[1] - 1)
    head, *body = ([escape(_one_line(text)) for text in line] for line in (frame.columns, *frame.to_numpy()))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: object) -> str:
    return re.sub(
        r"[\\~^#$%&_{}\[\]]",
        lambda found: _LATEX.get(found[0], "{" + found[0] + "}" if found[0] in "[]" else "\\" + found[0]),
        _one_line(text),
    )


def _latex(caption: str, frame: pd.DataFrame, pooled: str | None) -> str:
    def line(texts: Sequence[object]) -> str:
        return " & ".join(map(_escaped, texts)) + r" \\" + "\n"

    body = []
    for row in frame.astype(str).to_numpy():
        rule = "\\midrule\n" if row[0] == pooled else ""
        body.append(rule + line(list(row)))
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_escaped(caption)}}}\n\\begin{{tabular}}{{l{'r' * (frame.shape[1] - 1)}}}\n\\toprule\n"
        f"{line(list(frame.columns))}\\midrule\n{''.join(body)}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too; used in turns."""
_LABEL, _PLOT, _STEP, _GAP, _MARGIN, _SCALE = 130, 420, 13, 12, 14, 2
"""Pixels before ``_SCALE``: names, plot, height of a model's line, between categories, around."""


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
