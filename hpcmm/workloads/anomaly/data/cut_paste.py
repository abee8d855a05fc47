"""Cut and paste: a piece of another normal image, set in by Poisson blending, so that no edge gives it away.

The idea is CutPaste's (C.-L. Li et al., CVPR 2021); sizes from a gamma distribution and Poisson blending are those of
NSA (H. M. Schlueter et al., "Natural Synthetic Anomalies", ECCV 2022), which AnomalyGPT trains with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.workloads.anomaly.data.poisson import blend

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

MOST_PIECES = 2
_SIZE_SHAPE, _SIZE_SCALE = 2.0, 0.08
_SMALLEST, _LARGEST = 0.06, 0.4
"""A piece's side as a share of the image's: gamma distributed with these, between these bounds."""
_VISIBLE = 0.05
"""Mean absolute change from which on a pixel counts as abnormal: blending leaves parts of a piece as they were."""


def cut_paste(image: Floats, donor: Floats, rng: np.random.Generator) -> tuple[Floats, Mask]:
    """Blend one or two pieces of ``donor`` into ``image``, both (side, side, 3), values from 0 to 1.

    Gives the changed image and where it differs visibly, (side, side), which may be nowhere.
    """
    changed = image
    covered = np.zeros(image.shape[:2], bool)
    for _ in range(int(rng.integers(1, MOST_PIECES + 1))):
        shape = _draw_shape(image.shape[0], rng)
        piece = _draw_piece(donor, rng)
        changed = np.clip(blend(changed, piece, shape), 0, 1).astype(np.float32)
        covered |= shape
    return changed, covered & (np.abs(changed - image).mean(axis=2) >= _VISIBLE)


def _draw_shape(side: int, rng: np.random.Generator) -> Mask:
    """A rectangle or an ellipse, anywhere but on the border."""
    extent = np.clip(rng.gamma(_SIZE_SHAPE, _SIZE_SCALE, size=2), _SMALLEST, _LARGEST)
    height, width = np.maximum(2, np.round(extent * side)).astype(int)
    top, left = (int(rng.integers(1, side - 1 - length)) for length in (height, width))
    shape = np.zeros((side, side), bool)
    if rng.random() < 0.5:
        shape[top : top + height, left : left + width] = True
        return shape
    y, x = ((np.arange(length) + 0.5) / length * 2 - 1 for length in (height, width))
    shape[top : top + height, left : left + width] = y[:, None] ** 2 + x[None, :] ** 2 <= 1
    return shape


def _draw_piece(donor: Floats, rng: np.random.Generator) -> Floats:
    """The donor, turned and enlarged a little, and moved so that any part of it may lie under a shape."""
    side = donor.shape[0]
    turned = np.rot90(donor, int(rng.integers(4)))
    moved = np.roll(turned, tuple(rng.integers(0, side, size=2)), axis=(0, 1))
    if rng.random() < 0.5:
        return np.ascontiguousarray(moved)
    kept = int(side * rng.uniform(0.6, 1.0))
    picture = Image.fromarray(np.round(moved * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR, box=(0, 0, kept, kept)
    )
    return np.asarray(picture, np.float32) / np.float32(255)
