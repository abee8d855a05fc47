"""The anomaly detector: patches of an image are compared with texts on a normal and on a damaged thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders import build_decoder
from hpcmm.workloads.anomaly.models.image_encoders import build_image_encoder
from hpcmm.workloads.anomaly.models.language import LanguageHead, TextLoss
from hpcmm.workloads.anomaly.models.prompt_ensemble import PromptEnsemble
from hpcmm.workloads.anomaly.models.text_encoders import build_text_encoder
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue
from hpcmm.workloads.anomaly.schema import LlmKind, ModelConfig

_TOP_SHARE = 0.02
"""Share of an image's pixels that its score is the mean of: about the area of a small defect."""


class Encoded(NamedTuple):
    """Images as the image encoder saw them earlier: its maps, and the images' height and width."""

    maps: list[Tensor]
    size: tuple[int, int]


class AnomalyModel(nn.Module):
    """Images and captions to a map of two logits a pixel, normal and abnormal.

    The decoder makes a patch embedding of the image encoder's features; the adapter takes the two states' text
    embeddings into the same space; a logit is their cosine similarity divided by the temperature, enlarged to pixels.
    Source of the idea: Z. Gu et al., "AnomalyGPT", AAAI 2024, its image decoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.temperature <= 0:
            raise HpcmmError(f"model.temperature must be above 0, not {config.temperature}.")
        self.image_encoder = build_image_encoder(config)
        self._state_texts = PromptEnsemble(build_text_encoder(config))
        self.text_adapter = _text_adapter(self._state_texts.width, config.text_adapter_width, config.decoder_width)
        self.decoder = build_decoder(config.decoder, self.image_encoder.channels, config.decoder_width)
        self._temperature = config.temperature
        self.language: LanguageHead | None = None
        if config.llm.kind is not LlmKind.none:
            self.language = LanguageHead(config.llm, self.image_encoder.channels[-1])

    def forward(
        self, images: Tensor | Encoded, captions: Sequence[str], dialogues: Sequence[Dialogue] | None = None
    ) -> Tensor | tuple[Tensor, TextLoss]:
        """Images (B, 3, H, W), normalised or encoded, and their B captions to logits (B, 2, H, W), float32.

        With B ``dialogues``, which take a language model, also to the loss of their answers.
        """
        encoded = images if isinstance(images, Encoded) else self.encode(images)
        logits = self._logits(encoded, captions)
        if dialogues is None:
            return logits
        assert self.language is not None
        return logits, self.language(_pooled(encoded), self.anomaly_map(logits), captions, dialogues)

    def image_features(self, images: Tensor | Encoded) -> Tensor:
        """Images (B, 3, H, W) to their coarsest features' mean (B, channels), which the image token is made of."""
        return _pooled(images if isinstance(images, Encoded) else self.encode(images))

    def _logits(self, encoded: Encoded, captions: Sequence[str]) -> Tensor:
        weight = next(self.decoder.parameters())
        patches = functional.normalize(self.decoder([each.to(weight.dtype) for each in encoded.maps]).float(), dim=1)
        states = functional.normalize(self._adapt(captions, patches.device).float(), dim=2)
        similarity = torch.einsum("bdhw,bsd->bshw", patches, states)
        enlarged = functional.interpolate(similarity, size=encoded.size, mode="bilinear", align_corners=False)
        return enlarged / self._temperature

    def encode(self, images: Tensor) -> Encoded:
        """Images (B, 3, H, W), normalised, to what a forward pass needs of them."""
        height, width = images.shape[-2:]
        return Encoded(self.image_encoder(images), (height, width))

    def _adapt(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """The captions' state embeddings in the space of the patches, (B, 2, D); each distinct caption once."""
        distinct = list(dict.fromkeys(captions))
        weight = next(self.text_adapter.parameters())
        adapted: Tensor = self.text_adapter(self._state_texts.embed(distinct).to(device, weight.dtype))
        places = [distinct.index(caption) for caption in captions]
        return adapted[torch.tensor(places, device=device)]

    @staticmethod
    def anomaly_map(logits: Tensor) -> Tensor:
        """Logits (B, 2, H, W) to the probability of abnormal (B, H, W)."""
        return torch.softmax(logits, dim=1)[:, 1]

    @staticmethod
    def score(logits: Tensor) -> Tensor:
        """Logits (B, 2, H, W) to one score an image (B,), higher for abnormal: the mean of the map's highest places."""
        places = AnomalyModel.anomaly_map(logits).flatten(1)
        return places.topk(max(1, round(_TOP_SHARE * places.shape[1])), dim=1).values.mean(dim=1)


def build_model(config: ModelConfig, seed: int = 0) -> AnomalyModel:
    """The model with weights that depend on ``config`` and ``seed`` alone; the global random state is left as it was.

    Raises HpcmmError for unknown names and for weights that cannot be read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AnomalyModel(config)


def _pooled(encoded: Encoded) -> Tensor:
    return encoded.maps[-1].mean(dim=(2, 3))


def _text_adapter(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )
