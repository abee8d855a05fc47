"""Images at their own resolution: the larger, the more tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.images import read_image
from hpcmm.workloads.omni.models.modalities.connector import Connector
from hpcmm.workloads.omni.models.modalities.merging import merged_squares
from hpcmm.workloads.omni.models.modalities.modality import Modality
from hpcmm.workloads.omni.models.modalities.vision import LAYOUTS, PackedVision
from hpcmm.workloads.pretrained import load_pretrained, model_type_of, pixel_scale

KEY = "weights"
_HALF = (0.5, 0.5, 0.5)


class ImageModality(Modality):
    """A vision transformer of ``transformers`` from a local folder (ViT, or the vision tower of CLIP or SigLIP).

    Each square of ``merge`` x ``merge`` patches becomes a token.
    """

    needs_weights = True
    model_types = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit")
    upload_suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

    def __init__(
        self,
        width: int,
        weights: str | None = None,
        *,
        merge: int = 2,
        most_tokens: int = 256,
        connector: Literal["linear", "mlp"] = "mlp",
        frozen: bool = True,
        connector_frozen: bool = False,
    ) -> None:
        """``most_tokens``: a larger image is made smaller. Raises HpcmmError if the folder ``weights`` is no such
        network."""
        super().__init__()
        if merge < 1 or most_tokens < 1:
            raise HpcmmError(f"merge and most_tokens of an image must be at least 1, not {merge} and {most_tokens}.")
        network, mean, std = self.network(weights)
        encoder = PackedVision(network)
        self._merge, self._most, self._side = merge, most_tokens, encoder.patch * merge
        self._mean, self._std = tuple(mean), tuple(std)
        joined = Connector(connector, encoder.channels * merge**2, width)
        self.finish(encoder, joined, frozen=frozen, connector_frozen=connector_frozen)

    def network(self, weights: str | None) -> tuple[Any, Sequence[float], Sequence[float]]:
        """The vision network, and mean and deviation of each channel that it wants, of values from 0 to 1."""
        if weights is None:
            raise HpcmmError(
                "An image encoder needs the folder of its weights: give it as weights, or take a tiny one."
            )
        folder = Path(weights).expanduser()
        from transformers import CLIPVisionModel, SiglipVisionModel, ViTModel  # noqa: PLC0415 - takes seconds

        classes = {"vit": ViTModel, "clip": CLIPVisionModel, "siglip": SiglipVisionModel}
        classes |= {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
        kind = model_type_of(folder, "an image encoder", KEY)
        if kind not in self.model_types:
            raise HpcmmError(f"{folder} holds a model of type {kind}, but images take {', '.join(self.model_types)}.")
        # The tower's own pooling is not used, and image classifiers' folders do not hold it.
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        network = load_pretrained(classes[kind], folder, "an image encoder", KEY, **options)
        return network, *pixel_scale(folder, _HALF, _HALF)

    def read(self, path: Path) -> Tensor:
        """An image file to pixels (3, H, W) uint8; H and W are multiples of patch x merge."""
        return self.prepare(read_image(path))

    def prepare(self, pixels: NDArray[np.uint8]) -> Tensor:
        """As :meth:`read`, of an image in memory, (height, width, 3)."""
        height, width = pixels.shape[:2]
        fitted = _fitted(width, height, self._side, self._most)
        if fitted != (width, height):
            pixels = np.array(Image.fromarray(pixels).resize(fitted, Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def count(self, prepared: Tensor) -> int:
        return (prepared.shape[-2] // self._side) * (prepared.shape[-1] // self._side)

    def example(self) -> Tensor:
        return torch.zeros(3, self._side, self._side, dtype=torch.uint8)

    def forward(self, prepared: Sequence[Tensor]) -> Tensor:
        mean, std = (torch.tensor(each, device=prepared[0].device)[:, None, None] for each in (self._mean, self._std))
        images = [(image.float() / 255 - mean) / std for image in prepared]
        patches = self.encoder(images)
        patch = self._side // self._merge
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in prepared]
        tokens: Tensor = self.connector(merged_squares(patches, grids, self._merge))
        return tokens


class TinyImageModality(ImageModality):
    """A small random network, for machines without weights: of ViT's, CLIP's or SigLIP's classes."""

    needs_weights = False

    def __init__(  # noqa: PLR0913 -- each is a key of a YAML file
        self,
        width: int,
        *,
        architecture: Literal["clip", "siglip", "vit"] = "vit",
        channels: int = 64,
        layers: int = 2,
        heads: int = 4,
        patch: int = 8,
        side: int = 64,
        merge: int = 2,
        most_tokens: int = 256,
        connector: Literal["linear", "mlp"] = "mlp",
        frozen: bool = False,
        connector_frozen: bool = False,
    ) -> None:
        """``side``: that of the images, in pixels, which the network's position embeddings are made for."""
        self._sizes = {
            "hidden_size": channels,
            "intermediate_size": 2 * channels,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side,
        }
        self._architecture = architecture
        super().__init__(
            width,
            merge=merge,
            most_tokens=most_tokens,
            connector=connector,
            frozen=frozen,
            connector_frozen=connector_frozen,
        )

    def network(self, weights: str | None) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
        del weights
        from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - takes seconds

        names = {name.partition("_")[0]: name for name in LAYOUTS}
        if self._architecture not in names:
            raise HpcmmError(f"A tiny image encoder is {', '.join(sorted(names))}, not {self._architecture}.")
        config = AutoConfig.for_model(names[self._architecture], **self._sizes)
        return _scaled_to_inputs(AutoModel.from_config(config)), _HALF, _HALF


def _fitted(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of ``side``, at least one and of ``most`` squares at most."""
    shrink = min(1.0, math.sqrt(most * side**2 / (width * height)))
    columns, rows = (max(1, round(length * shrink / side)) for length in (width, height))
    while columns * rows > most:  # rounded up, or one side is shorter than a square
        columns, rows = (columns - 1, rows) if columns >= rows else (columns, rows - 1)
    return columns * side, rows * side


def _scaled_to_inputs(network: nn.Module) -> nn.Module:
    """A random ``network`` whose maps are drawn anew, so that each keeps the size of what it is given.

    ``transformers`` draws them for about 1000 channels. Source: Y. LeCun et al., "Efficient BackProp", 1998, section
    4.6.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return network
