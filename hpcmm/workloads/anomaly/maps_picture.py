"""A picture of what each model marks: an image a row, its true mask, and one heat map a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hpcmm.files import write_whole
from hpcmm.workloads.anomaly.pixels import CHANNEL_MEAN, CHANNEL_STD
from hpcmm.workloads.anomaly.scoring import ImageScores

_CELL, _GAP, _HEADER, _LABEL = 128, 4, 18, 96
_HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)
"""Dark to bright, even to the eye and to the colour-blind, at equal steps of the score."""


def chosen(scored: ImageScores) -> list[int]:
    """An abnormal image of each category, by category: that whose defect is of middle size; a normal one for none."""
    size = scored.mask.sum(axis=(1, 2))
    found = []
    for category in sorted(set(scored.category)):
        own = np.flatnonzero(scored.category == category)
        abnormal = own[scored.label[own] == 1]
        by_size = abnormal[np.argsort(size[abnormal], kind="stable")] if len(abnormal) else own
        found.append(int(by_size[len(by_size) // 2]))
    return found


def draw(path: Path, images: Mapping[int, NDArray[np.float32]], results: Sequence[tuple[str, ImageScores]]) -> None:
    """Write a PNG. ``images`` are normalised (3, side, side) by their index in each of ``results``."""
    columns = ["image", "defect", *(name for name, _ in results)]
    width = _LABEL + len(columns) * (_CELL + _GAP)
    canvas = Image.new("RGB", (width, _HEADER + len(images) * (_CELL + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for place, name in enumerate(columns):
        pen.text((_LABEL + place * (_CELL + _GAP), 3), name[:20], fill="black")
    for row, (index, image) in enumerate(images.items()):
        top = _HEADER + row * (_CELL + _GAP)
        first = results[0][1]
        pen.text((2, top + _CELL // 2), str(first.category[index])[:14], fill="black")
        pixels = np.clip(image.transpose(1, 2, 0) * CHANNEL_STD + CHANNEL_MEAN, 0, 1)
        cells = [pixels, first.mask[index].astype(np.float32)[..., None].repeat(3, axis=2)]
        cells += [heat(scored.map[index]) for _, scored in results]
        for place, cell in enumerate(cells):
            picture = Image.fromarray(np.round(cell * 255).astype(np.uint8)).resize((_CELL, _CELL))
            canvas.paste(picture, (_LABEL + place * (_CELL + _GAP), top))
    write_whole(path, lambda file: canvas.save(file, format="PNG"))


def heat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores (h, w) from 0 to 1 as colours (h, w, 3) from 0 to 1."""
    place = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(np.intp), len(_HEAT) - 2)
    share = (place - low)[..., None]
    return np.asarray((_HEAT[low] * (1 - share) + _HEAT[low + 1] * share) / 255, np.float32)
