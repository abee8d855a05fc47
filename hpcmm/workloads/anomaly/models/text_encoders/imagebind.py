"""ImageBind's text tower: sentences in the space of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcmm.workloads.anomaly.models.image_encoders.clip import TINY_EMBEDDING_WIDTH
from hpcmm.workloads.anomaly.models.image_encoders.encoder import given_weights
from hpcmm.workloads.anomaly.models.imagebind import TextTower, load_text_tower
from hpcmm.workloads.anomaly.models.text_encoders import bytes_tokenizer
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder
from hpcmm.workloads.pretrained import load_tokenizer


class ImageBindTextEncoder(TextEncoder):
    """From a file in the published layout, and a folder with CLIP's tokenizer, whose token numbers ImageBind shares."""

    def __init__(self, folder: str | None = None, image_weights: str | None = None) -> None:
        """``image_weights``: the file, which holds both towers. ``folder``: the tokenizer's; None takes the file's.

        Raises HpcmmError if either cannot be read.
        """
        weights = given_weights(image_weights, "imagebind")
        self._tower = load_text_tower(weights).eval()
        tokenizer = Path(folder).expanduser() if folder else weights.parent
        self._tokenizer: Any = load_tokenizer(tokenizer, "ImageBind (CLIP's)", "model.text_encoder")
        self.width = self._tower.head.out_features

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """As :class:`TextEncoder` says."""
        rows = self._tokenizer(list(sentences), truncation=True, max_length=self._tower.longest)["input_ids"]
        longest = max(map(len, rows))
        numbers = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return functional.normalize(self._tower(numbers), dim=1)


class TinyImageBindTextEncoder(TextEncoder):
    """A small random text tower of the same classes; texts are split into bytes. Folders are of no effect."""

    width = TINY_EMBEDDING_WIDTH

    def __init__(self, folder: str | None = None, image_weights: str | None = None) -> None:  # noqa: ARG002
        """Takes its weights from the global random state."""
        self._tower = TextTower(
            width=64,
            depth=2,
            vocabulary=bytes_tokenizer.VOCABULARY,
            longest=bytes_tokenizer.LONGEST,
            embedding_width=self.width,
        ).eval()

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """As :class:`TextEncoder` says."""
        numbers, _ = bytes_tokenizer.tokenize(sentences)
        return functional.normalize(self._tower(numbers), dim=1)
