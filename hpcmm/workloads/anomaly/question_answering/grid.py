"""The 3 x 3 grid in which an answer names a place: from a mask to the cells that hold the defect."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 3
CELL_NAMES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""In reading order: cell ``3 * row + column``."""
LEAST_SHARE = 0.25
"""Share of the mask that a cell must hold to be named, so that an answer names four cells at most."""


def cell_shares(mask: NDArray[Any]) -> NDArray[np.float64]:
    """The share of a mask's pixels (height, width) that lies in each of the 9 cells; zeros for an empty mask.

    Pixel row r of h is in grid row ``floor(3 r / h)``, and columns alike.
    """
    rows, columns = np.nonzero(mask > 0.5)
    height, width = mask.shape
    cells = SIDE * rows // height * SIDE + SIDE * columns // width
    counts = np.bincount(cells, minlength=SIDE * SIDE).astype(np.float64)
    return counts / max(1, len(rows))


def defect_cells(mask: NDArray[Any]) -> tuple[int, ...]:
    """The cells that hold at least LEAST_SHARE of the mask each, in reading order.

    Where none does, the fullest one, the first of equals; none at all for an empty mask.
    """
    shares = cell_shares(mask)
    if not shares.any():
        return ()
    named = np.flatnonzero(shares >= LEAST_SHARE)
    return tuple(int(cell) for cell in named) if len(named) else (int(shares.argmax()),)
