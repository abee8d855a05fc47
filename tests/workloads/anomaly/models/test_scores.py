"""AUROC against its definition, and where there is none."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import label
from sklearn.metrics import accuracy_score, f1_score

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.scores import best_decision, image_auroc, pixel_auroc, region_overlap


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, size=60) / 8, rng.integers(0, 2, size=60)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert image_auroc(scores, labels).value == pytest.approx(np.mean(pairs))


def test_pixels_are_compared_over_all_images():
    maps = np.array([[[0.1, 0.9], [0.2, 0.3]], [[0.8, 0.4], [0.2, 0.1]]])
    masks = np.array([[[0, 1], [0, 0]], [[1, 0], [0, 0]]], dtype=bool)
    assert pixel_auroc(maps, masks).value == 1.0
    assert pixel_auroc(maps, masks[:, None]).value == 1.0
    assert pixel_auroc(1 - maps, masks).value == 0.0


@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([0.1, 0.2], [0, 0], "every image is normal"),
        ([0.1, 0.2], [1, 1], "every image is abnormal"),
        ([], [], "no images"),
        ([0.1, math.nan], [0, 1], "1 image scores are not finite"),
    ],
)
def test_where_there_is_no_auroc_the_reason_is_given(scores: list[float], labels: list[int], reason: str):
    result = image_auroc(np.array(scores), np.array(labels))
    assert math.isnan(result.value)
    assert result.reason is not None
    assert reason in result.reason


def test_scores_and_labels_must_pair_up():
    with pytest.raises(HpcmmError, match="3 image scores for 2 image labels"):
        image_auroc(np.zeros(3), np.zeros(2))


def test_importing_the_scores_imports_no_scikit_learn():
    code = "import sys, hpcmm.workloads.anomaly.models.scores; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def brute_force_pro(maps, masks, limit):
    """The definition, threshold by threshold."""
    regions = []
    for image, mask in enumerate(masks):
        labels, count = label(mask, structure=np.ones((3, 3)))
        regions += [(image, labels == number) for number in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        above = maps >= threshold
        overlap = np.mean([above[image][region].mean() for image, region in regions])
        points.append((above[~masks].mean(), overlap))
    x, y = np.array(points).T
    grid = np.concatenate((x[x <= limit], [limit]))
    return np.trapezoid(np.concatenate((y[x <= limit], [np.interp(limit, x, y)])), grid) / limit


def test_region_overlap_is_its_definition():
    rng = np.random.default_rng(3)
    masks = np.zeros((3, 12, 12), dtype=bool)
    masks[0, 2:5, 2:5] = masks[0, 8:10, 3:11] = masks[1, 0, 0] = masks[1, 1, 1] = True
    for levels in (4, 50, 10**6):
        maps = rng.integers(0, levels, size=masks.shape) / levels + 0.3 * masks
        assert region_overlap(maps, masks).value == pytest.approx(brute_force_pro(maps, masks, 0.3))


def test_region_overlap_weighs_a_small_region_as_much_as_a_large_one():
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, 0:10, 0:10] = masks[0, 15, 15] = True
    found_large = np.zeros((1, 20, 20))
    found_large[0, 0:10, 0:10] = 1.0
    # One region of two is found at once; the other grows linearly with the false positives: 0.5 + 0.5 * 0.15.
    assert region_overlap(found_large, masks).value == pytest.approx(0.5 + 0.5 * 0.15)
    assert region_overlap(masks.astype(float), masks).value == 1.0


@pytest.mark.parametrize(("mask", "reason"), [(0, "no defect region"), (1, "no normal pixel")])
def test_where_there_is_no_region_overlap_the_reason_is_given(mask: int, reason: str):
    result = region_overlap(np.zeros((1, 4, 4)), np.full((1, 4, 4), mask))
    assert math.isnan(result.value)
    assert result.reason == reason


def test_the_best_decision_agrees_with_scikit_learn_at_every_threshold():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 30, size=80) / 30, rng.integers(0, 2, size=80)
    found = best_decision(scores, labels)
    by_threshold = {cut: f1_score(labels, scores >= cut) for cut in set(scores)}
    assert found.f1 == pytest.approx(max(by_threshold.values()))
    assert found.f1 == pytest.approx(f1_score(labels, scores >= found.threshold))
    assert found.accuracy == pytest.approx(accuracy_score(labels, scores >= found.threshold))
    assert math.isnan(best_decision(scores, np.zeros(80)).f1)
