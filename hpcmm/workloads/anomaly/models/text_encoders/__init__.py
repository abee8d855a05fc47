"""Text encoders: sentences to unit vectors, chosen by name; the towers share a space with the image encoder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders import given_weights
from hpcmm.workloads.anomaly.models.text_encoders.clip import ClipTextEncoder, TinyClipTextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.imagebind import ImageBindTextEncoder, TinyImageBindTextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.sentence import SentenceEncoder, packaged_text_encoder
from hpcmm.workloads.anomaly.schema import ModelConfig

__all__ = ["TEXT_ENCODERS", "SentenceEncoder", "TextEncoder", "build_text_encoder", "packaged_text_encoder"]


def _given(config: ModelConfig, otherwise: Path) -> Path:
    return Path(config.text_encoder).expanduser() if config.text_encoder else otherwise


def _sentence(config: ModelConfig) -> TextEncoder:
    return SentenceEncoder(_given(config, packaged_text_encoder()))


def _clip(config: ModelConfig) -> TextEncoder:
    return ClipTextEncoder(_given(config, given_weights(config)))


def _imagebind(config: ModelConfig) -> TextEncoder:
    weights = given_weights(config)
    return ImageBindTextEncoder(weights, _given(config, weights.parent))


TEXT_ENCODERS: Mapping[str, Callable[[ModelConfig], TextEncoder]] = MappingProxyType(
    {
        "clip": _clip,
        "clip_tiny": lambda _: TinyClipTextEncoder(),
        "imagebind": _imagebind,
        "imagebind_tiny": lambda _: TinyImageBindTextEncoder(),
        "sentence": _sentence,
    }
)


def build_text_encoder(config: ModelConfig) -> TextEncoder:
    """The encoder called ``model.text_tower``.

    Raises HpcmmError for a name that is not in :data:`TEXT_ENCODERS`, and for weights that cannot be used.
    """
    name = config.text_tower
    if name not in TEXT_ENCODERS:
        raise HpcmmError(f"model.text_tower={name} is not known; valid: {', '.join(sorted(TEXT_ENCODERS))}.")
    return TEXT_ENCODERS[name](config)
