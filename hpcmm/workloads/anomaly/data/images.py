"""Decodes image and mask files into arrays of the side that the model sees."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.samples import Sample
from hpcmm.workloads.anomaly.pixels import CHANNEL_MEAN, CHANNEL_STD

Floats = NDArray[np.float32]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""Decoded, whatever a file is called. Pillow would know many more: an EPS file it gives to Ghostscript to run."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow raises for damaged files, depending on where the damage lies."""


def read_image(path: Path, side: int) -> Floats:
    """The image as (side, side, 3) with values from 0 to 1.

    Grey images get three equal channels, 16-bit ones lose their lower eight bits, transparency is dropped. Raises
    HpcmmError when the file is missing, not an image, or of a kind whose range of values is not known.
    """
    with open_image(path) as image:
        return pixels_of(image, side)


def open_image(path: Path) -> Image.Image:
    """The decoded image, of 8 bits a channel. Raises HpcmmError as :func:`read_image` does."""
    return _eight_bits(_open(path), path)


def pixels_of(image: Image.Image, side: int) -> Floats:
    """A decoded image of 8 bits a channel as (side, side, 3) with values from 0 to 1, as the model sees it."""
    pixels = np.asarray(_resize(image.convert("RGB"), side, Image.Resampling.BILINEAR), np.float32)
    return pixels / np.float32(255)


def read_mask(path: Path, side: int) -> Floats:
    """The defect mask as (side, side) of zeros and ones. Raises HpcmmError as :func:`read_image` does.

    Any value above 0 is a defect: MVTec-AD writes 255, VisA numbers its kinds of defect from 1 on.
    """
    with _open(path) as image:
        marked = Image.fromarray(_marked(image).astype(np.uint8))
    return np.asarray(_resize(marked, side, Image.Resampling.NEAREST), np.float32)


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
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def _marked(mask: Image.Image) -> NDArray[np.bool_]:
    """Where a mask (h, w) is above 0 in any colour; its transparency says nothing."""
    opaque = {"RGBA": "RGB", "LA": "L", "PA": "P"}.get(mask.mode)
    values = np.asarray(mask.convert(opaque) if opaque else mask)  # of a palette, the indices: VisA numbers with them
    return np.asarray(values > 0 if values.ndim == 2 else (values > 0).any(axis=2))


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Pillow would cut 16-bit values off at 255, which leaves a white image."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise HpcmmError(f"The image {path} has 32-bit values, whose range is not known: save it with 8 or 16 bits.")
    return image


def normalise(image: Floats) -> Floats:
    """(side, side, 3) in 0 to 1 as the models' (3, side, side); see :mod:`hpcmm.workloads.anomaly.pixels`."""
    return np.ascontiguousarray(((image - CHANNEL_MEAN) / CHANNEL_STD).transpose(2, 0, 1), dtype=np.float32)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=FORMATS)
        image.load()
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise HpcmmError(f"The image {path} cannot be read: {error}; replace it or take it out of the set.") from error
    return image


def _resize(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), resampling)
