"""What a rule says of an anomaly map: whether something is wrong, and where in the 3 x 3 grid.

It speaks where a run has no language model, and in tables of many images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES, defect_cells


def rule_answer(values: NDArray[np.float32], score: float, threshold: float) -> str:
    """A sentence on the map (side, side) of an image with this score.

    The image is called anomalous when its score reaches the threshold; the place is that of the pixels that reach it.
    """
    if score < threshold:
        return f"No, nothing looks anomalous: the score {score:.2f} is below the threshold {threshold:.2f}."
    places = [CELL_NAMES[cell] for cell in defect_cells(values >= threshold)]
    where = f", {_listed(places)}" if places else ""
    return f"Yes, there is an anomaly{where}: the score {score:.2f} reaches the threshold {threshold:.2f}."


def _listed(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
