"""From a file that somebody uploaded to an image, or to one sentence on why it is none; and images within a page.

Only the formats below are decoded, whatever the file is called. The size is read from the header and checked before
a pixel is decoded, so that a small file cannot unfold into all of the memory.
"""

from __future__ import annotations

import base64
import io
import mmap
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from hpcmm.errors import HpcmmError
from hpcmm.serve.options import ServeOptions

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""Of images that are decoded. Pillow would know many more: an EPS file it gives to Ghostscript to run."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""What the page's file dialogue offers."""
_RANGE_UNKNOWN = ("I", "F")
_MOST_SCANS = 100
_MOST_PIECES = 200_000
"""Scans of a JPEG, each of which is a pass over all pixels, and strips or tiles of a TIFF: a file may have millions."""


class UnusableImageError(HpcmmError):
    """A file that is no image, or one that is too large; the sentence is meant for whoever uploaded it."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A decoded image, RGB and upright, and what there is to say about it."""

    image: Image.Image
    file_bytes: int
    note: str = ""


def sent_file(payload: Any) -> tuple[Path, str] | None:
    """An upload's path and the name that it had, which is the sender's word, without folders.

    It takes the place of a gradio component's own ``preprocess``, which would decode the file, or open it: hpcmm does,
    within its limits. (A component class of its own would have gradio write a file beside its module.)
    """
    if payload is None or payload.path is None:
        return None
    name = payload.orig_name if isinstance(payload.orig_name, str) and payload.orig_name else Path(payload.path).name
    return Path(payload.path), name.replace("\\", "/").rpartition("/")[2][:200]


def sent_files(payload: Any) -> list[tuple[Path, str]]:
    """As :func:`sent_file`, of a component that takes several."""
    return [sent for each in payload or [] if (sent := sent_file(each)) is not None]


def open_upload(path: Path, limits: ServeOptions) -> Uploaded:
    """Decode an image. Raises UnusableImageError if it is none of :data:`FORMATS` or exceeds a limit.

    Raises HpcmmError, as ``check_upload``, if its file does.
    """
    size = limits.check_upload(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused by its size below
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image, limits)
                _check_pieces(image, path)
                note = _note(image)
                image.load()
                return Uploaded(_as_rgb(image), size, note)
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImageError("The file is no PNG, JPEG, BMP, TIFF or WebP image.") from error
    except Image.DecompressionBombError as error:
        raise UnusableImageError(_too_many(limits)) from error
    except Exception as error:  # a decoder may raise whatever a hostile file leads it to
        raise UnusableImageError("The image is damaged or cut off, and cannot be decoded.") from error


def _check_size(image: Image.Image, limits: ServeOptions) -> None:
    width, height = image.size
    if width * height > limits.max_megapixels * 1e6:
        raise UnusableImageError(f"The image has {width} x {height} pixels. {_too_many(limits)}")
    if min(width, height) < 2:
        raise UnusableImageError(f"The image has {width} x {height} pixels, too few to show anything.")


def _check_pieces(image: Image.Image, path: Path) -> None:
    scans = _scans_in(path) if isinstance(image, JpegImageFile) else 0
    if scans > _MOST_SCANS or len(getattr(image, "tile", ())) > _MOST_PIECES:
        raise UnusableImageError(
            "The image is stored in very many pieces, which take too long: save it again with another program."
        )


_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
"""But for those of restarts, which lie within a scan, and the reserved ones, behind which a decoder looks on."""
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA


def _scans_in(path: Path) -> int:
    """Scans of a JPEG up to its end, and no more than matter: a phone appends a film to it, which is not decoded."""
    scans, at = 0, 2
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while scans <= _MOST_SCANS and (marker := _JPEG_MARKER.search(content, at)) is not None:
            at, kind = marker.end(), marker[1][0]
            if kind in {_SOI, _EOI}:
                break
            scans += kind == _SOS
            at += max(2, int.from_bytes(content[at : at + 2], "big"))  # a thumbnail in a header has scans of its own
    return scans


def _too_many(limits: ServeOptions) -> str:
    return f"At most {limits.max_megapixels:g} million pixels are taken: make it smaller."


def _note(image: Image.Image) -> str:
    return "The file holds several images; this is the first." if _has_several(image) else ""


def _has_several(image: Image.Image) -> bool:
    if image.format != "TIFF":
        return bool(getattr(image, "is_animated", False))
    try:
        image.seek(1)  # to count them, a TIFF's would all be read
    except EOFError:
        return False
    image.seek(0)
    return True


def _as_rgb(image: Image.Image) -> Image.Image:
    """Upright, without its alpha channel; of 16 bits a pixel the upper eight, as in training."""
    if image.mode in _RANGE_UNKNOWN:
        raise UnusableImageError("The image has 32-bit values, whose range is not known: save it with 8 or 16 bits.")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    upright = ImageOps.exif_transpose(image)
    return (upright or image).convert("RGB")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side of ``side`` pixels; a small one is enlarged."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return written.getvalue()


def data_uri(picture: bytes) -> str:
    """A JPEG as text that an ``img`` takes: no file lies anywhere."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode("ascii")
