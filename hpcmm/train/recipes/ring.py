"""Ring attention: each rank keeps its queries, and the keys and values go round (Liu et al., "Ring Attention", 2023).

A row is cut into 2P pieces. Rank r has the pieces r and 2P-1-r (the zigzag placement of Megatron's context
parallelism), so that causal attention gives all ranks as much work. In each of P steps a rank attends to the keys that
it holds, while it already passes them on to the next rank. Tokens that no query of the rank may see (later ones, other
examples, those before the sliding window) cost nothing. Results of the steps are merged by their log-sum-exp, in
float32.

Bytes that a rank sends in one layer, for a row of S tokens, K KV heads of width D, e bytes an element: in the forward
pass ``(P-1) S/P 2 K D e``. In the backward pass as many once more for the keys and values, and ``(P-1) S/P 2 K D 4``
for their gradients, which are summed in float32 on their way: they start at the rank behind the owner and end at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcmm.errors import HpcmmError
from hpcmm.train.attention import Options
from hpcmm.train.recipes.sequence import CutRow, SequenceShards
from hpcmm.train.tiles import Attended, Attention, Gradients, Tile, add_gradients, attend, tiles_of

_KEYS, _GRADIENTS = 0, 1
"""Tags that keep the two rings of the backward pass apart."""


class Ring(SequenceShards):
    """Each rank attends with all heads of its tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.pieces = 2 * self.ranks

    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """An early piece and a late one, so that each rank has as much to see."""
        return rank, 2 * self.ranks - 1 - rank

    def attend(self, query: Tensor, key: Tensor, value: Tensor, row: CutRow, options: Options) -> Tensor:
        """Keys and values go once round the ranks."""
        if options.dropout:
            raise HpcmmError("ring attention has no dropout of attention: set attention_dropout: 0 in the network")
        plan = [self._tiles(row, (self.rank - step) % self.ranks, options.window) for step in range(self.ranks)]
        attended: Tensor = _Ring.apply(query, key, value, plan, options.scale, self.group)  # type: ignore[no-untyped-call]
        return attended.transpose(1, 2)

    def _tiles(self, row: CutRow, source: int, window: int | None) -> tuple[Tile, ...]:
        """What this rank's tokens see of those of ``source``, by their places on the two ranks."""
        known = row.tiles.get((source, window))
        if known is None:
            known = row.tiles[source, window] = tuple(self._find_tiles(row, source, window))
        return known

    def _find_tiles(self, row: CutRow, source: int, window: int | None) -> list[Tile]:
        size = row.layout.boundaries[-1] // self.pieces
        found = []
        for mine, query_piece in enumerate(self.pieces_of(self.rank)):
            for theirs, key_piece in enumerate(self.pieces_of(source)):
                queries = range(query_piece * size, (query_piece + 1) * size)
                keys = range(key_piece * size, (key_piece + 1) * size)
                ahead = (query_piece - mine) * size, (key_piece - theirs) * size
                found += [tile.moved(*ahead) for tile in tiles_of(row.layout.boundaries, queries, keys, window)]
        return found


def _pass_on(tensor: Tensor, group: dist.ProcessGroup, tag: int) -> Callable[[], Tensor]:
    """Send ``tensor`` to the next rank; what is returned waits for that of the rank before and gives it."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    received = torch.empty_like(tensor)
    passing = [
        dist.P2POp(dist.isend, tensor, group=group, tag=tag, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=(rank - 1) % ranks),
    ]
    works = dist.batch_isend_irecv(passing)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        passing.clear()  # until here it has kept what is sent
        return received

    return wait


class _Ring(torch.autograd.Function):
    """``plan[step]`` has the tiles of this rank's queries with the keys that it holds in that step."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Sequence[Sequence[Tile]], scale: float,
        group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        found = Attended.nothing(query, value)
        held = torch.stack((key, value))
        for step, tiles in enumerate(plan):
            following = _pass_on(held, group, _KEYS) if step + 1 < len(plan) else None
            attend(query, held[0], held[1], tiles, scale, found)
            if following is not None:
                held = following()
        out = found.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, found.lse)
        ctx.plan, ctx.scale, ctx.group = plan, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        own = Gradients.zero(query, key, value)
        held, travelling = torch.stack((key, value)), None
        for step, tiles in enumerate(ctx.plan):
            following = _pass_on(held, ctx.group, _KEYS) if step + 1 < len(ctx.plan) else None
            of = Attention(query, held[0], held[1], ctx.scale, out, lse)
            if step == 0:
                add_gradients(own, gradients[0], of, tiles)
            else:
                sums = torch.zeros_like(held, dtype=torch.float32)
                add_gradients(Gradients(own.query, sums[0], sums[1]), gradients[0], of, tiles)
                if travelling is not None:
                    sums += travelling()
                travelling = _pass_on(sums, ctx.group, _GRADIENTS)
            if following is not None:
                held = following()
        if travelling is not None:
            # What the rank before has sent last are the sums for this rank's own keys and values.
            home = travelling()
            own.key.add_(home[0])
            own.value.add_(home[1])
        return *(each.to(query.dtype) for each in own), None, None, None
