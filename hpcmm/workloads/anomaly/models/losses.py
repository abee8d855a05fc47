"""Losses: focal and dice loss on the anomaly map, from logits (B, 2, H, W) and masks (B, 1, H, W); the words' loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.workloads.anomaly.schema import AnomalyTrainConfig

_DICE_SMOOTHING = 1.0


def focal_loss(logits: Tensor, mask: Tensor, gamma: float, alpha: float) -> Tensor:
    """Mean over pixels of -alpha_t (1 - p_t)^gamma log(p_t), a scalar; p_t is the true class's probability.

    ``alpha_t`` is alpha for abnormal pixels and 1 - alpha for normal ones.
    Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5.
    """
    abnormal = mask[:, 0]
    log_p = functional.log_softmax(logits, dim=1)
    log_p_true = torch.where(abnormal > 0.5, log_p[:, 1], log_p[:, 0])
    alpha_true = alpha * abnormal + (1 - alpha) * (1 - abnormal)
    return (-alpha_true * (1 - log_p_true.exp()) ** gamma * log_p_true).mean()


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - (2 sum(p g) + 1) / (sum(p^2) + sum(g^2) + 1), a scalar; p is the probability of abnormal and g the mask.

    The sums go over the whole batch, since a normal image has nothing to overlap with; the ones keep it defined.
    Source: F. Milletari et al., "V-Net", 3DV 2016, section 3.
    """
    p, g = torch.softmax(logits, dim=1)[:, 1], mask[:, 0]
    overlap = 2 * (p * g).sum() + _DICE_SMOOTHING
    return 1 - overlap / (p.square().sum() + g.square().sum() + _DICE_SMOOTHING)


class LossLearner(nn.Module):
    """The weighted sum of focal loss, dice loss and, with a language model, the words' loss; and its parts."""

    def __init__(self, config: AnomalyTrainConfig) -> None:
        super().__init__()
        self._gamma = config.focal_gamma
        self._alpha = config.focal_alpha
        self._focal_weight = config.focal_weight
        self._dice_weight = config.dice_weight
        self._text_weight = config.text_weight

    def forward(self, logits: Tensor, mask: Tensor, text: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, 2, H, W) and mask (B, 1, H, W) to the total and the parts ``focal`` and ``dice``, all scalars.

        ``text`` is the mean cross-entropy of the answers' tokens, a scalar, and the part of that name. The parts come
        without their weights.
        """
        mask = mask.to(logits.dtype)
        parts = {"focal": focal_loss(logits, mask, self._gamma, self._alpha), "dice": dice_loss(logits, mask)}
        total = self._focal_weight * parts["focal"] + self._dice_weight * parts["dice"]
        if text is not None:
            parts["text"] = text
            total = total + self._text_weight * text
        return total, {name: part.detach() for name, part in parts.items()}
