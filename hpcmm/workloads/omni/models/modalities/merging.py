"""Neighbouring features to one token, so that a large thing takes fewer places in the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged_squares(features: Tensor, grids: Sequence[tuple[int, int]], merge: int) -> Tensor:
    """Features of grids, row by row, (sum of h w, C) to one row a square of merge x merge: (sum / merge^2, merge^2 C).

    The sides of each grid (h, w) are multiples of ``merge``.
    """
    if merge == 1:
        return features
    parts = []
    for (height, width), own in zip(
        grids, torch.split(features, [height * width for height, width in grids]), strict=True
    ):
        squares = own.reshape(height // merge, merge, width // merge, merge, -1).permute(0, 2, 1, 3, 4)
        parts.append(squares.reshape(height * width // merge**2, -1))
    return torch.cat(parts)


def merged_runs(features: Tensor, merge: int) -> Tensor:
    """Features of sounds, one after another, (T, C) to one row a run of ``merge``: (T / merge, merge C)."""
    return features.reshape(len(features) // merge, -1)
