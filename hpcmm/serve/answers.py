"""What a rule says of an anomaly map: whether something is wrong, and where in a grid of 3 x 3 cells.

It speaks where a run has no language model, and in tables of many images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_LEAST_SHARE = 0.2
"""Of all marked pixels, that a cell must hold to be named."""
_MOST_CELLS = 3


def rule_answer(values: NDArray[np.float32], score: float, threshold: float) -> str:
    """A sentence on the map (side, side) of an image with this score.

    The image is called anomalous when its score reaches the threshold; cells that hold at least a fifth of the pixels
    that reach it are named, at most three, the fullest first.
    """
    if score < threshold:
        return f"No, nothing looks anomalous: the score {score:.2f} is below the threshold {threshold:.2f}."
    places = cells(values, threshold)
    where = f" It is at the {_listed(places)}." if places else ""
    return f"Yes, there is an anomaly: the score {score:.2f} reaches the threshold {threshold:.2f}.{where}"


def cells(values: NDArray[np.float32], threshold: float) -> list[str]:
    """Names of the cells of a 3 x 3 grid that hold the pixels which reach the threshold; none where no pixel does."""
    marked = values >= threshold
    if not marked.any():
        return []
    counts = np.array([[part.sum() for part in np.array_split(row, 3, axis=1)] for row in np.array_split(marked, 3)])
    shares = (counts / counts.sum()).ravel()
    fullest = np.argsort(-shares, kind="stable")[:_MOST_CELLS]
    return [_name(*divmod(int(place), 3)) for place in fullest if shares[place] >= _LEAST_SHARE]


def _name(row: int, column: int) -> str:
    if (row, column) == (1, 1):
        return "centre"
    return f"{ROWS[row]} {COLUMNS[column]}"


def _listed(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
