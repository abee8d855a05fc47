"""Text encoders: sentences to unit vectors, each named by a file of its own; towers share the image encoder's space.

A new one is a subclass of :class:`TextEncoder` and a file ``conf/model/text_tower/<name>.yaml``.
"""

from __future__ import annotations

from typing import cast

from hpcmm.config.parts import build_part
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder
from hpcmm.workloads.anomaly.schema import TEXT_TOWER, ModelConfig

__all__ = ["TextEncoder", "build_text_encoder"]


def build_text_encoder(config: ModelConfig) -> TextEncoder:
    """The encoder that ``model.text_tower`` says.

    Raises HpcmmError for an unknown name, and for weights that cannot be used.
    """
    encoder = build_part(config.text_tower, TEXT_TOWER, folder=config.text_encoder, image_weights=config.image_weights)
    return cast("TextEncoder", encoder)
