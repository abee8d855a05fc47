"""Area under the ROC curve of image scores and of anomaly maps, from arrays gathered over all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcmm.errors import HpcmmError


@dataclass(frozen=True, slots=True)
class Auroc:
    """An area under the ROC curve; nan with a ``reason`` where there is none."""

    value: float
    reason: str | None = None


def image_auroc(scores: NDArray[Any], labels: NDArray[Any]) -> Auroc:
    """Scores (N,) against labels (N,), 1 for images with a defect."""
    return _auroc(scores, labels, "image")


def pixel_auroc(maps: NDArray[Any], masks: NDArray[Any]) -> Auroc:
    """Anomaly maps (N, H, W) or (N, 1, H, W) against masks of as many pixels, 1 where the defect is."""
    return _auroc(maps, masks, "pixel")


def _auroc(scores: NDArray[Any], truth: NDArray[Any], unit: str) -> Auroc:
    if scores.size != truth.size:
        raise HpcmmError(f"There are {scores.size} {unit} scores for {truth.size} {unit} labels; they must pair up.")
    flat, positive = scores.ravel(), truth.ravel() > 0.5
    if flat.size == 0:
        return Auroc(float("nan"), f"no {unit}s to score")
    if positive.all() or not positive.any():
        which = "abnormal" if positive.all() else "normal"
        return Auroc(float("nan"), f"every {unit} is {which}, and the ROC curve needs both kinds")
    if not np.isfinite(flat).all():
        return Auroc(float("nan"), f"{np.count_nonzero(~np.isfinite(flat))} {unit} scores are not finite")
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - takes a second, and only evaluation needs it

    return Auroc(float(roc_auc_score(positive, flat)))
