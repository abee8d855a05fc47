"""What every text encoder is: sentences in, unit vectors out, frozen, outside the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class TextEncoder(ABC):
    """Embeds sentences as unit vectors.

    It is always frozen, and it is no ``nn.Module``, so that its weights are neither broadcast, nor converted, nor
    written to every checkpoint of the model that uses it.

    A subclass is built with ``folder: str | None``, that of its weights or its tokenizer, and ``image_weights: str |
    None``, those of the image encoder, for a tower that may lie beside them; further parameters are plain values with
    defaults. It raises HpcmmError for what it cannot use.
    """

    width: int
    """Length of a vector."""

    @abstractmethod
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to (len(sentences), width), float32, on the CPU. Raises HpcmmError if weights cannot be read."""
