"""Causal attention of a packed row in tiles, so that no mask over the whole row is ever made.

The examples of a packed row lie one after another, so the tokens that a piece of the row may see in an earlier piece
are a rectangle, and those that it may see in itself are triangles. A sliding window cuts the far corner off, which is a
triangle too. :func:`tiles_of` gives these tiles, :func:`attend` works through some of them, and the log-sum-exp of each
query's scores lets the results of several calls be merged exactly (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018). :func:`add_gradients` is the backward pass of any part of the tiles.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256
"""Queries whose scores are held at a time if no kernel does without holding them."""


class Kind(Enum):
    """Which keys of a tile its queries see. Tiles of the two triangles are square."""

    FULL = "all"
    CAUSAL = "query i sees keys 0..i"
    ANTICAUSAL = "query i sees keys i.."


class Tile(NamedTuple):
    """Queries ``queries`` and keys ``keys`` (slices along the tokens) that see each other as ``kind`` says."""

    queries: slice
    keys: slice
    kind: Kind

    def moved(self, queries: int, keys: int) -> Tile:
        """The same tile if the tensors begin that many tokens later."""
        return Tile(_moved(self.queries, queries), _moved(self.keys, keys), self.kind)


def _moved(piece: slice, tokens: int) -> slice:
    return slice(piece.start - tokens, piece.stop - tokens)


def tiles_of(boundaries: Sequence[int], queries: range, keys: range, window: int | None = None) -> Iterator[Tile]:
    """All that the tokens ``queries`` of a row see of the tokens ``keys``, each pair in exactly one tile.

    ``boundaries``: where examples start, and the row's length, rising. The two ranges are the same or do not overlap.
    ``window``: a token sees that many tokens, itself among them.
    """
    if keys.start == queries.start:
        first = bisect_right(boundaries, queries.start) - 1
        for start, stop in zip(boundaries[first:], boundaries[first + 1 :], strict=False):
            if start >= queries.stop:
                break
            yield from _within(max(start, queries.start), min(stop, queries.stop), window)
    elif keys.stop <= queries.start:
        # Only one example can reach from the keys into the queries: that of the first query.
        example = bisect_right(boundaries, queries.start) - 1
        first_key = max(boundaries[example], keys.start)
        last_query = min(boundaries[example + 1], queries.stop)
        yield from _between(range(queries.start, last_query), range(first_key, keys.stop), window)


def _within(start: int, stop: int, window: int | None) -> Iterator[Tile]:
    """What the tokens of one example see of each other."""
    block = stop - start if window is None else window
    for first in range(start, stop, block):
        piece = slice(first, min(first + block, stop))
        yield Tile(piece, piece, Kind.CAUSAL)
        yield from _between(range(piece.start, piece.stop), range(start, first), window)


def _between(queries: range, keys: range, window: int | None) -> Iterator[Tile]:
    """What tokens see of earlier tokens of the same example."""
    if window is not None:
        keys = range(max(keys.start, queries.start - window + 1), keys.stop)
        queries = range(queries.start, min(queries.stop, keys.stop - 1 + window))
    if not keys or not queries:
        return
    # Up to here every query sees every key; each further one sees one key less.
    whole = queries.stop if window is None else min(queries.stop, keys.start + window)
    yield Tile(slice(queries.start, whole), slice(keys.start, keys.stop), Kind.FULL)
    if whole < queries.stop:
        rest = slice(whole, queries.stop)
        first = keys.start + 1
        corner = first + queries.stop - whole
        yield Tile(rest, slice(first, corner), Kind.ANTICAUSAL)
        if corner < keys.stop:
            yield Tile(rest, slice(corner, keys.stop), Kind.FULL)


class Attended(NamedTuple):
    """What the queries found in the tiles so far, in float32."""

    out: Tensor
    """(1, heads, queries, width of a head)"""
    lse: Tensor
    """(1, heads, queries): the logarithm of the sum of the exponentials of each query's scores."""

    @classmethod
    def nothing(cls, query: Tensor, value: Tensor) -> Attended:
        """Before the first tile."""
        shape = (*query.shape[:3], value.shape[-1])
        out = torch.zeros(shape, dtype=torch.float32, device=query.device)
        return cls(out, torch.full(shape[:3], -torch.inf, dtype=torch.float32, device=query.device))

    def merge(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """Add what these queries found in further keys."""
        before = self.lse[:, :, queries]
        together = torch.logaddexp(before, lse)
        mine = self.out[:, :, queries]
        mine.mul_((before - together).exp_().unsqueeze(-1))
        mine.addcmul_(out.float(), (lse - together).exp_().unsqueeze(-1))
        before.copy_(together)


def attend(query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float, into: Attended) -> None:
    """Merge the attention of ``query`` (1, heads, queries, D) to ``key``, ``value`` (1, KV heads, keys, D) into what
    was found so far."""
    for tile in tiles:
        out, lse = _forward(query[:, :, tile.queries], key[:, :, tile.keys], value[:, :, tile.keys], tile.kind, scale)
        into.merge(tile.queries, out, lse)


class Gradients(NamedTuple):
    """Gradients of query, key and value, in float32 and in their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def zero(cls, *of: Tensor) -> Gradients:
        """Before the first tile."""
        return cls(*(torch.zeros_like(each, dtype=torch.float32, memory_format=torch.contiguous_format) for each in of))


class Attention(NamedTuple):
    """One attention's tensors, as its backward pass needs them."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    out: Tensor
    """Of all tiles, in the type of the query."""
    lse: Tensor
    """Of all tiles."""


def add_gradients(into: Gradients, gradient: Tensor, of: Attention, tiles: Sequence[Tile]) -> None:
    """Add what these tiles give to the gradients, if ``gradient`` is that of ``of.out``."""
    for tile in tiles:
        rows, columns = tile.queries, tile.keys
        parts = Attention(
            of.query[:, :, rows], of.key[:, :, columns], of.value[:, :, columns], of.scale, of.out[:, :, rows],
            of.lse[:, :, rows],
        )  # fmt: skip
        query, key, value = _backward(gradient[:, :, rows], parts, tile.kind)
        into.query[:, :, rows] += query
        into.key[:, :, columns] += key
        into.value[:, :, columns] += value


class _Tiled(torch.autograd.Function):
    """Attention in tiles within one process."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
        found = Attended.nothing(query, value)
        attend(query, key, value, tiles, scale, found)
        out = found.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, found.lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        sums = Gradients.zero(query, key, value)
        add_gradients(sums, gradients[0], Attention(query, key, value, ctx.scale, out, lse), ctx.tiles)
        return *(each.to(query.dtype) for each in sums), None, None


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
    """Attention in ``tiles``: (1, heads, queries, D), with gradients. Each query must see at least one key."""
    attended: Tensor = _Tiled.apply(query, key, value, tiles, scale)  # type: ignore[no-untyped-call]
    return attended


def _flip(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With the tokens in reverse order: an upper triangle becomes a lower one, which kernels know."""
    return tuple(each.flip(2) for each in tensors)


def _forward(query: Tensor, key: Tensor, value: Tensor, kind: Kind, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one tile."""
    if kind is Kind.ANTICAUSAL:
        query, key, value = _flip(query, key, value)
        out, lse = _forward(query, key, value, Kind.CAUSAL, scale)
        return out.flip(2), lse.flip(2)
    causal = kind is Kind.CAUSAL
    if _cpu_kernel(query, value):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return found[0], found[1]
    if _flash_on_gpu(query, value):
        rows = [each.transpose(1, 2) for each in (query, key, value)]
        found = torch.ops.aten._flash_attention_forward(
            *rows, None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale
        )
        return found[0].transpose(1, 2), found[1]
    return _written_out_forward(query, key, value, causal, scale)


def _backward(gradient: Tensor, of: Attention, kind: Kind) -> tuple[Tensor, ...]:
    """One tile's gradients of query, key and value."""
    if kind is Kind.ANTICAUSAL:
        query, key, value, out, lse = _flip(of.query, of.key, of.value, of.out, of.lse)
        flipped = Attention(query, key, value, of.scale, out, lse)
        return _flip(*_backward(gradient.flip(2), flipped, Kind.CAUSAL))
    causal = kind is Kind.CAUSAL
    if _cpu_kernel(of.query, of.value):
        found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, of.query, of.key, of.value, of.out, of.lse, 0.0, causal, scale=of.scale
        )
        return found
    if _flash_on_gpu(of.query, of.value):
        tensors = [each.transpose(1, 2) for each in (gradient, of.query, of.key, of.value, of.out)]
        # What a kernel needs to repeat its dropout; there is none.
        state = torch.empty(2, dtype=torch.uint64, device=gradient.device)
        nothing = torch.empty(0, device=gradient.device)
        found = torch.ops.aten._flash_attention_backward(
            *tensors, of.lse.contiguous(), None, None, of.query.shape[2], of.key.shape[2], 0.0, causal, state, nothing,
            scale=of.scale,
        )  # fmt: skip
        return tuple(each.transpose(1, 2) for each in found)
    return _written_out_backward(gradient, of, causal)


def _cpu_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's FlashAttention kernel for CPUs takes these."""
    return query.is_cpu and query.shape[-1] == value.shape[-1]


def _flash_on_gpu(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's FlashAttention kernel takes these."""
    width = query.shape[-1]
    half = query.dtype in {torch.float16, torch.bfloat16}
    return query.is_cuda and half and width == value.shape[-1] and width % 8 == 0 and width <= 256


def _scores(query: Tensor, key: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """(KV heads, queries of one KV head, rows, keys): scores of the rows from ``first`` on, in float32."""
    scores = torch.einsum("kgqd,knd->kgqn", query.float() * scale, key[0].float())
    if causal:
        row = torch.arange(first, first + query.shape[2], device=query.device).unsqueeze(1)
        scores.masked_fill_(torch.arange(key.shape[2], device=query.device) > row, -torch.inf)
    return scores


def _by_kv_head(heads: Tensor, kv_heads: int) -> Tensor:
    """(1, heads, ...) as (KV heads, heads of each, ...)."""
    return heads.reshape(kv_heads, -1, *heads.shape[2:])


def _written_out_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As formulas, in float32, for types and widths that no kernel takes. Some rows at a time."""
    grouped = _by_kv_head(query, key.shape[1])
    outs, sums = [], []
    for first in range(0, query.shape[2], _ROWS_AT_ONCE):
        scores = _scores(grouped[:, :, first : first + _ROWS_AT_ONCE], key, first, causal, scale)
        sums.append(scores.logsumexp(-1))
        outs.append(torch.einsum("kgqn,knd->kgqd", scores.softmax(-1), value[0].float()))
    out, lse = torch.cat(outs, 2), torch.cat(sums, 2)
    return out.reshape(*query.shape[:3], -1).to(query.dtype), lse.reshape(query.shape[:3])


def _written_out_backward(gradient: Tensor, of: Attention, causal: bool) -> tuple[Tensor, ...]:
    """The backward pass of :func:`_written_out_forward`, in float32."""
    kv_heads = of.key.shape[1]
    query, out, lse, grad = (_by_kv_head(each, kv_heads) for each in (of.query, of.out, of.lse, gradient))
    key, value = of.key[0].float(), of.value[0].float()
    queries, keys, values = [], torch.zeros_like(key), torch.zeros_like(value)
    for first in range(0, query.shape[2], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        weights = (_scores(query[:, :, rows], of.key, first, causal, of.scale) - lse[:, :, rows, None]).exp()
        row_gradient = grad[:, :, rows].float()
        values += torch.einsum("kgqn,kgqd->knd", weights, row_gradient)
        inner = torch.einsum("kgqd,knd->kgqn", row_gradient, value)
        inner -= (row_gradient * out[:, :, rows].float()).sum(-1, keepdim=True)
        weights.mul_(inner).mul_(of.scale)
        queries.append(torch.einsum("kgqn,knd->kgqd", weights, key))
        keys += torch.einsum("kgqn,kgqd->knd", weights, query[:, :, rows].float())
    return torch.cat(queries, 2).reshape(of.query.shape), keys.unsqueeze(0), values.unsqueeze(0)
