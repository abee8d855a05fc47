"""Poisson blending: a piece set into an image so that its edge cannot be seen.

Inside the piece's shape the result has the gradients of the piece, and on the shape's rim the values of the image: it
solves Laplace(f) = Laplace(piece) with f = image on the rim. Source: P. Perez et al., "Poisson Image Editing", SIGGRAPH
2003, equations 3 and 7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import splu

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def blend(image: Floats, piece: Floats, shape: Mask) -> Floats:
    """``piece`` seen through ``shape``, in the colours that make it pass into ``image`` without an edge.

    image, piece: (height, width, channels); shape: (height, width), nowhere on the border of the image, or ValueError.
    The result may leave the range of 0 to 1. Outside ``shape`` it is ``image``.
    """
    if shape[0].any() or shape[-1].any() or shape[:, 0].any() or shape[:, -1].any():
        raise ValueError("the shape reaches the image's border, if it has no rim")
    rows, columns = np.nonzero(shape)
    if not len(rows):
        return image.copy()
    number = np.full(shape.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    right = np.zeros((len(rows), image.shape[2]))
    equations, unknowns, factors = [np.arange(len(rows))], [np.arange(len(rows))], [np.full(len(rows), 4.0)]
    for down, across in _NEIGHBOURS:
        at = rows + down, columns + across
        right += piece[rows, columns].astype(np.float64) - piece[at]
        inside = number[at] >= 0
        right[~inside] += image[at][~inside]
        equations.append(np.flatnonzero(inside))
        unknowns.append(number[at][inside])
        factors.append(np.full(int(inside.sum()), -1.0))
    matrix = csr_matrix(
        (np.concatenate(factors), (np.concatenate(equations), np.concatenate(unknowns))), shape=(len(rows), len(rows))
    )
    result = image.copy()
    result[rows, columns] = splu(matrix.tocsc()).solve(right)
    return result
