"""AUROC against its definition, and where there is none."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hpcmm.errors import HpcmmError
from hpcmm.models.scores import image_auroc, pixel_auroc


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
    code = "import sys, hpcmm.models.scores; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
