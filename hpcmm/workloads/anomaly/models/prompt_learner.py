"""The prompt learner: an anomaly map to prompts that a language model reads like words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.workloads.anomaly.question_answering.grid import LEAST_SHARE, SIDE

CHANNELS = (16, 32, 64, 128, 256)
"""After each of the five convolutions, each of which is followed by a halving."""
_MAP_SIDE = SIDE * 2 ** len(CHANNELS)
"""The map's side at the first convolution, so that the halvings end in the grid that answers name."""
BASE_PROMPTS = 9

_GATE = (0.5, 20.0, 0.002, LEAST_SHARE, 30.0)
"""Where the gates begin, as answers are defined (hpcmm.workloads.anomaly.question_answering.grid): what a place of
the map must reach to count as damaged, and how sharply; what share of the image is noise; what share of the damage a
cell must hold, how sharply."""


class PromptLearner(nn.Module):
    """Anomaly maps (B, H, W), from 0 to 1, to prompts (B, 9 + 9, width): one a grid cell, and 9 that no image changes.

    A cell's prompt is, as its gate says, the embedding of the cell's name or of a word for what is intact, plus what
    five convolutions see there. So a language model that was never trained with images reads words from the start, and
    learns from few images to answer by them. The other 9 prompts begin as words too, and all of it is learnt further.
    Sources: Z. Gu et al., "AnomalyGPT", AAAI 2024 (convolutions over the map); B. Lester et al., "The Power of Scale
    for Parameter-Efficient Prompt Tuning", EMNLP 2021 (prompts that begin as words).
    """

    def __init__(self, cell_names: Tensor, intact: Tensor, base: Tensor) -> None:
        """Embeddings: of the cells' names (9, width), of a word for intact (width,), of BASE_PROMPTS words."""
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.to_words = nn.Conv2d(CHANNELS[-1], cell_names.shape[1], 1)
        for layer in (*self.convolutions, self.to_words):
            if isinstance(layer, nn.Conv2d):  # so that what they see grows with the map from the start
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.scale = nn.Parameter(0.1 * base.square().mean().sqrt().reshape(1))
        self.gate = nn.Parameter(torch.tensor(_GATE))
        self.cell_names = nn.Parameter(cell_names.clone())
        self.intact = nn.Parameter(intact.clone())
        self.base = nn.Parameter(base.clone())

    def forward(self, maps: Tensor) -> Tensor:
        resized = functional.adaptive_avg_pool2d(maps.unsqueeze(1), _MAP_SIDE).to(self.base.dtype)
        seen = self.to_words(self.convolutions(resized)).flatten(2).transpose(1, 2)
        gates = self._gates(resized).unsqueeze(2).to(self.base.dtype)
        prompts = gates * self.cell_names + (1 - gates) * self.intact + self.scale * seen
        return torch.cat([prompts, self.base.expand(len(maps), -1, -1)], dim=1)

    def _gates(self, resized: Tensor) -> Tensor:
        """Of maps (B, 1, side, side) how far an answer would name each cell (B, 9), from 0 to 1.

        Soft forms of what makes a mask of the map and names its cells, so that they have gradients.
        """
        threshold, sharpness, noise, least_share, steepness = self.gate.float()
        damaged = functional.adaptive_avg_pool2d(
            torch.sigmoid(sharpness * (resized.float() - threshold)), SIDE
        ).flatten(1)
        # Training may take the noise below 0, if the sum would pass through 0.
        shares = damaged / (damaged.sum(dim=1, keepdim=True) + SIDE * SIDE * noise.abs())
        return torch.sigmoid(steepness * (shares - least_share))
