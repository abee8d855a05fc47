"""Several runs side by side: means over seeds with their confidence intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hpcmm.workloads.anomaly.scoring import MEAN, METRICS

CONFIDENCE = 0.95
COLUMNS = ["model", "category", "metric", "seeds", "mean", "low", "high"]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Rows (model, seed, category, METRICS) to COLUMNS: a mean over seeds and its confidence interval.

    The interval is Student's t over the seeds' values, cut to 0 and 1; nan for one seed, which has no spread to see.
    """
    from scipy.stats import t as student  # noqa: PLC0415 - takes a second

    metrics = [metric for metric in METRICS if metric in table]
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
