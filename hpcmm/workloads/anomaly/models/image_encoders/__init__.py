"""Image encoders: networks that turn images into feature maps of several depths, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders.clip import ClipEncoder
from hpcmm.workloads.anomaly.models.image_encoders.efficientnet_lite0 import EfficientNetLite0, packaged_weights
from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder
from hpcmm.workloads.anomaly.models.image_encoders.imagebind import ImageBindEncoder
from hpcmm.workloads.anomaly.models.image_encoders.vit import ViTEncoder
from hpcmm.workloads.anomaly.schema import ModelConfig

__all__ = ["IMAGE_ENCODERS", "EfficientNetLite0", "ImageEncoder", "build_image_encoder", "packaged_weights"]


def _lite0(config: ModelConfig, frozen: bool) -> ImageEncoder:
    if config.image_taps:
        raise HpcmmError("model.image_taps is for encoders made of blocks; EfficientNet-Lite0 gives its four strides.")
    weights = Path(config.image_weights).expanduser() if config.image_weights else packaged_weights()
    return EfficientNetLite0(weights, frozen=frozen)


def _clip(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ClipEncoder.from_folder(given_weights(config), config.image_taps, frozen=frozen)


def _vit(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ViTEncoder.from_folder(given_weights(config), config.image_taps, frozen=frozen)


def _imagebind(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ImageBindEncoder.from_file(given_weights(config), config.image_taps, frozen=frozen)


def _clip_tiny(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ClipEncoder.tiny(config.image_taps, frozen=frozen)


def _vit_tiny(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ViTEncoder.tiny(config.image_taps, frozen=frozen)


def _imagebind_tiny(config: ModelConfig, frozen: bool) -> ImageEncoder:
    return ImageBindEncoder.tiny(config.image_taps, frozen=frozen)


IMAGE_ENCODERS: Mapping[str, Callable[[ModelConfig, bool], ImageEncoder]] = MappingProxyType(
    {
        "clip": _clip,
        "clip_tiny": _clip_tiny,
        "efficientnet_lite0": _lite0,
        "imagebind": _imagebind,
        "imagebind_tiny": _imagebind_tiny,
        "vit": _vit,
        "vit_tiny": _vit_tiny,
    }
)
"""Each takes the model's configuration and whether it is frozen. The tiny ones are random: the global random state."""


def given_weights(config: ModelConfig) -> Path:
    """``model.image_weights``. Raises HpcmmError where it is not given."""
    if config.image_weights is None:
        raise HpcmmError(
            f"model.image_weights is not given: name the folder or file of {config.image_encoder}'s weights, or take a "
            f"small random one of the same kind with model={config.image_encoder}_tiny."
        )
    return Path(config.image_weights).expanduser()


def build_image_encoder(config: ModelConfig) -> ImageEncoder:
    """The encoder called ``model.image_encoder``, frozen as ``model.freeze_image_encoder`` says.

    Raises HpcmmError for a name that is not in :data:`IMAGE_ENCODERS`, and for weights that cannot be used.
    """
    name = config.image_encoder
    if name not in IMAGE_ENCODERS:
        raise HpcmmError(f"model.image_encoder={name} is not known; valid: {', '.join(sorted(IMAGE_ENCODERS))}.")
    return IMAGE_ENCODERS[name](config, config.freeze_image_encoder)
