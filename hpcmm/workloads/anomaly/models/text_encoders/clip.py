"""CLIP's text tower: sentences in the space of CLIP's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcmm.workloads.anomaly.models.image_encoders.clip import TINY_EMBEDDING_WIDTH
from hpcmm.workloads.anomaly.models.image_encoders.encoder import given_weights
from hpcmm.workloads.anomaly.models.text_encoders import bytes_tokenizer
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder
from hpcmm.workloads.pretrained import clip_config, load_pretrained, load_tokenizer

_KEY = "model.text_encoder (or model.image_weights)"


class ClipTextEncoder(TextEncoder):
    """From a ``transformers`` CLIP folder with its tokenizer. The weights are read when the first sentence comes."""

    def __init__(self, folder: str | None = None, image_weights: str | None = None) -> None:
        """``folder``: None takes that of the image encoder's weights. Raises HpcmmError if it is none of CLIP's."""
        self._folder = Path(folder).expanduser() if folder else given_weights(image_weights, "clip")
        self._config = clip_config(self._folder, _KEY)
        self._tower: Any = None
        self._tokenizer: Any = None
        self.width = int(self._config.projection_dim)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """As :class:`TextEncoder` says."""
        if self._tower is None:
            from transformers import CLIPTextModelWithProjection  # noqa: PLC0415 - takes seconds

            self._tokenizer = load_tokenizer(self._folder, "CLIP", _KEY)
            self._tower = load_pretrained(
                CLIPTextModelWithProjection,
                self._folder,
                "CLIP's text tower",
                _KEY,
                config=self._config.text_config,
            )
        longest = self._tower.config.max_position_embeddings
        tokens = self._tokenizer(
            list(sentences), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        embedded = self._tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds
        return functional.normalize(embedded, dim=1)


class TinyClipTextEncoder(TextEncoder):
    """A small random text tower of the same classes; texts are split into bytes. Folders are of no effect."""

    width = TINY_EMBEDDING_WIDTH

    def __init__(self, folder: str | None = None, image_weights: str | None = None) -> None:  # noqa: ARG002
        """Takes its weights from the global random state."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # noqa: PLC0415 - takes seconds

        config = CLIPTextConfig(
            vocab_size=bytes_tokenizer.VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=bytes_tokenizer.LONGEST,
            projection_dim=self.width,
            bos_token_id=bytes_tokenizer.START,
            eos_token_id=bytes_tokenizer.END,
            pad_token_id=0,
        )
        self._tower: Any = CLIPTextModelWithProjection(config).eval()

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """As :class:`TextEncoder` says."""
        numbers, used = bytes_tokenizer.tokenize(sentences)
        return functional.normalize(self._tower(input_ids=numbers, attention_mask=used).text_embeds, dim=1)
