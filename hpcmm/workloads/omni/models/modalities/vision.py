"""Vision transformers over images of any size: their patches lie in one row, and attention stays within an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hpcmm.errors import HpcmmError

ATTENTION = "hpcmm_images"
"""Of networks that :class:`PackedVision` runs, as ``transformers`` is to call it."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one class of ``transformers`` calls what every vision transformer has."""

    patches: Callable[[Any], nn.Module]
    positions: Callable[[Any], Tensor]
    """(1 or 0, the whole image's, and one a place of a square grid; width)."""
    layers: Callable[[Any], Any]
    whole: Callable[[Any], Tensor | None] = lambda _: None
    """The token that stands for the whole image, of ``width`` numbers."""
    before: Callable[[Any], nn.Module | None] = lambda _: None
    after: Callable[[Any], nn.Module | None] = lambda _: None
    """Norms before the first layer and after the last."""
    unused: Callable[[Any], Sequence[nn.Module | None]] = lambda _: ()
    """Parts that patches do not pass: of the whole image's embedding alone."""


LAYOUTS = {
    "vit": _Layout(
        patches=lambda network: network.embeddings.patch_embeddings.projection,
        positions=lambda network: network.embeddings.position_embeddings[0],
        layers=lambda network: network.layers,
        whole=lambda network: network.embeddings.cls_token.flatten(),
        after=lambda network: network.layernorm,
        unused=lambda network: [network.pooler],
    ),
    "clip_vision_model": _Layout(
        patches=lambda network: network.embeddings.patch_embedding,
        positions=lambda network: _table(network.embeddings.position_embedding),
        layers=lambda network: network.encoder.layers,
        whole=lambda network: network.embeddings.class_embedding,
        before=lambda network: network.pre_layrnorm,
        unused=lambda network: [network.post_layernorm],
    ),
    "siglip_vision_model": _Layout(
        patches=lambda network: network.embeddings.patch_embedding,
        positions=lambda network: _table(network.embeddings.position_embedding),
        layers=lambda network: network.encoder.layers,
        after=lambda network: network.post_layernorm,
        unused=lambda network: [getattr(network, "head", None)],
    ),
}
"""By the ``model_type`` of ``transformers``."""


class PackedVision(nn.Module):
    """Images (3, H, W), their sides multiples of the patch, to their patches' features (patches of all, channels).

    Each module of the network is called once for all images, whatever their sizes. Position embeddings are
    interpolated to each image's grid.
    Source of the packing: M. Dehghani et al., "Patch n' Pack: NaViT", NeurIPS 2023.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        kind = network.config.model_type
        if kind not in LAYOUTS:
            raise HpcmmError(f"A vision network of type {kind} is not known; valid: {', '.join(sorted(LAYOUTS))}.")
        self._layout = LAYOUTS[kind]
        self.patch = int(network.config.patch_size)
        self.channels = int(network.config.hidden_size)
        network.config._attn_implementation = ATTENTION
        for part in self._layout.unused(network):
            if part is not None:
                part.requires_grad_(False)
        self.network = network

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        layout, network, patch = self._layout, self.network, self.patch
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
        embed = layout.patches(network)
        pixels = torch.cat([_patches(image, patch) for image in images])
        patches = embed(pixels.to(next(embed.parameters()).dtype)).flatten(1)
        whole, table = layout.whole(network), layout.positions(network)
        extra = 0 if whole is None else 1
        places = {grid: _on_grid(table[extra:], grid) for grid in dict.fromkeys(grids)}
        rows = []
        for grid, own in zip(grids, torch.split(patches, [height * width for height, width in grids]), strict=True):
            if whole is not None:
                rows.append((whole + table[0])[None])
            rows.append(own + places[grid])
        states = torch.cat(rows)[None]
        if (norm := layout.before(network)) is not None:
            states = norm(states)
        lengths = [extra + height * width for height, width in grids]
        for layer in layout.layers(network):
            states = layer(states, lengths)  # in the mask's place, which all layers hand to their attention
        if (norm := layout.after(network)) is not None:
            states = norm(states)
        return torch.cat([own[extra:] for own in torch.split(states[0], lengths)])


def _patches(image: Tensor, patch: int) -> Tensor:
    """An image (3, H, W) to its patches (H W / patch^2, 3, patch, patch), row by row."""
    channels, height, width = image.shape
    cut = image.reshape(channels, height // patch, patch, width // patch, patch)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, channels, patch, patch)


def _table(embedding: nn.Embedding) -> Tensor:
    """All rows, by a call of the module: under ZeRO stage 3 its weight is there only then."""
    rows: Tensor = embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))
    return rows


def _on_grid(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions of a square grid (side^2, C), interpolated to another grid: (height width, C)."""
    side = round(len(table) ** 0.5)
    if grid == (side, side):
        return table
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table.dtype)


def _within_images(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of tokens (1, heads, T, C) within each image of ``lengths``; gives (1, T, heads, C)."""
    del module
    parts = [torch.split(each, lengths, 2) for each in (query, key, value)]
    if len(set(lengths)) == 1:  # as one batch
        parts = [(torch.cat(each),) for each in parts]
    rows = [
        functional.scaled_dot_product_attention(own_query, own_key, own_value, None, dropout, scale=scaling)
        for own_query, own_key, own_value in zip(*parts, strict=True)
    ]
    return torch.cat([row.transpose(1, 2).flatten(0, 1) for row in rows])[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _within_images)
