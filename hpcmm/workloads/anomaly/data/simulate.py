"""Simulated anomalies on normal training images: a random shape, filled with something that does not belong there.

Three kinds, of which ``data.anomaly_kinds`` chooses. ``perlin``: noise above a level, and the band where it changes its
sign. ``rectangle``: rotated rectangles and thin strips. Both have hard or soft edges, and are filled with another
training image, the image's own structure enlarged, one colour, or a coarse copy; the idea is DRAEM's (V. Zavrtanik et
al., ICCV 2021). ``cut_paste``: pieces of another image, blended in (:mod:`hpcmm.workloads.anomaly.data.cut_paste`). The
held-out defects of the stand-ins are drawn by :mod:`hpcmm.workloads.anomaly.data.defects`, which shares nothing with
this module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hpcmm.workloads.anomaly.data.cut_paste import cut_paste
from hpcmm.workloads.anomaly.schema import AnomalyKind

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_LEAST_CHANGE = 0.1
"""Mean absolute change under the mask below which an anomaly could hardly be seen, so it would be a false label."""
_TRIES = 6


def simulate_anomaly(
    image: Floats, donor: Floats, rng: np.random.Generator, kinds: Sequence[AnomalyKind] = tuple(AnomalyKind)
) -> tuple[Floats, Floats]:
    """Put an anomaly of one of the ``kinds`` on ``image``; ``donor`` is another normal image. Both (side, side, 3), 0
    to 1.

    Gives the changed image and its mask (side, side) of zeros and ones. The mask is empty, and the image unchanged, in
    the rare case that no try makes a visible change.
    """
    for _ in range(_TRIES):
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind is AnomalyKind.cut_paste:
            changed, shape = cut_paste(image, donor, rng)
        else:
            changed, shape = _filled_shape(image, donor, kind, rng)
        if shape.any() and np.abs(changed - image)[shape].mean() >= _LEAST_CHANGE:
            return changed, shape.astype(np.float32)
    return image, np.zeros(image.shape[:2], np.float32)


def _filled_shape(image: Floats, donor: Floats, kind: AnomalyKind, rng: np.random.Generator) -> tuple[Floats, Mask]:
    """The image with a shape of the kind filled, and the shape, which may be empty."""
    thin = rng.random() < 0.4
    shape = _SHAPES[kind, thin](image.shape[0], rng)
    if not shape.any():
        return image, shape
    fill = _tone(image, shape, rng) if thin else _draw_fill(image, donor, shape, rng)
    softness = int(rng.choice((0, 1) if thin else (0, 1, 2, 4)))
    opacity = rng.uniform(0.6, 1.0) * _soften(shape, softness)
    return np.clip(image + opacity[..., None] * (fill - image), 0, 1).astype(np.float32), shape


def perlin_noise(side: int, cells: int, rng: np.random.Generator) -> Floats:
    """Gradient noise of (side, side), about -0.7 to 0.7, with ``cells`` lattice cells along each axis.

    Source: K. Perlin, "Improving Noise", SIGGRAPH 2002 (its fade curve 6t^5 - 15t^4 + 10t^3).
    """
    angle = rng.uniform(0, 2 * np.pi, size=(cells + 1, cells + 1)).astype(np.float32)
    position = (np.arange(side, dtype=np.float32) + 0.5) * cells / side
    cell = position.astype(np.intp)
    offset = position - cell
    fade = offset**3 * (offset * (offset * 6 - 15) + 10)

    def corner(down: int, right: int) -> Floats:
        gradient = angle[np.ix_(cell + down, cell + right)]
        product = np.cos(gradient) * (offset - right)[None, :] + np.sin(gradient) * (offset - down)[:, None]
        return np.asarray(product, np.float32)

    upper = corner(0, 0) + fade[None, :] * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + fade[None, :] * (corner(1, 1) - corner(1, 0))
    return np.asarray(upper + fade[:, None] * (lower - upper), np.float32)


def _soften(shape: Mask, radius: int) -> Floats:
    """The shape as an opacity whose edge falls off over about twice ``radius`` pixels."""
    picture = Image.fromarray(shape.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(radius))
    opacity = np.asarray(picture, np.float32)
    return np.asarray(opacity / max(1.0, float(opacity.max())), np.float32)


def _perlin_crack(side: int, rng: np.random.Generator) -> Mask:
    """The thin, winding band where the noise changes its sign, within a random box."""
    noise = perlin_noise(side, int(rng.integers(2, 5)), rng)
    down, right = np.gradient(noise)
    width = side * rng.uniform(0.008, 0.02)
    band = np.abs(noise) < width * np.hypot(down, right)
    return np.asarray(band & _rectangle(side, rng.uniform(0.25, 0.7, size=2), rng))


def _perlin_area(side: int, rng: np.random.Generator) -> Mask:
    """The noise's highest places within a random box, so that large and small areas occur alike."""
    noise = perlin_noise(side, int(2 ** rng.integers(1, 4)), rng)
    box = _rectangle(side, rng.uniform(0.2, 0.7, size=2), rng)
    level = np.quantile(noise[box], rng.uniform(0.3, 0.8)) if box.any() else np.inf
    return np.asarray(box & (noise > level))


def _rectangle(side: int, extent: NDArray[np.float64], rng: np.random.Generator) -> Mask:
    """A rectangle of ``extent`` (length, width, as shares of the side), anywhere, turned by any angle."""
    angle = rng.uniform(0, np.pi)
    x0, y0 = rng.uniform(0.1, 0.9, size=2) * side
    axis = np.arange(side, dtype=np.float32)
    x, y = axis[None, :] - x0, axis[:, None] - y0
    along = np.abs(x * np.cos(angle) + y * np.sin(angle))
    across = np.abs(y * np.cos(angle) - x * np.sin(angle))
    return np.asarray((along <= extent[0] * side / 2) & (across <= extent[1] * side / 2))


def _strip(side: int, rng: np.random.Generator) -> Mask:
    return _rectangle(side, np.array([rng.uniform(0.2, 0.7), rng.uniform(0.015, 0.05)]), rng)


def _wide_rectangle(side: int, rng: np.random.Generator) -> Mask:
    return _rectangle(side, rng.uniform(0.06, 0.3, size=2), rng)


_SHAPES = {
    (AnomalyKind.perlin, True): _perlin_crack,
    (AnomalyKind.perlin, False): _perlin_area,
    (AnomalyKind.rectangle, True): _strip,
    (AnomalyKind.rectangle, False): _wide_rectangle,
}
"""By kind, and whether it is thin."""


def _draw_fill(image: Floats, donor: Floats, shape: Mask, rng: np.random.Generator) -> Floats:
    kind = rng.choice(("tone", "tone", "donor", "coarse", "coarse", "zoom"))
    if kind == "tone":
        return _tone(image, shape, rng)
    if kind == "donor":
        gain = rng.uniform(0.6, 1.4, size=3) if rng.random() < 0.5 else rng.uniform(0.6, 1.4)
        return np.asarray(np.rot90(donor, int(rng.integers(4))) * gain, np.float32)
    if kind == "zoom":
        return _zoom(image, rng)
    return _coarse(image, max(2, int(image.shape[0] * rng.uniform(0.05, 0.13))))


def _tone(image: Floats, shape: Mask, rng: np.random.Generator) -> Floats:
    """One colour, well off the mean of what it covers, through which a little of the image shows."""
    mean = image[shape].mean(axis=0)
    shift = rng.uniform(0.2, 0.7) * rng.choice((-1.0, 1.0))
    tint = rng.uniform(-0.25, 0.25, size=3) if rng.random() < 0.5 else np.zeros(3)
    return np.asarray(mean + shift + tint + rng.uniform(0, 0.4) * (image - mean), np.float32)


def _zoom(image: Floats, rng: np.random.Generator) -> Floats:
    """The image's own structure, two or three times as large, from anywhere."""
    side, factor = image.shape[0], int(rng.integers(2, 4))
    top, left = rng.integers(0, side - side // factor, size=2)
    rows, columns = (np.arange(side) // factor + start for start in (top, left))
    return image[np.ix_(np.minimum(rows, side - 1), np.minimum(columns, side - 1))]


def _coarse(image: Floats, block: int) -> Floats:
    """Means over blocks of ``block`` pixels, interpolated linearly between the blocks' centres."""
    side = image.shape[0]
    edges = np.arange(0, side, block)
    counts = np.diff(np.append(edges, side)).astype(np.float32)
    sums = np.add.reduceat(np.add.reduceat(image, edges, axis=0), edges, axis=1)
    means = sums / (counts[:, None] * counts[None, :])[..., None]
    position = np.clip((np.arange(side) + 0.5) / block - 0.5, 0, len(edges) - 1)
    low = position.astype(np.intp)
    high = np.minimum(low + 1, len(edges) - 1)
    weight = (position - low).astype(np.float32)
    rows = means[low] + weight[:, None, None] * (means[high] - means[low])
    return np.asarray(rows[:, low] + weight[None, :, None] * (rows[:, high] - rows[:, low]), np.float32)
