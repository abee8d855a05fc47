"""Attention over packed rows: the implementation ``hpcmm`` of ``transformers``' attention functions.

A packed row (1, S) holds examples one after another, and attention never crosses from one into another. A network that
is made with ``attn_implementation="hpcmm"`` gets no mask from ``transformers``; it hands on the row's ``position_ids``,
which are 0 at each example's start. That is all that is needed. No mask over the row is made.

Importing this module registers the implementation. A sequence recipe registers its own forms under names of their own.
Generation reads a cache of keys, which is no packed row: there a network uses ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hpcmm.errors import HpcmmError
from hpcmm.train.tiles import tiled_attention, tiles_of

Value = TypeVar("Value")

NAME = "hpcmm"
"""The implementation's name, as ``attn_implementation``."""

REFUSED = {
    "s_aux": "attention sinks",
    "softcap": "a cap on attention scores (softcap)",
    "position_bias": "a bias on attention scores",
}
"""Arguments that an attention function gets for what some architectures have and is not supported here."""


@dataclass(frozen=True)
class Layout:
    """Where the examples of a packed row lie."""

    boundaries: tuple[int, ...]
    """The starts of the examples, and the row's length."""
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        """Of the examples, in tokens."""
        return [stop - start for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False)]

    @cached_property
    def longest(self) -> int:
        """The length of the longest example, in tokens."""
        return max(self.lengths)

    @cached_property
    def cumulative(self) -> Tensor:
        """(examples + 1,) int32: the boundaries, where the row is."""
        return torch.tensor(self.boundaries, dtype=torch.int32, device=self.device)


class PerPositions(Generic[Value]):
    """What is known of a row, by the tensor of its positions.

    All layers of a forward pass get the same tensor, and a recomputed layer gets it again, so that each row is looked
    at once. On a GPU each look waits for the device. A copy or a changed tensor is looked at anew.
    """

    def __init__(self, find: Callable[[Tensor], Value]) -> None:
        self._find = find
        self._known = WeakTensorKeyDictionary()

    def __call__(self, positions: Tensor) -> Value:
        version = _version(positions)
        known: tuple[int, Value] | None = self._known.get(positions)  # type: ignore[no-untyped-call]
        if known is None or known[0] != version:
            known = version, self._find(positions)
            self._known[positions] = known
        return known[1]

    def set(self, positions: Tensor, value: Value) -> None:
        """Say what would be found."""
        self._known[positions] = (_version(positions), value)


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; those of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def find_layout(positions: Tensor) -> Layout:
    """The examples of a row with these positions (1, S)."""
    if positions.dim() != 2 or positions.shape[0] != 1 or positions.shape[1] == 0:
        raise HpcmmError(f"a packed row's positions have the shape (1, tokens), not {tuple(positions.shape)}")
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise HpcmmError(
            f"a packed row's positions begin with 0, not {int(positions[0, 0])}: count them from each example's start"
        )
    return Layout((*starts, positions.shape[1]), positions.device)


layout_of = PerPositions(find_layout)
"""The layout of the row with these positions (1, S), found once a row."""


@dataclass(frozen=True)
class Options:
    """How a module attends."""

    scale: float
    window: int | None
    """A token sees that many tokens of its example, itself among them; None: all before it."""
    dropout: float


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: Options) -> Tensor:
    """Causal attention within each example of a row: (1, S, heads, D).

    ``query`` is (1, heads, S, D), ``key`` and ``value`` are (1, KV heads, S, D); heads are a multiple of KV heads.
    """
    window = options.window if options.window is not None and options.window < layout.longest else None
    if _varlen(query, value) and options.dropout == 0.0:
        return _varlen_attention(query, key, value, layout, options.scale, window)
    if window is None:
        return _each_example(query, key, value, layout, options)
    if options.dropout:
        raise HpcmmError(
            f"a sliding window of {window} tokens with dropout of attention is not supported: set attention_dropout: 0"
        )
    row = range(layout.boundaries[-1])
    tiles = tuple(tiles_of(layout.boundaries, row, row, window))
    return tiled_attention(query, key, value, tiles, options.scale).transpose(1, 2)


def _varlen(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's FlashAttention over rows of examples takes these."""
    width = query.shape[-1]
    half = query.dtype in {torch.float16, torch.bfloat16}
    return query.is_cuda and half and width == value.shape[-1] and width % 8 == 0 and width <= 256


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """One call for the whole row."""
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cumulative,
        layout.cumulative,
        layout.longest,
        layout.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)


def _each_example(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: Options) -> Tensor:
    """One example after another.

    On CPUs this is faster than one masked attention over the row (2,048 tokens: 1.6 times for one example, 15 times
    for 128), and than examples of like lengths padded to a batch. ``split``, as the gradient of a slice is a whole row.
    """
    if query.is_cuda and query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
        # The kernel that takes float32 on GPUs knows no groups of heads; the one that does holds all scores.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    grouped = query.shape[1] != key.shape[1]
    queries, keys, values = (torch.split(each, layout.lengths, dim=2) for each in (query, key, value))
    attended = [
        scaled_dot_product_attention(
            *example, None, options.dropout, is_causal=True, scale=options.scale, enable_gqa=grouped
        ).transpose(1, 2)
        for example in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, dim=1)


def options_of(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, given: dict[str, Any]
) -> tuple[Tensor, Options]:
    """The row's positions and how to attend, from an attention function's arguments. Refuses what is not supported."""
    _check(module, query, key, mask, given)
    if positions is None:
        raise HpcmmError(
            f"{type(module).__name__}: no position_ids were given, which say where the examples of a packed row start"
        )
    scaling = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return positions, Options(scale, given.get("sliding_window"), float(given.get("dropout") or 0.0))


def _check(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: dict[str, Any]) -> None:
    """Raise HpcmmError for what is not supported, with the remedy."""
    name = f"{type(module).__name__}: attention over packed rows"
    extras = [what for argument, what in REFUSED.items() if given.get(argument) is not None]
    if extras:
        raise HpcmmError(f"{name} does not support {extras[0]}: train another architecture")
    if mask is not None:
        raise HpcmmError(f"{name} takes no attention mask: call the network with position_ids alone")
    if given.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise HpcmmError(f"{name} is causal, and this module is not: load it with attn_implementation='sdpa'")
    if query.shape[2] != key.shape[2]:
        raise HpcmmError(
            f"{name} has as many keys as queries, not {key.shape[2]} and {query.shape[2]} as in generation with a "
            "cache: load the network with attn_implementation='sdpa'"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """What ``transformers`` calls in each layer."""
    positions, options = options_of(module, query, key, attention_mask, position_ids, given)
    return packed_attention(query, key, value, layout_of(positions), options), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
