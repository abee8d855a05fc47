"""What vision transformers share: the small one's sizes, which blocks are tapped, and how tokens become maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hpcmm.errors import HpcmmError

TAPS = 4
TINY_VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
"""Of transformers' vision configurations: a model for machines without weights."""


def choose_taps(wanted: Sequence[int], blocks: int) -> tuple[int, ...]:
    """The blocks, from 0 on, whose patch tokens go to the decoder: the wanted ones, or four evenly spread up to the
    last.

    Of 32 blocks these are 7, 15, 23 and 31, as in AnomalyGPT (Z. Gu et al., AAAI 2024). Raises HpcmmError for a block
    that the encoder does not have.
    """
    if not wanted:
        count = min(TAPS, blocks)
        return tuple((number + 1) * blocks // count - 1 for number in range(count))
    if any(not 0 <= tap < blocks for tap in wanted) or list(wanted) != sorted(set(wanted)):
        raise HpcmmError(
            f"model.image_taps is {list(wanted)}, but must be rising numbers of blocks from 0 to {blocks - 1}."
        )
    return tuple(wanted)


def tokens_to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (B, 1 + h w, C), the first of which stands for the whole image, to a map (B, C, h, w)."""
    height, width = size
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, height, width)


def check_square(places: int, name: str) -> int:
    """The side of a square grid of position embeddings. Raises HpcmmError if it is none."""
    side = math.isqrt(places)
    if side * side != places:
        raise HpcmmError(f"{name} has {places} position embeddings, which make no square grid.")
    return side
