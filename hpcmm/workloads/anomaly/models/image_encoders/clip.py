"""CLIP's vision tower: patch features of several depths, and whole images in the space of CLIP's texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder, given_weights
from hpcmm.workloads.anomaly.models.image_encoders.tokens import TINY_VISION, check_square, choose_taps, tokens_to_map
from hpcmm.workloads.pretrained import clip_config, load_pretrained

_KEY = "model.image_weights"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each channel in CLIP's training. Source: A. Radford et al., "CLIP", ICML 2021, its published preprocessing."""


class ClipEncoder(ImageEncoder):
    """A ``transformers`` CLIP vision tower with its projection.

    One map a tapped block, all of one stride, the patch size. Position embeddings are interpolated for other image
    sizes than the tower was trained with.
    """

    name = "CLIP"
    mean = CLIP_MEAN
    std = CLIP_STD
    needs_weights = True

    def __init__(self, weights: str | None = None, taps: Sequence[int] = (), *, frozen: bool = True) -> None:
        """``weights``: a ``transformers`` CLIP folder. Raises HpcmmError if it is none."""
        super().__init__()
        tower = self._load(weights)
        config = tower.config
        check_square((config.image_size // config.patch_size) ** 2, self.name)
        self.taps = choose_taps(taps, config.num_hidden_layers)
        self._patch = self.side_multiple = int(config.patch_size)
        self.channels = (int(config.hidden_size),) * len(self.taps)
        self.strides = (self._patch,) * len(self.taps)
        self.embedding_width = int(config.projection_dim)
        self.tower = tower
        vision = tower.vision_model
        self.set_frozen(
            frozen,
            [*vision.encoder.layers[self.taps[-1] + 1 :], vision.post_layernorm, tower.visual_projection],
        )

    def _load(self, weights: str | None) -> Any:
        """A ``CLIPVisionModelWithProjection``."""
        from transformers import CLIPVisionModelWithProjection  # noqa: PLC0415 - takes seconds

        folder = given_weights(weights, "clip")
        config = clip_config(folder, _KEY).vision_config
        return load_pretrained(CLIPVisionModelWithProjection, folder, "CLIP's vision tower", _KEY, config=config)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        hidden = self._run(pixels).hidden_states
        size = [side // self._patch for side in pixels.shape[-2:]]
        return [tokens_to_map(hidden[tap + 1], size) for tap in self.taps]  # hidden[0] comes before the first block

    def embedding(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self._run(pixels).image_embeds
        return embedded

    def _run(self, pixels: Tensor) -> Any:
        return self.tower(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)


class TinyClipEncoder(ClipEncoder):
    """Random weights: 4 blocks of width 96, patches of 8 pixels, for machines without weights.

    They come from the global random state; ``weights`` is of no effect.
    """

    needs_weights = False

    def _load(self, weights: str | None) -> Any:  # noqa: ARG002 -- every encoder can be given some
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # noqa: PLC0415

        config = CLIPVisionConfig(**TINY_VISION, projection_dim=TINY_EMBEDDING_WIDTH)
        return CLIPVisionModelWithProjection(config)


TINY_EMBEDDING_WIDTH = 64
"""Length of the vectors that the small configuration's two towers share."""
