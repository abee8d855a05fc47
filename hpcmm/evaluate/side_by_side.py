"""Models side by side as text: the cells, a Markdown page and LaTeX tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.evaluate.table import separated
from hpcmm.workloads.anomaly.origin import PUBLISHED, STANDINS, is_published_experiment
from hpcmm.workloads.anomaly.scoring import MEAN, METRICS, POOLED

TITLES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO", "f1": "F1"}
"""Metrics whose name is not good enough for a heading."""


def title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def metrics_of(summary: pd.DataFrame) -> list[str]:
    """The metrics that any model has, in their order."""
    present = set(summary["metric"])
    return [metric for metric in METRICS if metric in present]


def models_of(summary: pd.DataFrame) -> list[str]:
    return [str(model) for model in dict.fromkeys(summary["model"])]


def wide(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a category, the mean over categories last; one column a model with ``mean [low, high]``."""
    categories = [str(each) for each in dict.fromkeys(summary["category"])]
    rows = [
        [category, *(cell(summary, model, category, metric) for model in models_of(summary))] for category in categories
    ]
    return pd.DataFrame(rows, columns=["category", *models_of(summary)])


def means(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a model, one column a metric: the means over categories."""
    metrics = metrics_of(summary)
    rows = [[model, *(cell(summary, model, MEAN, metric) for metric in metrics)] for model in models_of(summary)]
    return pd.DataFrame(rows, columns=["mean over categories", *map(title, metrics)])


def cell(summary: pd.DataFrame, model: str, category: str, metric: str) -> str:
    """``mean [low, high]``, the mean alone of one seed, a dash where there is none."""
    own = (summary["model"] == model) & (summary["category"] == category) & (summary["metric"] == metric)
    if not own.any():
        return "-"
    mean, low, high = (float(summary.loc[own, name].iloc[0]) for name in ("mean", "low", "high"))
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def remarks(table: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What may be concluded: on which data, over how many seeds, and which models the intervals tell apart."""
    seeds = summary.groupby("model", sort=False)["seeds"].max()
    many = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    trained_on, scored_on = (_listed(table[column]) for column in ("trained_on", "scored_on"))
    said = [
        f"Trained on {trained_on}, scored on {scored_on}; {many} seed{'s' if many != '1' else ''} a model. "
        "Brackets: 95% confidence interval over the seeds (Student's t)."
    ]
    if len(seeds) > 1:
        alone = ["One seed a model gives no interval: none is ranked above another."]
        said += _ranking(summary) if seeds.max() > 1 else alone
    if STANDINS in {*table["trained_on"], *table["scored_on"]}:
        said.append(
            "These are stand-ins, cut from other photographs: the scores say that training works, and nothing about "
            "MVTec-AD or VisA. They cannot be compared with published numbers."
        )
    return said


def published(table: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame | None:
    """The published accuracies beside the measured ones, where the runs did what the paper did; else None."""
    models = [model for model in models_of(summary) if model in PUBLISHED]
    if not models or not is_published_experiment(table["trained_on"], table["scored_on"]):
        return None
    rows = [[model, cell(summary, model, MEAN, "accuracy"), f"{PUBLISHED[model]:.4f}"] for model in models]
    return pd.DataFrame(rows, columns=["model", "accuracy", "published accuracy"])


def markdown(table: pd.DataFrame, summary: pd.DataFrame) -> str:
    """A page with all tables."""
    parts = ["# Models side by side", *remarks(table, summary), "## Means over categories", _markdown(means(summary))]
    beside = published(table, summary)
    if beside is not None:
        parts += ["## Beside the published accuracies", _markdown(beside)]
    for metric in metrics_of(summary):
        parts += [f"## {title(metric)} by category", _markdown(wide(summary, metric))]
    return "\n\n".join(parts) + "\n"


def latex(table: pd.DataFrame, summary: pd.DataFrame) -> str:
    """The same tables for a paper, with booktabs' rules."""
    tables = [("Means over categories", means(summary))]
    tables += [(f"{title(metric)} by category", wide(summary, metric)) for metric in metrics_of(summary)]
    said = "".join(f"% {_one_line(remark)}\n" for remark in remarks(table, summary))
    return said + "".join(_latex(caption, each) for caption, each in tables)


def _listed(names: pd.Series) -> str:
    return " and ".join(str(name) for name in dict.fromkeys(names))


def _ranking(summary: pd.DataFrame) -> list[str]:
    """Which models are better than others, where their intervals do not touch, and nothing on all the rest."""
    said, undecided = [], []
    for metric in metrics_of(summary):
        pairs = separated(summary, metric)
        if pairs:
            told = "; ".join(f"{better} is better than {worse}" for better, worse in pairs)
            said.append(f"In {title(metric)}: {told}; other intervals touch.")
        else:
            undecided.append(title(metric))
    if undecided:
        said.append(f"In {', '.join(undecided)} the intervals separate no two models: none is ranked above another.")
    return said


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(map(str, frame.columns)), ["---"] + ["---:"] * (frame.shape[1] - 1), *frame.astype(str).to_numpy()]
    return "\n".join(
        f"| {' | '.join(_one_line(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines
    )


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: object) -> str:
    return re.sub(
        r"[\\~^#$%&_{}\[\]]",
        lambda found: _LATEX.get(found[0], "{" + found[0] + "}" if found[0] in "[]" else "\\" + found[0]),
        _one_line(text),
    )


def _latex(caption: str, frame: pd.DataFrame) -> str:
    def line(texts: Sequence[object]) -> str:
        return " & ".join(map(_escaped, texts)) + r" \\" + "\n"

    body = []
    for row in frame.astype(str).to_numpy():
        rule = "\\midrule\n" if row[0] in {POOLED} else ""
        body.append(rule + line(list(row)))
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_escaped(caption)}}}\n\\begin{{tabular}}{{l{'r' * (frame.shape[1] - 1)}}}\n\\toprule\n"
        f"{line(list(frame.columns))}\\midrule\n{''.join(body)}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )
