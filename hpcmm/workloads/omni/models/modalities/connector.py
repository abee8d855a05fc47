"""From an encoder's features to the language model's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcmm.errors import HpcmmError


class Connector(nn.Module):
    """Features (n, inputs) to tokens (n, width), which begin as large as the embeddings of words are.

    ``linear`` is one map, ``mlp`` two with a GELU between them, as wide as the language model.
    Source of the latter: H. Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024.
    """

    def __init__(self, kind: str, inputs: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        if kind == "linear":
            self.map: nn.Module = nn.Linear(inputs, width)
        elif kind == "mlp":
            self.map = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        else:
            raise HpcmmError(f"The connector {kind!r} is not known: choose linear or mlp.")
        self.scale = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.scale(self.map(self.norm(features)))
        return tokens

    def match(self, embeddings: Tensor) -> None:
        """Let tokens begin with the root mean square of ``embeddings`` (vocabulary, width)."""
        with torch.no_grad():
            self.scale.weight.fill_(float(embeddings.float().square().mean().sqrt()))
