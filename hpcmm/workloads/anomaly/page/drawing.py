"""An anomaly map over its image, as a picture within the page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.workloads.anomaly.maps_picture import heat

Floats = NDArray[np.float32]
LARGEST_SIDE = 560
SMALL_SIDE = 200
_MOST_OPAQUE = 0.75
_OUTLINE = np.array([0, 229, 255], np.float32)
"""Cyan, which the heat colours do not hold."""


def overlay(image: Image.Image, values: Floats, threshold: float) -> Image.Image:
    """The map (side, side) in colours over the image, and an outline around what reaches the threshold."""
    large = Image.fromarray(np.asarray(values, np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    enlarged = np.asarray(large)
    opaque = (_MOST_OPAQUE * np.clip(enlarged, 0, 1) ** 0.8)[..., None]
    mixed = np.asarray(image, np.float32) * (1 - opaque) + heat(enlarged) * 255 * opaque
    mixed[_edge(enlarged >= threshold)] = _OUTLINE
    return Image.fromarray(mixed.round().astype(np.uint8))


def _edge(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The two outermost pixels within each marked region."""
    inner = np.pad(marked, 2, mode="edge")
    height, width = marked.shape
    kept = np.ones_like(marked)
    for down, right in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (3, 3), (1, 3), (3, 1)):
        kept &= inner[down : down + height, right : right + width]
    return marked & ~kept
