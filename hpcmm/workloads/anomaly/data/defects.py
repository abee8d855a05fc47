"""Realistic defects of the held-out stand-in images: scratch, hole, blur, contamination.

Training never sees these: its simulated anomalies come from :mod:`hpcmm.workloads.anomaly.data.simulate`, which shares
no code and no parameter with this module, so that a score on the held-out images says something about unseen defects.

Every function takes an image of (side, side, 3) with values from 0 to 1 and gives the damaged image and the defect's
opacity map (side, side), also from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float32]
Defect = Callable[[Floats, np.random.Generator], tuple[Floats, Floats]]

_SUPERSAMPLING = 4
_DIRT_COLOURS = ((0.42, 0.24, 0.10), (0.20, 0.28, 0.12), (0.93, 0.92, 0.88), (0.08, 0.07, 0.07))


def scratch(image: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A thin, bent line, bright on ground that is dark on the whole and else dark, with a shaded rim."""
    side = image.shape[0]
    angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.4, 0.8)
    direction = np.array([np.cos(angle), np.sin(angle)])
    middle = side * rng.uniform(0.35, 0.65, size=2)
    bend = np.array([-direction[1], direction[0]]) * length * rng.uniform(-0.3, 0.3)
    start, control, end = middle - direction * length / 2, middle + bend, middle + direction * length / 2
    t = np.linspace(0, 1, 48)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    canvas = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    width = max(2, round(side * rng.uniform(0.018, 0.04) * _SUPERSAMPLING))
    points = [(float(x), float(y)) for x, y in curve * _SUPERSAMPLING]
    ImageDraw.Draw(canvas).line(points, fill=255, width=width, joint="curve")
    opacity = _to_floats(canvas.resize((side, side), Image.Resampling.BOX))
    ground = (image.mean(axis=2) * opacity).sum() / opacity.sum()
    tone = rng.uniform(0.75, 1.0) if ground < 0.5 else rng.uniform(0.0, 0.2)
    rim = np.roll(opacity, (1, 1), axis=(0, 1))[..., None] * (1 - opacity[..., None])
    damaged = image * (1 - 0.35 * rim)
    strength = opacity[..., None] * rng.uniform(0.7, 0.95)
    return _clip(damaged * (1 - strength) + tone * strength), opacity


def hole(image: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A dark, irregular pit, darkest away from the light, with a lit edge."""
    side = image.shape[0]
    centre = side * rng.uniform(0.25, 0.75, size=2)
    radius = side * rng.uniform(0.06, 0.15)
    opacity = _blob(side, centre, radius, rng, softness=1.5)
    lit_edge = np.clip(np.roll(opacity, (-2, -2), axis=(0, 1)) - opacity, 0, 1)[..., None]
    rows = (np.arange(side, dtype=np.float32)[:, None, None] - centre[1]) / (2 * radius)
    depth = np.clip(0.1 + 0.12 * rows, 0.0, 0.25) + 0.1 * image
    alpha = opacity[..., None]
    return _clip(image * (1 - alpha) + depth * alpha + 0.25 * lit_edge), opacity


def blur(image: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A smeared patch without fine structure, put where the image has the most to lose among a few places."""
    side = image.shape[0]
    smooth = _to_floats(_to_image(image).filter(ImageFilter.GaussianBlur(side * rng.uniform(0.03, 0.05))))
    radius = side * rng.uniform(0.13, 0.22)
    places = [_blob(side, side * rng.uniform(0.25, 0.75, size=2), radius, rng, softness=3.0) for _ in range(5)]
    change = np.abs(smooth - image).mean(axis=2)
    opacity = max(places, key=lambda place: float((place * change).sum()))
    alpha = opacity[..., None]
    return _clip(image * (1 - alpha) + smooth * alpha), opacity


def contamination(image: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A group of specks of dirt in one colour, grainy and not fully opaque."""
    side = image.shape[0]
    centre = side * rng.uniform(0.3, 0.7, size=2)
    opacity = np.zeros((side, side), np.float32)
    for _ in range(int(rng.integers(3, 9))):
        place = centre + rng.normal(0, 0.09 * side, size=2)
        opacity = np.maximum(opacity, _blob(side, place, side * rng.uniform(0.025, 0.07), rng, softness=1.0))
    colour = np.array(_DIRT_COLOURS[int(rng.integers(len(_DIRT_COLOURS)))], np.float32)
    grain = rng.normal(0, 0.06, size=(side, side, 1)).astype(np.float32)
    strength = opacity[..., None] * rng.uniform(0.7, 0.95)
    return _clip(image * (1 - strength) + (colour + grain) * strength), opacity


DEFECTS: Mapping[str, Defect] = MappingProxyType(
    {"blur": blur, "contamination": contamination, "hole": hole, "scratch": scratch}
)


def _blob(side: int, centre: NDArray[np.float64], radius: float, rng: np.random.Generator, softness: float) -> Floats:
    """Opacity of a round shape whose radius wavers with the angle; its edge falls off over ``softness`` pixels."""
    rows, columns = np.mgrid[0:side, 0:side]
    x, y = columns - centre[0], rows - centre[1]
    angle = np.arctan2(y, x)
    outline = np.full_like(angle, radius)
    for wave in (2, 3, 5):
        outline += radius * rng.uniform(0.05, 0.2) / wave * 2 * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    inside = (outline - np.hypot(x, y)) / softness
    return np.asarray(np.clip(0.5 + inside, 0, 1), np.float32)


def _to_image(values: Floats) -> Image.Image:
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def _to_floats(image: Image.Image) -> Floats:
    return np.asarray(image, np.float32) / np.float32(255)


def _clip(values: NDArray[np.floating]) -> Floats:
    return np.asarray(np.clip(values, 0, 1), np.float32)
