"""ImageBind's image and text towers, filled from the published checkpoint's layout.

The file is one state dict of all modalities; a tower takes its own tensors by their names (``modality_trunks.vision.
blocks.0.attn.in_proj_weight``) and leaves the others. Sizes follow from the tensors' shapes, so a small file of the
same layout makes a small tower. Source: R. Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", CVPR
2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders.tokens import check_square
from hpcmm.workloads.anomaly.models.weights import read_state_dict

HEADS = 16
"""Of both towers; no tensor's shape tells it."""
_EPS = 1e-6

VISION_NAMES = {
    "modality_preprocessors.vision.cls_token": "class_token",
    "modality_preprocessors.vision.rgbt_stem.proj.1.weight": "patches.weight",
    "modality_preprocessors.vision.pos_embedding_helper.pos_embed": "positions",
    "modality_trunks.vision.pre_transformer_layer.0.": "norm.",
    "modality_trunks.vision.blocks.": "blocks.",
    "modality_heads.vision.0.": "head_norm.",
    "modality_heads.vision.2.": "head.",
}
TEXT_NAMES = {
    "modality_preprocessors.text.token_embedding.": "tokens.",
    "modality_preprocessors.text.pos_embed": "positions",
    "modality_trunks.text.blocks.": "blocks.",
    "modality_heads.text.proj.0.": "head_norm.",
    "modality_heads.text.proj.1.": "head.",
}
"""Starts of the names in the file, and what they become here."""


class Attention(nn.Module):
    """Multi-head self-attention over (B, L, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, inputs: Tensor, *, causal: bool) -> Tensor:
        projected = functional.linear(inputs, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.reshape(*inputs.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        attended: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Attention, then a perceptron of four times the width, each behind a layer normalisation and added on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width)
        self.norm_2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, inputs: Tensor, *, causal: bool) -> Tensor:
        attended = inputs + self.attn(self.norm_1(inputs), causal=causal)
        hidden = functional.gelu(self.mlp["fc1"](self.norm_2(attended)))
        changed: Tensor = attended + self.mlp["fc2"](hidden)
        return changed


class VisionTower(nn.Module):
    """Pixels (B, 3, H, W) to the tokens after each block, (B, 1 + H W / patch^2, width), and to embeddings."""

    def __init__(self, width: int, depth: int, patch: int, places: int, embedding_width: int) -> None:
        """``places``: patches of the images that it was trained with."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1, 1 + places, width) * width**-0.5)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head_norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, embedding_width, bias=False)
        self._grid = check_square(places, "ImageBind")

    def forward(self, pixels: Tensor, depth: int) -> list[Tensor]:
        """The tokens after each of the first ``depth`` blocks."""
        patches = self.patches(pixels)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = self.norm(tokens + self._positions_for(patches.shape[-2], patches.shape[-1]))
        states = []
        for block in self.blocks[:depth]:
            tokens = block(tokens, causal=False)
            states.append(tokens)
        return states

    def embed(self, tokens: Tensor) -> Tensor:
        """The last block's tokens to (B, embedding_width), not normalised."""
        embedded: Tensor = self.head(self.head_norm(tokens[:, 0]))
        return embedded

    def _positions_for(self, height: int, width: int) -> Tensor:
        if (height, width) == (self._grid, self._grid):
            return self.positions
        grid = self.positions[:, 1:].transpose(1, 2).reshape(1, -1, self._grid, self._grid)
        resized = functional.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], resized.to(grid.dtype).flatten(2).transpose(1, 2)], dim=1)


class TextTower(nn.Module):
    """Token numbers (B, L), zeros after the end, to embeddings (B, embedding_width), not normalised.

    The end of a text is its largest number, the end token's. What comes after it cannot reach it, for attention goes
    backwards only.
    """

    def __init__(self, width: int, depth: int, vocabulary: int, longest: int, embedding_width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(1, longest, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head_norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, embedding_width, bias=False)

    @property
    def longest(self) -> int:
        """Most tokens of a text, with its start and its end."""
        return self.positions.shape[1]

    def forward(self, numbers: Tensor) -> Tensor:
        states = self.tokens(numbers) + self.positions[:, : numbers.shape[1]]
        for block in self.blocks:
            states = block(states, causal=True)
        ends = states[torch.arange(len(numbers)), numbers.argmax(dim=1)]
        embedded: Tensor = self.head(self.head_norm(ends))
        return embedded


def load_vision_tower(path: Path) -> VisionTower:
    """From a file in the published layout. Raises HpcmmError, naming the tensor, if it is not."""
    state = _own_tensors(path, VISION_NAMES, "vision")
    if state["patches.weight"].ndim == 5:
        # An image counts as a film of two equal frames, so its two kernels add up to one.
        state["patches.weight"] = state["patches.weight"].sum(dim=2)
    width, _, patch, _ = _shape(path, state, "patches.weight", 4)
    _, tokens, _ = _shape(path, state, "positions", 3)
    embedding_width, _ = _shape(path, state, "head.weight", 2)
    with torch.device("meta"):
        tower = VisionTower(width, _depth(state), patch, tokens - 1, embedding_width)
    _fill(tower, state, path)
    return tower


def load_text_tower(path: Path) -> TextTower:
    """From a file in the published layout. Raises HpcmmError, naming the tensor, if it is not."""
    state = _own_tensors(path, TEXT_NAMES, "text")
    vocabulary, width = _shape(path, state, "tokens.weight", 2)
    _, longest, _ = _shape(path, state, "positions", 3)
    embedding_width, _ = _shape(path, state, "head.weight", 2)
    with torch.device("meta"):
        tower = TextTower(width, _depth(state), vocabulary, longest, embedding_width)
    _fill(tower, state, path)
    return tower


def _own_tensors(path: Path, names: Mapping[str, str], modality: str) -> dict[str, Tensor]:
    """This tower's tensors under the names that they have here."""
    state = {}
    for name, value in read_state_dict(path).items():
        for start, own in names.items():
            if name == start or (start.endswith(".") and name.startswith(start)):
                state[own + name[len(start) :]] = value.float()
    needed = [start for start, own in names.items() if not any(name.startswith(own) for name in state)]
    if needed:
        raise HpcmmError(
            f"{path} is no ImageBind checkpoint with a {modality} tower: it has no tensor {needed[0]}"
            f"{'...' if needed[0].endswith('.') else ''}."
        )
    return state


def _shape(path: Path, state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dimensions:
        raise HpcmmError(
            f"{path} is no ImageBind checkpoint: {name} has the shape {shape}, not {dimensions} dimensions."
        )
    return shape


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in state if _is_block(name)), default=0)


def _is_block(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".")[1].isdecimal()


def _fill(tower: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = tower.state_dict()
    lacking, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    for problem, names in (("lacks", lacking), ("has the unknown", unknown), ("has another shape for", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise HpcmmError(f"{path} is no ImageBind checkpoint of a known layout: it {problem} {names[0]}{more}.")
    tower.load_state_dict(state, assign=True)
