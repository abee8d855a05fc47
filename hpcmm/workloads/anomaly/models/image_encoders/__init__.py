"""Image encoders: networks that turn images into feature maps of several depths, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders.clip import ClipEncoder, TinyClipEncoder
from hpcmm.workloads.anomaly.models.image_encoders.efficientnet_lite0 import EfficientNetLite0, packaged_weights
from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder
from hpcmm.workloads.anomaly.models.image_encoders.imagebind import ImageBindEncoder, TinyImageBindEncoder
from hpcmm.workloads.anomaly.models.image_encoders.vit import TinyViTEncoder, ViTEncoder
from hpcmm.workloads.anomaly.schema import ModelConfig

__all__ = ["IMAGE_ENCODERS", "EfficientNetLite0", "ImageEncoder", "build_image_encoder", "packaged_weights"]


IMAGE_ENCODERS: Mapping[str, Callable[..., ImageEncoder]] = MappingProxyType(
    {
        "clip": ClipEncoder,
        "clip_tiny": TinyClipEncoder,
        "efficientnet_lite0": EfficientNetLite0,
        "imagebind": ImageBindEncoder,
        "imagebind_tiny": TinyImageBindEncoder,
        "vit": ViTEncoder,
        "vit_tiny": TinyViTEncoder,
    }
)


def build_image_encoder(config: ModelConfig) -> ImageEncoder:
    """The encoder called ``model.image_encoder``, frozen as ``model.freeze_image_encoder`` says.

    Raises HpcmmError for a name that is not in :data:`IMAGE_ENCODERS`, and for weights that cannot be used.
    """
    name = config.image_encoder
    if name not in IMAGE_ENCODERS:
        raise HpcmmError(f"model.image_encoder={name} is not known; valid: {', '.join(sorted(IMAGE_ENCODERS))}.")
    encoder = IMAGE_ENCODERS[name]
    return encoder(weights=config.image_weights, taps=config.image_taps, frozen=config.freeze_image_encoder)
