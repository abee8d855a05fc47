"""Real photographs that scikit-image's wheel bundles, each cut into one region to train on and one to be held out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a photograph in pixels; ``right`` and ``bottom`` lie outside it."""

    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: Region) -> bool:
        """Whether the two rectangles share a pixel."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Texture:
    """One category of the stand-in data set.

    Windows of ``window`` pixels are cut from ``train`` for the normal images to train on, and from ``test`` for the
    held-out images. The two regions share no pixel.
    """

    category: str
    file: str
    phrases: tuple[str, ...]
    """Noun phrases that fit each image of the category, with or without a defect."""
    train: Region
    test: Region
    window: int


TEXTURES = (
    Texture(
        category="brick",
        file="brick.png",
        phrases=("a brick wall", "a close-up of a brick wall", "a wall of narrow bricks"),
        train=Region(0, 0, 300, 512),
        test=Region(308, 0, 512, 512),
        window=128,
    ),
    Texture(
        category="coins",
        file="coins.png",
        phrases=("ancient coins", "a row of ancient coins", "coins on a dark cloth"),
        train=Region(0, 0, 236, 303),
        test=Region(244, 0, 372, 303),  # the scan's white edge begins at column 374
        window=104,
    ),
    Texture(
        category="grass",
        file="grass.png",
        phrases=("a lawn", "grass seen from above", "a close-up of grass"),
        train=Region(0, 0, 300, 512),
        test=Region(308, 0, 512, 512),
        window=128,
    ),
    Texture(
        category="gravel",
        file="gravel.png",
        phrases=("gravel", "a layer of gravel", "small grey stones"),
        train=Region(0, 0, 300, 512),
        test=Region(308, 0, 512, 512),
        window=128,
    ),
    Texture(
        category="tissue",
        file="ihc.png",
        phrases=("a stained tissue section", "tissue under a microscope", "a tissue slide"),
        train=Region(212, 0, 512, 512),  # the right part alone has every kind of structure
        test=Region(0, 0, 204, 512),
        window=128,
    ),
)


def read_photograph(texture: Texture) -> NDArray[np.uint8]:
    """The texture's photograph as (height, width, 3), read from the installed scikit-image without a download.

    Raises HpcmmError when scikit-image, or the file within it, is not there.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise HpcmmError(
            "The stand-in images are cut from photographs within scikit-image, which is not installed: "
            "install hpcmm[train], or set data.root to an MVTec-AD folder."
        )
    path = Path(spec.origin).parent / "data" / texture.file
    if not path.is_file():
        raise HpcmmError(f"scikit-image has no {path}, from which category {texture.category} is cut; reinstall it.")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
