"""What the decoders that work place by place share: all levels on the finest grid, as one list of feature vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def stack_levels(features: Sequence[Tensor]) -> Tensor:
    """Feature maps (B, channels[i], h[i], w[i]), finest first, to one map (B, sum of channels, h[0], w[0]).

    Each level's vectors are brought to unit length first: their scales differ by orders of magnitude, and the largest
    would drown the others. Source of comparing patches at several depths: K. Roth et al., "PatchCore", CVPR 2022.
    """
    size = features[0].shape[-2:]
    levels = [functional.normalize(level, dim=1) for level in features]
    return torch.cat(
        [functional.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in levels], dim=1
    )
