"""The prompt learner: an anomaly map to prompts that a language model reads like words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.words.grid import SIDE

CHANNELS = (16, 32, 64, 128, 256)
"""After each of the five convolutions, each of which is followed by a halving."""
_MAP_SIDE = SIDE * 2 ** len(CHANNELS)
"""The map's side at the first convolution, so that the halvings end in the grid that answers name."""
BASE_PROMPTS = 9


class PromptLearner(nn.Module):
    """Anomaly maps (B, H, W), from 0 to 1, to prompts (B, 9 + 9, width): one a grid cell, and 9 that no image changes.

    A cell's prompt is the embedding of its name plus what five convolutions see there, both about as long as a word's
    embedding; the other 9 begin as embeddings of words. A language model that was never trained with images can copy
    such a name into its answer, and so learns from few images.
    Sources: Z. Gu et al., "AnomalyGPT", AAAI 2024 (convolutions over the map); B. Lester et al., "The Power of Scale
    for Parameter-Efficient Prompt Tuning", EMNLP 2021 (prompts that begin as words).
    """

    def __init__(self, cell_names: Tensor, base: Tensor) -> None:
        """``cell_names``: the embeddings of the cells' names (9, width); ``base``: of BASE_PROMPTS words."""
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        width = cell_names.shape[1]
        self.to_words = nn.Conv2d(CHANNELS[-1], width, 1)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(base.square().mean().sqrt().reshape(1).clone())
        self.cell_names = nn.Parameter(cell_names.clone())
        self.base = nn.Parameter(base.clone())

    def forward(self, maps: Tensor) -> Tensor:
        resized = functional.adaptive_avg_pool2d(maps.unsqueeze(1), _MAP_SIDE)
        seen = self.to_words(self.convolutions(resized.to(self.base.dtype))).flatten(2).transpose(1, 2)
        prompts = self.cell_names + self.scale * self.norm(seen)
        return torch.cat([prompts, self.base.expand(len(maps), -1, -1)], dim=1)
