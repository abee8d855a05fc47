"""Decoders: feature maps of several strides to one map of patch embeddings, chosen by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder
from hpcmm.workloads.anomaly.models.decoders.fcn import FcnDecoder
from hpcmm.workloads.anomaly.models.decoders.mlp import MlpBatchNormDecoder, MlpDecoder
from hpcmm.workloads.anomaly.models.decoders.resnet import ResNetDecoder

DECODERS: Mapping[str, type[Decoder]] = MappingProxyType(
    {"fcn": FcnDecoder, "mlp": MlpDecoder, "mlp_bn": MlpBatchNormDecoder, "resnet": ResNetDecoder}
)


def build_decoder(name: str, channels: Sequence[int], width: int) -> Decoder:
    """The decoder called ``name``. Raises HpcmmError for a name that is not in :data:`DECODERS`."""
    if name not in DECODERS:
        raise HpcmmError(f"model.decoder={name} is not known; valid: {', '.join(sorted(DECODERS))}.")
    return DECODERS[name](channels, width)
