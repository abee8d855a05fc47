"""A fully convolutional decoder that goes from the coarsest feature map to the finest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder

_GROUPS = 8
_FINE_LEVELS = 2
_FINE_SHARE = 4
"""The finest levels, whose many places cost most, get this many times fewer channels."""


class FcnDecoder(Decoder):
    """Feature maps (B, channels[i], h[i], w[i]), finest first, to patch embeddings (B, width, h[0], w[0]).

    Each coarser map is enlarged, joined to the next finer one and mixed by a 3 x 3 convolution. Group normalisation,
    since a rank's few images give no batch statistics.
    Source of the idea: J. Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        """``width`` must be a multiple of 32, or HpcmmError."""
        super().__init__()
        if width < 1 or width % (_FINE_SHARE * _GROUPS):
            raise HpcmmError(f"model.decoder_width must be a multiple of {_FINE_SHARE * _GROUPS}, not {width}.")
        widths = [width // _FINE_SHARE if level < _FINE_LEVELS else width for level in range(len(channels))]
        self.coarsest = _mix(channels[-1], widths[-1], kernel=1)
        self.stages = nn.ModuleList(
            _mix(widths[level + 1] + channels[level], widths[level], kernel=3)
            for level in reversed(range(len(channels) - 1))
        )
        self.head = nn.Conv2d(widths[0], width, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        joined: Tensor = self.coarsest(features[-1])
        for stage, finer in zip(self.stages, reversed(features[:-1]), strict=True):
            enlarged = functional.interpolate(joined, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            joined = stage(torch.cat([enlarged, finer], dim=1))
        patches: Tensor = self.head(joined)
        return patches


def _mix(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(_GROUPS, outputs), nn.ReLU()
    )
