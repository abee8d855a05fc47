"""What every decoder is: feature maps of several strides in, one map of patch embeddings out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Decoder(nn.Module, ABC):
    """Feature maps (B, channels[i], h[i], w[i]), finest first, to patch embeddings (B, width, h[0], w[0]).

    A subclass is built with ``channels: Sequence[int]`` and ``width: int``, and raises HpcmmError for those that it
    cannot have; further parameters are plain values with defaults. Its first weights come from the global random state.
    """

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """As the class says; the maps' height and width may differ from batch to batch."""


def stack_levels(features: Sequence[Tensor]) -> Tensor:
    """All levels on the finest grid, as one list of feature vectors, for decoders that work place by place.

    Feature maps (B, channels[i], h[i], w[i]), finest first, to one map (B, sum of channels, h[0], w[0]).
    Each level's vectors are brought to unit length first: their scales differ by orders of magnitude, and the largest
    would drown the others. Source of comparing patches at several depths: K. Roth et al., "PatchCore", CVPR 2022.
    """
    size = features[0].shape[-2:]
    levels = [functional.normalize(level, dim=1) for level in features]
    return torch.cat(
        [functional.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in levels], dim=1
    )
