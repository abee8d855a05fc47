"""Image encoders: networks that turn images into feature maps of several depths, each named by a file of its own.

A new one is a subclass of :class:`ImageEncoder` and a file ``conf/model/image_encoder/<name>.yaml``.
"""

from __future__ import annotations

from typing import cast

from hpcmm.config.parts import build_part
from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder
from hpcmm.workloads.anomaly.schema import IMAGE_ENCODER, ModelConfig

__all__ = ["ImageEncoder", "build_image_encoder"]


def build_image_encoder(config: ModelConfig) -> ImageEncoder:
    """The encoder that ``model.image_encoder`` says, frozen as ``model.freeze_image_encoder`` says.

    Raises HpcmmError for an unknown name, and for weights that cannot be used.
    """
    encoder = build_part(
        config.image_encoder,
        IMAGE_ENCODER,
        weights=config.image_weights,
        taps=config.image_taps,
        frozen=config.freeze_image_encoder,
    )
    return cast("ImageEncoder", encoder)
