"""Decodes image and mask files into arrays of the side that the model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hpcmm.data.samples import Sample
from hpcmm.errors import HpcmmError
from hpcmm.pixels import CHANNEL_MEAN, CHANNEL_STD

Floats = NDArray[np.float32]


def read_image(path: Path, side: int) -> Floats:
    """The image as (side, side, 3) with values from 0 to 1; grey images get three equal channels.

    Raises HpcmmError when the file is missing or not an image.
    """
    with _open(path) as image:
        pixels = np.asarray(_resize(image.convert("RGB"), side, Image.Resampling.BILINEAR), np.float32)
    return pixels / np.float32(255)


def read_mask(path: Path, side: int) -> Floats:
    """The defect mask as (side, side) of zeros and ones. Raises HpcmmError as :func:`read_image` does.

    Any value above 0 is a defect: MVTec-AD writes 255, VisA numbers its kinds of defect from 1 on.
    """
    with _open(path) as image:
        mask = np.asarray(_resize(_single_channel(image), side, Image.Resampling.NEAREST))
    return (mask > 0).astype(np.float32)


def read_pair(sample: Sample, side: int) -> tuple[Floats, Floats]:
    """A sample's image (side, side, 3) and its mask (side, side), zeros for a normal image.

    Raises HpcmmError when either cannot be read, or the two files are not of one size.
    """
    image = read_image(sample.image, side)
    if sample.mask is None:
        return image, np.zeros(image.shape[:2], np.float32)
    sizes = [_size(sample.image), _size(sample.mask)]
    if sizes[0] != sizes[1]:
        told = " and ".join(f"{width} x {height}" for width, height in sizes)
        raise HpcmmError(f"The image {sample.image} and its mask {sample.mask} must be of one size, not {told} pixels.")
    return image, read_mask(sample.mask, side)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _single_channel(image: Image.Image) -> Image.Image:
    """A palette's indices are its values: VisA's masks could lose them as colours."""
    return image if image.mode in {"L", "P", "1"} else image.convert("L")


def normalise(image: Floats) -> Floats:
    """(side, side, 3) in 0 to 1 as the models' (3, side, side); see :mod:`hpcmm.pixels`."""
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
