"""A plain vision transformer: patch features of several depths, with no texts beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder, given_weights
from hpcmm.workloads.anomaly.models.image_encoders.tokens import TINY_VISION, check_square, choose_taps, tokens_to_map
from hpcmm.workloads.pretrained import load_pretrained, pixel_scale


class ViTEncoder(ImageEncoder):
    """A ``transformers`` ViT. One map a tapped block, all of one stride, the patch size.

    Position embeddings are interpolated for other image sizes than it was trained with.
    Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    name = "ViT"
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    needs_weights = True

    def __init__(self, weights: str | None = None, taps: Sequence[int] = (), *, frozen: bool = True) -> None:
        """``weights``: a ``transformers`` ViT folder, whose preprocessor_config.json tells the pixel scale.

        Raises HpcmmError if it is none.
        """
        super().__init__()
        network = self._load(weights)
        config = network.config
        check_square((config.image_size // config.patch_size) ** 2, self.name)
        self.taps = choose_taps(taps, config.num_hidden_layers)
        self._patch = self.side_multiple = int(config.patch_size)
        self.channels = (int(config.hidden_size),) * len(self.taps)
        self.strides = (self._patch,) * len(self.taps)
        self.network = network
        self.set_frozen(frozen, [*network.layers[self.taps[-1] + 1 :], network.layernorm])

    def _load(self, weights: str | None) -> Any:
        """A ``ViTModel`` without its pooling layer."""
        from transformers import ViTModel  # noqa: PLC0415 - takes seconds

        folder = given_weights(weights, "vit")
        network = load_pretrained(_WithoutPooler(ViTModel), folder, "a ViT", "model.image_weights")
        self.mean, self.std = pixel_scale(folder, self.mean, self.std)
        return network

    def maps(self, pixels: Tensor) -> list[Tensor]:
        hidden = self.network(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        size = [side // self._patch for side in pixels.shape[-2:]]
        return [tokens_to_map(hidden[tap + 1], size) for tap in self.taps]  # hidden[0] comes before the first block


class TinyViTEncoder(ViTEncoder):
    """Random weights: 4 blocks of width 96, patches of 8 pixels, for machines without weights.

    They come from the global random state; ``weights`` is of no effect.
    """

    needs_weights = False

    def _load(self, weights: str | None) -> Any:  # noqa: ARG002 -- every encoder can be given some
        from transformers import ViTConfig, ViTModel  # noqa: PLC0415

        return ViTModel(ViTConfig(**TINY_VISION), add_pooling_layer=False)


class _WithoutPooler:
    """``ViTModel.from_pretrained`` without the pooling layer, which image classifiers' folders do not hold."""

    def __init__(self, model_class: Any) -> None:
        self._class = model_class

    def from_pretrained(self, folder: Path, **options: Any) -> Any:
        return self._class.from_pretrained(folder, add_pooling_layer=False, **options)
