"""Focal and dice loss against their formulas, written out pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.workloads.anomaly.models.losses import LossLearner, dice_loss, focal_loss
from hpcmm.workloads.anomaly.schema import AnomalyTrainConfig


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    batch, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = batch * height * width
    logits = draw(st.lists(st.floats(-12, 12), min_size=2 * count, max_size=2 * count))
    mask = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return (
        torch.tensor(logits, dtype=torch.float64).view(batch, 2, height, width),
        torch.tensor(mask, dtype=torch.float64).view(batch, 1, height, width),
    )


def pixels(logits: torch.Tensor, mask: torch.Tensor) -> list[tuple[float, int]]:
    """(probability of abnormal, truth) of each pixel."""
    normal, abnormal = logits[:, 0].flatten().tolist(), logits[:, 1].flatten().tolist()
    truth = mask.flatten().tolist()
    return [(1 / (1 + math.exp(n - a)), int(t)) for n, a, t in zip(normal, abnormal, truth, strict=True)]


@settings(deadline=None)
@given(predictions(), st.sampled_from([0.0, 0.5, 2.0, 5.0]), st.floats(0, 1))
def test_focal_loss_is_its_formula(prediction: tuple[torch.Tensor, torch.Tensor], gamma: float, alpha: float):
    expected = 0.0
    probabilities = pixels(*prediction)
    for p, truth in probabilities:
        p_true, alpha_true = (p, alpha) if truth else (1 - p, 1 - alpha)
        expected -= alpha_true * (1 - p_true) ** gamma * math.log(p_true)
    assert focal_loss(*prediction, gamma, alpha).item() == pytest.approx(
        expected / len(probabilities), rel=1e-6, abs=1e-9
    )


@settings(deadline=None)
@given(predictions())
def test_dice_loss_is_its_formula(prediction: tuple[torch.Tensor, torch.Tensor]):
    probabilities = pixels(*prediction)
    overlap = sum(p * truth for p, truth in probabilities)
    squares = sum(p * p + truth * truth for p, truth in probabilities)
    assert dice_loss(*prediction).item() == pytest.approx(1 - (2 * overlap + 1) / (squares + 1), rel=1e-9)


def test_without_focus_and_balance_the_focal_loss_is_half_the_cross_entropy():
    logits = torch.randn(2, 2, 5, 5)
    mask = (torch.rand(2, 1, 5, 5) > 0.7).float()
    expected = torch.nn.functional.cross_entropy(logits, mask[:, 0].long()) / 2
    torch.testing.assert_close(focal_loss(logits, mask, gamma=0.0, alpha=0.5), expected)


def test_a_perfect_map_costs_nothing_and_a_wrong_one_much():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 2:5] = 1
    right = torch.cat([1 - mask, mask], dim=1) * 40
    loss = LossLearner(AnomalyTrainConfig())
    assert loss(right, mask)[0].item() < 1e-6
    assert loss(-right, mask)[0].item() > 1


def test_a_batch_without_defects_has_finite_loss_and_gradients():
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    total, parts = LossLearner(AnomalyTrainConfig())(logits, torch.zeros(2, 1, 8, 8))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()
    assert 0 <= parts["dice"] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_the_total_is_the_weighted_sum_of_its_parts(dtype: torch.dtype):
    logits = torch.randn(2, 2, 6, 6)
    mask = torch.rand(2, 1, 6, 6) > 0.5
    total, parts = LossLearner(AnomalyTrainConfig(focal_weight=3.0, dice_weight=0.5, focal_gamma=1.0))(
        logits, mask.to(dtype)
    )
    torch.testing.assert_close(parts["focal"], focal_loss(logits, mask.float(), 1.0, 0.75))
    torch.testing.assert_close(parts["dice"], dice_loss(logits, mask.float()))
    torch.testing.assert_close(total, 3 * parts["focal"] + 0.5 * parts["dice"])


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), st.floats(0, 5))
def test_the_total_is_the_weighted_sum_with_the_words(focal: float, dice: float, text: float, entropy: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 4, 4, generator=generator)
    mask = (torch.rand(2, 1, 4, 4, generator=generator) > 0.7).float()
    config = AnomalyTrainConfig(focal_weight=focal, dice_weight=dice, text_weight=text)
    words = torch.tensor(entropy, requires_grad=True)
    total, parts = LossLearner(config)(logits, mask, words)
    expected_focal = focal_loss(logits, mask, config.focal_gamma, config.focal_alpha)
    expected = focal * expected_focal + dice * dice_loss(logits, mask) + text * entropy
    assert total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert set(parts) == {"focal", "dice", "text"}
    assert parts["text"].item() == pytest.approx(entropy)
    total.backward()
    assert words.grad.item() == pytest.approx(text)
