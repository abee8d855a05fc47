"""Real photographs that scikit-image's wheel bundles, each cut into one region to train on and one to be held out.

There are two collections, which share no photograph and no category: to train on the one and score on the other says
something about images of a kind that the model never saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import Standins


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

SCENES = (
    Texture(
        category="cat",
        file="chelsea.png",
        phrases=("a tabby cat", "a cat's face", "a close-up of a cat"),
        train=Region(60, 0, 252, 300),
        test=Region(260, 0, 420, 300),
        window=112,
    ),
    Texture(
        category="craters",
        file="moon.png",
        phrases=("the surface of the moon", "a landscape of craters", "grey lunar ground"),
        train=Region(0, 0, 300, 512),
        test=Region(308, 0, 512, 512),
        window=128,
    ),
    Texture(
        category="fundus",
        file="retina.jpg",
        phrases=("the back of an eye", "a retina with its vessels", "a fundus photograph"),
        train=Region(240, 240, 800, 1160),
        test=Region(808, 240, 1160, 1160),
        window=224,
    ),
    Texture(
        category="galaxies",
        file="hubble_deep_field.jpg",
        phrases=("a field of galaxies", "galaxies on a black sky", "a deep view into the sky"),
        train=Region(0, 0, 620, 872),
        test=Region(628, 0, 1000, 872),
        window=192,
    ),
    Texture(
        category="garage",
        file="motorcycle_left.png",
        phrases=("a garage", "a motorcycle in a garage", "the inside of a garage"),
        train=Region(0, 0, 440, 500),
        test=Region(448, 0, 741, 500),
        window=144,
    ),
    Texture(
        category="handwriting",
        file="text.png",
        phrases=("handwriting on paper", "handwritten formulas", "a handwritten page"),
        train=Region(0, 0, 280, 172),
        test=Region(288, 0, 448, 172),
        window=112,
    ),
    Texture(
        category="print",
        file="page.png",
        phrases=("printed text", "a printed page", "a paragraph of print"),
        train=Region(0, 28, 244, 146),
        test=Region(252, 28, 384, 146),
        window=96,
    ),
    Texture(
        category="tableware",
        file="coffee.png",
        phrases=("a cup on a table", "a coffee cup with its saucer", "tableware on wood"),
        train=Region(0, 0, 340, 400),
        test=Region(348, 0, 600, 400),
        window=144,
    ),
)

COLLECTIONS: Mapping[Standins, tuple[Texture, ...]] = MappingProxyType(
    {Standins.surfaces: TEXTURES, Standins.scenes: SCENES}
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
