"""Simulated anomalies: their mask says exactly where the image changed."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from hpcmm.workloads.anomaly.data import defects, simulate
from hpcmm.workloads.anomaly.data.simulate import perlin_noise, simulate_anomaly
from hpcmm.workloads.anomaly.schema import AnomalyKind


def texture(seed: int, side: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 0.8, size=(side, side, 3)).astype(np.float32)


def smooth(seed: int, side: int = 96) -> np.ndarray:
    """A texture of coarser grain."""
    coarse = np.random.default_rng(seed).uniform(0.1, 0.9, size=(side // 8, side // 8, 3)).astype(np.float32)
    return np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)


@pytest.mark.parametrize("seed", range(60))
def test_a_visible_change_under_the_mask_and_little_beyond_its_edge(seed: int):
    image, donor = texture(1), texture(2)
    changed, mask = simulate_anomaly(image, donor, np.random.default_rng(seed))
    assert changed.shape == image.shape
    assert changed.dtype == mask.dtype == np.float32
    assert 0 <= changed.min() <= changed.max() <= 1
    assert set(np.unique(mask)) <= {0.0, 1.0}
    if not mask.any():
        np.testing.assert_array_equal(changed, image)
        return
    change = np.abs(changed - image).mean(axis=2)
    assert change[mask > 0].mean() >= 0.1
    rows, columns = np.nonzero(mask)
    far = np.ones(mask.shape, bool)
    reach = 5  # the softest edge
    far[
        max(rows.min() - reach, 0) : rows.max() + reach + 1, max(columns.min() - reach, 0) : columns.max() + reach + 1
    ] = 0
    assert not change[far].any()


def test_nearly_all_tries_give_an_anomaly():
    image, donor = texture(1), texture(2)
    masks = [simulate_anomaly(image, donor, np.random.default_rng(seed))[1] for seed in range(200)]
    assert np.mean([mask.any() for mask in masks]) > 0.95


def test_the_same_seed_gives_the_same_anomaly():
    first, second = (simulate_anomaly(texture(1), texture(2), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_the_image_given_is_not_written_to():
    image = texture(1)
    simulate_anomaly(image, texture(2), np.random.default_rng(0))
    np.testing.assert_array_equal(image, texture(1))


def test_perlin_noise_is_zero_on_its_lattice_and_smooth():
    noise = perlin_noise(512, 4, np.random.default_rng(0))
    assert np.abs(noise[::128, ::128]).max() < 0.02
    assert 0.3 < np.abs(noise).max() < 0.75
    assert np.abs(np.diff(noise, axis=0)).max() < 0.05


def test_flat_images_that_nothing_can_change_come_back_with_an_empty_mask():
    black = np.zeros((32, 32, 3), np.float32)
    generator = np.random.default_rng(0)
    for _ in range(50):
        changed, mask = simulate_anomaly(black, black, generator)
        assert mask.any() == (np.abs(changed - black).max() > 0)


def test_defects_held_out_and_anomalies_trained_on_share_no_code():
    allowed = {defects: set(), simulate: {"hpcmm.workloads.anomaly.schema", "hpcmm.workloads.anomaly.data.cut_paste"}}
    for module, ours in allowed.items():
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert {name for name in imported if name and name.startswith("hpcmm")} == ours


@pytest.mark.parametrize("kind", AnomalyKind)
def test_each_kind_alone_gives_anomalies(kind: AnomalyKind):
    results = [simulate_anomaly(texture(1), smooth(2), np.random.default_rng(seed), [kind]) for seed in range(30)]
    assert np.mean([mask.any() for _, mask in results]) > 0.9


def test_the_kinds_differ():
    """Rectangles reach from one straight edge to the other; Perlin areas do not; pasted pieces keep the rim's
    colours."""

    def filled(kind: AnomalyKind) -> float:
        shares = []
        for seed in range(40):
            _, mask = simulate_anomaly(texture(1), smooth(2), np.random.default_rng(seed), [kind])
            rows, columns = np.nonzero(mask)
            if len(rows) > 20:
                shares.append(len(rows) / np.prod([np.ptp(rows) + 1, np.ptp(columns) + 1]))
        return float(np.median(shares))

    assert filled(AnomalyKind.rectangle) > filled(AnomalyKind.perlin) + 0.05


def test_perlin_noise_has_the_statistics_of_gradient_noise():
    """Mean 0; zero on the lattice; correlated within a cell and not beyond the next; as strong along either axis."""
    cells, pixels = 8, 16
    fields = np.stack([perlin_noise(cells * pixels, cells, np.random.default_rng(seed)) for seed in range(200)])
    assert abs(fields.mean()) < 0.01
    assert fields.std() == pytest.approx(0.25, abs=0.06)
    assert np.abs(fields[:, ::pixels, ::pixels]).max() < 0.1  # half a pixel off the lattice

    def correlation(down: int, right: int) -> float:
        height, width = fields.shape[1] - down, fields.shape[2] - right
        pairs = fields[:, :height, :width] * fields[:, down:, right:]
        return float(pairs.mean() / fields.var())

    assert correlation(2, 0) == pytest.approx(correlation(0, 2), abs=0.02)
    assert correlation(2, 0) > 0.8
    assert abs(correlation(0, 2 * pixels)) < 0.05  # two cells away share no gradient
    assert abs(correlation(2 * pixels, 0)) < 0.05
