"""Packed causal attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "hpcmm"


def _packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Any,
    *,
    position_ids: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], query.shape[2]]
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _packed)
