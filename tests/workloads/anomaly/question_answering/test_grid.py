"""Which cells of the 3 x 3 grid a mask's defect is said to be in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES, LEAST_SHARE, cell_shares, defect_cells

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@pytest.mark.parametrize("cell", range(9))
def test_a_speck_in_a_cell_is_in_that_cell(cell: int):
    mask = np.zeros((96, 96), bool)
    row, column = divmod(cell, 3)
    mask[row * 32 + 10 : row * 32 + 14, column * 32 + 10 : column * 32 + 14] = True
    assert defect_cells(mask) == (cell,)
    vertical, horizontal = ("top", "", "bottom")[row], ("left", "", "right")[column]
    assert CELL_NAMES[cell] == (f"{vertical} {horizontal}".strip() or "center")


@given(MASKS)
def test_shares_are_of_the_whole_mask(mask: np.ndarray):
    shares = cell_shares(mask)
    assert shares.shape == (9,)
    assert shares.sum() == pytest.approx(1.0 if mask.any() else 0.0)


@given(MASKS)
def test_named_cells_hold_enough_or_most(mask: np.ndarray):
    cells, shares = defect_cells(mask), cell_shares(mask)
    assert bool(cells) == bool(mask.any())
    assert len(cells) <= 4
    assert list(cells) == sorted(cells)
    if any(shares >= LEAST_SHARE):
        assert set(cells) == set(np.flatnonzero(shares >= LEAST_SHARE))
    elif cells:
        assert shares[cells[0]] == shares.max()
        assert len(cells) == 1


@given(MASKS, st.integers(1, 3))
def test_cells_do_not_depend_on_the_resolution(mask: np.ndarray, factor: int):
    larger = mask.repeat(3, axis=0).repeat(3, axis=1)  # so that no pixel lies across two cells
    assert defect_cells(larger.repeat(factor, axis=0).repeat(factor, axis=1)) == defect_cells(larger)


@given(MASKS)
def test_mirroring_mirrors_the_shares(mask: np.ndarray):
    whole = mask.repeat(3, axis=0).repeat(3, axis=1)
    shares = cell_shares(whole).reshape(3, 3)
    np.testing.assert_allclose(cell_shares(whole[:, ::-1]).reshape(3, 3), shares[:, ::-1])
    np.testing.assert_allclose(cell_shares(whole[::-1]).reshape(3, 3), shares[::-1])
    np.testing.assert_allclose(cell_shares(whole.T).reshape(3, 3), shares.T)
