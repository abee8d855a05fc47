"""A decoder of residual blocks on the finest grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder, stack_levels

_GROUPS = 8
_BLOCKS = 2
_SHARE = 4
"""The blocks work at this part of the width: 3 x 3 convolutions on the finest grid are the costly part."""


class ResNetDecoder(Decoder):
    """Feature maps (B, channels[i], h[i], w[i]), finest first, to patch embeddings (B, width, h[0], w[0]).

    Basic residual blocks after K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with group
    normalisation, since a rank's few images give no batch statistics.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        """``width`` must be a multiple of 32, or HpcmmError."""
        super().__init__()
        if width < 1 or width % (_SHARE * _GROUPS):
            raise HpcmmError(f"model.decoder_width must be a multiple of {_SHARE * _GROUPS}, not {width}.")
        inner = width // _SHARE
        self.reduce = nn.Sequential(
            nn.Conv2d(sum(channels), inner, 1, bias=False), nn.GroupNorm(_GROUPS, inner), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(ResidualBlock(inner) for _ in range(_BLOCKS)))
        self.head = nn.Conv2d(inner, width, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        patches: Tensor = self.head(self.blocks(self.reduce(stack_levels(features))))
        return patches


class ResidualBlock(nn.Module):
    """(B, width, h, w) to the same shape: relu(x + two normalised 3 x 3 convolutions of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, width),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        changed: Tensor = self.body(inputs)
        return nn.functional.relu(inputs + changed)
