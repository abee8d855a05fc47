"""Text encoders: sentences to unit vectors, chosen by name; the towers share a space with the image encoder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.text_encoders.clip import ClipTextEncoder, TinyClipTextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.imagebind import ImageBindTextEncoder, TinyImageBindTextEncoder
from hpcmm.workloads.anomaly.models.text_encoders.sentence import SentenceEncoder, packaged_text_encoder
from hpcmm.workloads.anomaly.schema import ModelConfig

__all__ = ["TEXT_ENCODERS", "SentenceEncoder", "TextEncoder", "build_text_encoder", "packaged_text_encoder"]


TEXT_ENCODERS: Mapping[str, Callable[..., TextEncoder]] = MappingProxyType(
    {
        "clip": ClipTextEncoder,
        "clip_tiny": TinyClipTextEncoder,
        "imagebind": ImageBindTextEncoder,
        "imagebind_tiny": TinyImageBindTextEncoder,
        "sentence": SentenceEncoder,
    }
)


def build_text_encoder(config: ModelConfig) -> TextEncoder:
    """The encoder called ``model.text_tower``.

    Raises HpcmmError for a name that is not in :data:`TEXT_ENCODERS`, and for weights that cannot be used.
    """
    name = config.text_tower
    if name not in TEXT_ENCODERS:
        raise HpcmmError(f"model.text_tower={name} is not known; valid: {', '.join(sorted(TEXT_ENCODERS))}.")
    return TEXT_ENCODERS[name](folder=config.text_encoder, image_weights=config.image_weights)
