"""What every text encoder is: sentences in, unit vectors out, frozen, outside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """Embeds sentences as unit vectors.

    It is always frozen, and it is no ``nn.Module``, so that its weights are neither broadcast, nor converted, nor
    written to every checkpoint of the model that uses it.
    """

    @property
    def width(self) -> int:
        """Length of a vector."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to (len(sentences), width), float32, on the CPU. Raises HpcmmError where weights cannot be read."""
