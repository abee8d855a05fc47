"""What a normal and a damaged thing are called: the two states' embeddings for a caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hpcmm.workloads.anomaly.models.text_encoders import TextEncoder

NORMAL_TEMPLATES = (
    "a photo of {}, normal and intact",
    "a photo of {} without any defect",
    "a picture of {} in perfect condition",
    "flawless surface of {}",
)
ABNORMAL_TEMPLATES = (
    "a photo of {}, abnormal and damaged",
    "a photo of {} with a defect",
    "a picture of {} in bad condition",
    "broken, scratched or stained surface of {}",
)
"""``{}`` is the caption, a noun phrase such as "a brick wall", so that no noun has to be found in it."""


class PromptEnsemble:
    """Embeds the two states of captions, each the normalised mean over its templates; keeps what it embedded.

    Source of averaging prompts over templates: A. Radford et al., "CLIP", ICML 2021, section 3.1.4.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self._encoder.width

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Captions to (len(captions), 2, width): normal, then abnormal; float32, on the CPU."""
        for caption in dict.fromkeys(captions):
            if caption not in self._known:
                self._known[caption] = self._embed_one(caption)
        return torch.stack([self._known[caption] for caption in captions])

    def _embed_one(self, caption: str) -> Tensor:
        templates = (*NORMAL_TEMPLATES, *ABNORMAL_TEMPLATES)
        sentences = self._encoder.encode([template.replace("{}", caption) for template in templates])
        normal, abnormal = sentences[: len(NORMAL_TEMPLATES)], sentences[len(NORMAL_TEMPLATES) :]
        return functional.normalize(torch.stack([normal.mean(dim=0), abnormal.mean(dim=0)]), dim=1)
