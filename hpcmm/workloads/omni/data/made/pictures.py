"""Pictures of known content, each in a size of its own: crops of photographs, and drawn shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hpcmm.workloads.anomaly.data.textures import COLLECTIONS, Region, Texture, read_photograph

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (205, 40, 40),
        "green": (40, 150, 60),
        "blue": (45, 75, 205),
        "yellow": (235, 215, 50),
        "black": (20, 20, 20),
        "white": (245, 245, 245),
        "orange": (240, 135, 30),
        "purple": (140, 50, 165),
    }
)
SURFACES: Mapping[str, Texture] = MappingProxyType(
    {texture.category: texture for collection in COLLECTIONS.values() for texture in collection}
)
COUNTS = ("one", "two", "three", "four", "five", "six")
"""How many shapes a picture can have, in words."""

_SIDE, _SPREAD = 64, 0.3
"""Median of a picture's sides in pixels, and the standard deviation of their logarithm."""
_SHORTEST, _LONGEST = 32, 144
_FINER = 3
"""Shapes are drawn this many times as large, and made smaller, for smooth edges."""


_FILLED = 0.9
"""Share of its cell's side that a shape keeps to, so that no two touch."""


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = np.exp(rng.normal(math.log(_SIDE), _SPREAD, 2)).clip(_SHORTEST, _LONGEST).round()
    return int(width), int(height)


class Photographs:
    """Crops of scikit-image's photographs; those of the held-out part share no pixel with the others."""

    def __init__(self) -> None:
        self._read: dict[str, Image.Image] = {}

    def crop(self, surface: str, rng: np.random.Generator, *, held_out: bool) -> Image.Image:
        """A window on the photograph of ``surface`` that is moved, scaled, mirrored at times, and in other light."""
        texture = SURFACES[surface]
        if surface not in self._read:
            self._read[surface] = Image.fromarray(read_photograph(texture))
        size = np.array(draw_size(rng))
        box = _window(texture.test if held_out else texture.train, size * _scale(texture, size, rng), rng)
        picture = self._read[surface].resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(picture, np.float32) / 255
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return _picture((pixels - 0.5) * rng.uniform(0.85, 1.15) + 0.5 + rng.uniform(-0.06, 0.06))


def _scale(texture: Texture, size: NDArray[np.int64], rng: np.random.Generator) -> float:
    """Pixels of the photograph to one of the picture, whose longer side then spans most of a window."""
    return float(texture.window * rng.uniform(0.7, 1) / size.max())


def _window(region: Region, sides: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a window with these sides within ``region``."""
    left = rng.uniform(region.left, region.right - sides[0])
    top = rng.uniform(region.top, region.bottom - sides[1])
    return left, top, left + sides[0], top + sides[1]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Like shapes of one colour on a grey ground."""

    shape: str
    colour: str
    count: int


def draw(drawing: Drawing, rng: np.random.Generator) -> Image.Image:
    """The drawing in a size of its own; the shapes' places, sizes and angles are drawn at random."""
    width, height = draw_size(rng)
    ground = rng.uniform(90, 175) + rng.uniform(-8, 8, 3)
    large = (width * _FINER, height * _FINER)
    picture = Image.new("RGB", large, _colour(ground))
    pen = ImageDraw.Draw(picture)
    colour = np.array(COLOURS[drawing.colour]) + rng.uniform(-15, 15, 3)
    columns, rows = _grid(drawing.count, width, height)
    cell = min(large[0] / columns, large[1] / rows)
    for place in rng.permutation(columns * rows)[: drawing.count]:
        row, column = divmod(int(place), columns)
        radius = cell * rng.uniform(0.28, 0.42)
        centre = (np.array([column, row]) + 0.5) * (large[0] / columns, large[1] / rows)
        centre += rng.uniform(-1, 1, 2) * (cell * _FILLED / 2 - radius)
        SHAPES[drawing.shape](pen, centre, radius, rng.uniform(-0.25, 0.25), _colour(colour))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    return _picture(pixels + rng.normal(0, 0.03, pixels.shape))


def _grid(count: int, width: int, height: int) -> tuple[int, int]:
    """Columns and rows of cells, at least ``count``, which are about square."""
    columns = max(1, round(math.sqrt(count * width / height)))
    return columns, math.ceil(count / columns)


Pen = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def _corners(centre: NDArray[np.float64], points: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return [(float(x), float(y)) for x, y in np.array(points) @ turn.T + centre]


def _circle(pen: Pen, centre: NDArray[np.float64], radius: float, angle: float, colour: Colour) -> None:  # noqa: ARG001
    pen.ellipse([*(centre - radius), *(centre + radius)], fill=colour)


def _ring(pen: Pen, centre: NDArray[np.float64], radius: float, angle: float, colour: Colour) -> None:  # noqa: ARG001
    pen.ellipse([*(centre - radius), *(centre + radius)], outline=colour, width=max(1, round(radius * 0.4)))


def _square(pen: Pen, centre: NDArray[np.float64], radius: float, angle: float, colour: Colour) -> None:
    half = radius * 0.85
    pen.polygon(_corners(centre, [(-half, -half), (half, -half), (half, half), (-half, half)], angle), fill=colour)


def _triangle(pen: Pen, centre: NDArray[np.float64], radius: float, angle: float, colour: Colour) -> None:
    pen.polygon(_corners(centre, [(0, -radius), (radius, radius * 0.8), (-radius, radius * 0.8)], angle), fill=colour)


def _cross(pen: Pen, centre: NDArray[np.float64], radius: float, angle: float, colour: Colour) -> None:
    half = radius * 0.28
    for x, y in ((radius, half), (half, radius)):
        pen.polygon(_corners(centre, [(-x, -y), (x, -y), (x, y), (-x, y)], angle), fill=colour)


SHAPES: Mapping[str, Callable[[Pen, NDArray[np.float64], float, float, Colour], None]] = MappingProxyType(
    {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}
)


def _colour(values: NDArray[np.float64]) -> Colour:
    red, green, blue = values.clip(0, 255).round()
    return int(red), int(green), int(blue)


def _picture(pixels: NDArray[np.floating]) -> Image.Image:
    """(height, width, 3) from 0 to 1, cut off there."""
    return Image.fromarray(np.round(pixels.clip(0, 1) * 255).astype(np.uint8))
