"""Image files as pixels of their native resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcmm.workloads.anomaly.data.images import open_image


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image as (height, width, 3). Raises HpcmmError as :func:`open_image` does."""
    with open_image(path) as image:
        return np.array(image.convert("RGB"))
