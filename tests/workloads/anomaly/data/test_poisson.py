"""Poisson blending: the solution is that of the equation, solved by brute force, and no edge shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.workloads.anomaly.data.cut_paste import cut_paste
from hpcmm.workloads.anomaly.data.poisson import blend

SIDE = 12


def random_image(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, size=(side, side, 3)).astype(np.float32)


def relaxed(image: np.ndarray, piece: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The same equation by Gauss and Seidel, pixel by pixel, until nothing moves."""
    result = image.astype(np.float64)
    places = list(zip(*np.nonzero(shape), strict=True))
    for _ in range(4000):
        moved = 0.0
        for y, x in places:
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            new = sum(result[at] + piece[y, x].astype(np.float64) - piece[at] for at in around) / 4
            moved = max(moved, float(np.abs(new - result[y, x]).max()))
            result[y, x] = new
        if moved < 1e-9:
            break
    return result


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.05, 0.95))
def test_the_blend_solves_poissons_equation(seed: int, density: float):
    inner = np.random.default_rng(seed).random((SIDE - 2, SIDE - 2)) < density
    shape = np.pad(inner, 1)
    image, piece = random_image(seed + 1), random_image(seed + 2)
    np.testing.assert_allclose(blend(image, piece, shape), relaxed(image, piece, shape), atol=1e-5)


def test_outside_the_shape_nothing_changes():
    image, piece = random_image(1), random_image(2)
    shape = np.zeros((SIDE, SIDE), bool)
    np.testing.assert_array_equal(blend(image, piece, shape), image)
    shape[3:8, 4:9] = True
    np.testing.assert_array_equal(blend(image, piece, shape)[~shape], image[~shape])


@pytest.mark.parametrize("shift", [-0.3, 0.4])
def test_a_piece_of_other_brightness_comes_in_without_an_edge(shift: float):
    image = np.full((SIDE, SIDE, 3), 0.5, np.float32)
    piece = image + np.float32(shift)
    shape = np.zeros((SIDE, SIDE), bool)
    shape[3:8, 4:9] = True
    np.testing.assert_allclose(blend(image, piece, shape), image, atol=1e-6)


def test_the_image_itself_blends_into_itself():
    image = random_image(3)
    shape = np.pad(np.ones((SIDE - 2, SIDE - 2), bool), 1)
    np.testing.assert_allclose(blend(image, image, shape), image, atol=1e-5)


def test_a_shape_on_the_border_has_no_rim():
    shape = np.zeros((SIDE, SIDE), bool)
    shape[0, 3] = True
    with pytest.raises(ValueError, match="border"):
        blend(random_image(1), random_image(2), shape)


def test_pasted_pieces_keep_away_from_the_border_and_change_nothing_beyond_them():
    image = np.full((64, 64, 3), 0.5, np.float32)
    donor = random_image(4, 64)
    sizes = []
    for seed in range(100):
        changed, mask = cut_paste(image, donor, np.random.default_rng(seed))
        assert changed.dtype == np.float32
        assert 0 <= changed.min() <= changed.max() <= 1
        assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()
        moved = np.abs(changed - image).mean(axis=2)
        assert (moved[mask] >= 0.05).all()
        sizes.append(np.count_nonzero(moved) / mask.size)
    assert 0.01 < np.median(sizes) < 0.1  # a gamma distribution's many small and few large ones
    assert max(sizes) > 3 * np.median(sizes)
