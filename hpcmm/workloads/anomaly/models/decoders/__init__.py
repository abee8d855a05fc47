"""Decoders: feature maps of several strides to one map of patch embeddings, each named by a file of its own.

A new one is a subclass of :class:`Decoder` and a file ``conf/model/decoder/<name>.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hpcmm.config.parts import build_part
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder
from hpcmm.workloads.anomaly.schema import DECODER

__all__ = ["Decoder", "build_decoder"]


def build_decoder(part: Any, channels: Sequence[int], width: int) -> Decoder:
    """The decoder that ``model.decoder`` says, a name or a part. Raises HpcmmError for an unknown name."""
    return cast("Decoder", build_part(part, DECODER, channels=channels, width=width))
