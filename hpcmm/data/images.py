"""Decodes image and mask files into arrays of the side that the model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hpcmm.errors import HpcmmError

Floats = NDArray[np.float32]

CHANNEL_MEAN = 127 / 255
CHANNEL_STD = 128 / 255
"""What EfficientNet-Lite was trained with: (pixel - 127) / 128 of pixels from 0 to 255, the same for each channel."""


def read_image(path: Path, side: int) -> Floats:
    """The image as (side, side, 3) with values from 0 to 1; grey images get three equal channels.

    Raises HpcmmError when the file is missing or not an image.
    """
    with _open(path) as image:
        pixels = np.asarray(_resize(image.convert("RGB"), side, Image.Resampling.BILINEAR), np.float32)
    return pixels / np.float32(255)


def read_mask(path: Path, side: int) -> Floats:
    """The defect mask as (side, side) of zeros and ones. Raises HpcmmError as :func:`read_image` does."""
    with _open(path) as image:
        mask = np.asarray(_resize(image.convert("L"), side, Image.Resampling.NEAREST))
    return (mask > 127).astype(np.float32)


def normalise(image: Floats) -> Floats:
    """(side, side, 3) in 0 to 1 as the encoder's (3, side, side)."""
    return np.ascontiguousarray(((image - CHANNEL_MEAN) / CHANNEL_STD).transpose(2, 0, 1), dtype=np.float32)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise HpcmmError(f"The image {path} cannot be read: {error}; replace it or take it out of the set.") from error
    return image


def _resize(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), resampling)
