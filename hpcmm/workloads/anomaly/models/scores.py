"""Area under the ROC curve of image scores and of anomaly maps, from arrays gathered over all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcmm.errors import HpcmmError


@dataclass(frozen=True, slots=True)
class Auroc:
    """An area under the ROC curve; nan with a ``reason`` if there is none."""

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


PRO_FPR_LIMIT = 0.3


def region_overlap(maps: NDArray[Any], masks: NDArray[Any], fpr_limit: float = PRO_FPR_LIMIT) -> Auroc:
    """Area under the per-region-overlap curve up to ``fpr_limit`` of false positive pixels, divided by the limit.

    At each threshold the overlap is the mean, over connected defect regions (8-neighbourhood), of the share of the
    region's pixels above it. ``maps`` and ``masks`` are (N, H, W). Source: P. Bergmann et al., "Uninformed Students",
    CVPR 2020, section 4.
    """
    if maps.shape != masks.shape:
        raise HpcmmError(f"The anomaly maps are {maps.shape} and the masks {masks.shape}; they must pair up.")
    weight, regions = _region_weights(masks > 0.5)
    normal = weight == 0
    if not regions or not normal.any():
        return Auroc(float("nan"), "no defect region" if not regions else "no normal pixel")
    flat = maps.ravel()
    if not np.isfinite(flat).all():
        return Auroc(float("nan"), f"{np.count_nonzero(~np.isfinite(flat))} pixel scores are not finite")
    order = np.argsort(-flat, kind="stable")
    # Equal scores pass every threshold together: only the last of them is a point of the curve.
    last = np.append(np.diff(flat[order]) != 0, True)
    false_rate = np.append(0.0, np.cumsum(normal.ravel()[order])[last] / normal.sum())
    overlap = np.append(0.0, np.cumsum(weight.ravel()[order])[last] / regions)
    inside = false_rate <= fpr_limit
    at_limit = np.interp(fpr_limit, false_rate, overlap)
    x, y = np.append(false_rate[inside], fpr_limit), np.append(overlap[inside], at_limit)
    return Auroc(min(1.0, float(np.trapezoid(y, x) / fpr_limit)))


def _region_weights(masks: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """For each pixel 1 / (pixels of its region), 0 outside; and the number of regions."""
    from scipy.ndimage import label  # noqa: PLC0415 - only evaluation needs it

    weight, regions = np.zeros(masks.shape), 0
    for image, mask in enumerate(masks):
        labels, count = label(mask, structure=np.ones((3, 3)))
        regions += count
        sizes = np.bincount(labels.ravel(), minlength=count + 1).astype(np.float64)
        sizes[0] = np.inf
        weight[image] = 1 / sizes[labels]
    return weight, regions


@dataclass(frozen=True, slots=True)
class Decision:
    """Normal or abnormal, at the threshold that gives the largest F1 over these very images; nan without defects."""

    threshold: float
    f1: float
    accuracy: float


def best_decision(scores: NDArray[Any], labels: NDArray[Any]) -> Decision:
    """The largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds, and the accuracy there.

    An image is called abnormal when its score reaches the threshold. Scores and labels (N,).
    """
    positive = labels.ravel() > 0.5
    if not positive.any() or not np.isfinite(scores).all():
        return Decision(float("nan"), float("nan"), float("nan"))
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(positive[order])[last]
    called = np.flatnonzero(last) + 1
    f1 = 2 * hits / (called + positive.sum())
    best = int(f1.argmax())
    wrong = (called[best] - hits[best]) + (positive.sum() - hits[best])
    return Decision(float(scores[order][last][best]), float(f1[best]), float(1 - wrong / len(positive)))
