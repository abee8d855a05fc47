"""Decoders: feature maps of several strides to one map of patch embeddings, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders.fcn import FcnDecoder
from hpcmm.workloads.anomaly.models.decoders.mlp import MlpBatchNormDecoder, MlpDecoder
from hpcmm.workloads.anomaly.models.decoders.resnet import ResNetDecoder

DECODERS: Mapping[str, Callable[[Sequence[int], int], nn.Module]] = MappingProxyType(
    {"fcn": FcnDecoder, "mlp": MlpDecoder, "mlp_bn": MlpBatchNormDecoder, "resnet": ResNetDecoder}
)
"""Each takes the channels of the feature maps, finest first, and the width of a patch embedding."""


def build_decoder(name: str, channels: Sequence[int], width: int) -> nn.Module:
    """The decoder called ``name``. Raises HpcmmError for a name that is not in :data:`DECODERS`."""
    if name not in DECODERS:
        raise HpcmmError(f"model.decoder={name} is not known; valid: {', '.join(sorted(DECODERS))}.")
    return DECODERS[name](channels, width)
