"""Sequence parallelism: each packed row is cut between the ranks of a group, and only attention looks across the cuts.

:func:`shard_sequence` does it to a trunk and its network, by Ulysses or by ring attention (``ring.py``):

- Ulysses (Jacobs et al., "DeepSpeed Ulysses", 2023): before attention an all-to-all gives each rank all tokens of some
  heads, after it another gives each rank all heads of its tokens. The heads must divide by the ranks. KV heads need
  not: a KV head goes to each rank that has one of its query heads. DeepSpeed's own form drops the boundaries of
  examples, gathers the positions in every layer and cannot cut 3 KV heads in two, so it is not used.
- Ring: for networks whose heads do not divide, and rows that are long enough to hide the passing on.

Bytes that a rank sends in one layer, for a row of S tokens on P ranks, H heads and K KV heads of width D, e bytes an
element: Ulysses sends ``S (P-1)/P^2 (H + 2K) D e`` before attention and ``S (P-1)/P^2 H D e`` after it, and as many in
the backward pass. If KV heads are repeated, K is the sum of all ranks' KV heads. For the ring see ``ring.py``.

**Scale of the loss.** Each rank has all parameters (or their ZeRO part over data x sequence), and its gradient is only
that of its own tokens, for the encoders and the embedding too. So gradients must be *summed* over the group. DeepSpeed
is told of no sequence axis (no ``mpu``), so that all ranks of data x sequence are data ranks to it, and it averages
over all of them at every ZeRO stage: multiply each rank's local sum by data x sequence, and divide by the labelled
tokens of all rows of the step. (If DeepSpeed knew of the axis, it would divide by ``data`` at ZeRO 0 to 2, but by data
x sequence at ZeRO 3, and reduce the gradients of a bf16 model in float32.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hpcmm.config.schema import SequenceAttention
from hpcmm.errors import HpcmmError
from hpcmm.train.attention import Layout, Options, PerPositions, find_layout, options_of, packed_attention
from hpcmm.train.structure import NO_LABEL, Row, Structure, TokenLoss
from hpcmm.train.tiles import Tile

_numbers = count()


@dataclass(frozen=True)
class CutRow:
    """A row that is cut."""

    layout: Layout
    """Of the whole row, with its filler."""
    tiles: dict[tuple[int, int | None], tuple[Tile, ...]] = field(default_factory=dict)
    """What this rank's tokens see of another rank's, by that rank and the sliding window; filled as it is asked for."""


class SequenceShards(ABC):
    """Rows of a trunk, cut between the ranks of ``group``. Made by :func:`shard_sequence`."""

    pieces: int
    """A row is cut into so many pieces of one length."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.row_of = PerPositions(self._find_row)
        self._labels: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """Which pieces of a row a rank has, in the order in which it holds them."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, row: CutRow, options: Options) -> Tensor:
        """Attention of this rank's tokens to the whole row: (1, tokens, heads, D) of (1, heads, tokens, D)."""

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor (1, S, ...) whose S divides."""
        parts = whole.chunk(self.pieces, dim=1)
        mine = [parts[piece] for piece in self.pieces_of(self.rank)]
        return mine[0] if len(mine) == 1 else torch.cat(mine, dim=1)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of a tensor (1, tokens, ...) of which each rank has its part; no gradients."""
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        pieces: list[Tensor] = [part] * self.pieces
        for rank, received in enumerate(parts):
            places = self.pieces_of(rank)
            for piece, tensor in zip(places, received.chunk(len(places), dim=1), strict=True):
                pieces[piece] = tensor
        return torch.cat(pieces, dim=1)

    def install(self, structure: Structure) -> None:
        """Cut what the trunk takes, and replace the network's attention."""
        trunk, network = structure.trunk, structure.network
        before = trunk.register_forward_pre_hook(self._cut_row)
        after = trunk.register_forward_hook(self._whole_result)
        self._undo += [before.remove, after.remove]
        name = f"hpcmm_{type(self).__name__.lower()}_{next(_numbers)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._attention)
        was = network.config._attn_implementation
        network.set_attn_implementation(name)
        self._undo.append(lambda: network.set_attn_implementation(was))

    def remove(self) -> None:
        """Leave the trunk and its network as they were."""
        while self._undo:
            self._undo.pop()()

    def _find_row(self, positions: Tensor) -> CutRow:
        """The row from this rank's positions, if they are a copy of those that were cut.

        DeepSpeed's checkpointing makes such copies. All ranks make them alike, so all come here together.
        """
        return CutRow(find_layout(self.gather(positions)))

    def _cut_row(self, _trunk: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> Row:
        """This rank's part of what the trunk takes, a whole row.

        Filler makes S divide: tokens that are examples of their own and foretell nothing. Nobody attends to them.
        """
        row = Row(*arguments)
        filler = -row.positions.shape[1] % self.pieces
        positions = functional.pad(row.positions, (0, filler), value=0)
        self._labels = functional.pad(row.labels, (0, filler), value=NO_LABEL)
        mine = self.cut(positions)
        self.row_of.set(mine, CutRow(find_layout(positions)))
        return Row(self.cut(functional.pad(row.embedded, (0, 0, 0, filler))), mine, self.cut(self._labels))

    def _whole_result(self, _trunk: nn.Module, _arguments: tuple[Any, ...], result: TokenLoss) -> TokenLoss:
        """Without gradients the loss of the whole row on each rank; with them, that of the rank's own tokens."""
        labels, self._labels = self._labels, None
        if torch.is_grad_enabled() or labels is None:
            return result
        total = result.total.clone()
        dist.all_reduce(total, group=self.group)
        labelled = labels[0] != NO_LABEL
        places = torch.arange(labels.shape[1], device=labels.device).unsqueeze(0)
        correct = torch.zeros(labels.shape[1], dtype=torch.uint8, device=labels.device)
        correct[self.cut(places)[0, self.cut(labelled.unsqueeze(0))[0]]] = result.correct.to(torch.uint8)
        dist.all_reduce(correct, group=self.group)
        return TokenLoss(total, correct[labelled].bool())

    def _attention(
        self,
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
        if query.shape[-1] != value.shape[-1]:
            raise HpcmmError(
                f"{type(module).__name__}: heads of width {query.shape[-1]} with values of width {value.shape[-1]} "
                "cannot be cut along the sequence: set parallel.mesh.sequence=1"
            )
        return self.attend(query, key, value, self.row_of(positions), options), None


class Ulysses(SequenceShards):
    """Each rank attends with some of the heads."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.pieces = self.ranks

    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """One piece a rank, in order."""
        return (rank,)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, row: CutRow, options: Options) -> Tensor:
        """All-to-all, attention of this rank's heads over the whole row, all-to-all."""
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
        if heads % self.ranks:
            raise HpcmmError(
                f"{heads} attention heads cannot be shared between {self.ranks} ranks: set parallel.attention=ring, or "
                "parallel.mesh.sequence to a divisor of the heads"
            )
        mine, shares = heads // self.ranks, kv_shares(heads, kv_heads, self.ranks)
        sent = _interleaved(query, key, value, mine, shares)
        taken = mine + 2 * len(shares[self.rank])
        tokens = query.shape[2]
        received = exchange(
            sent.flatten(),
            [(mine + 2 * len(share)) * tokens * width for share in shares],
            [taken * tokens * width] * self.ranks,
            self.group,
        )
        whole = received.view(self.ranks, taken, tokens, width).transpose(0, 1).reshape(1, taken, -1, width)
        own = torch.split(whole, [mine, len(shares[self.rank]), len(shares[self.rank])], dim=1)
        attended = packed_attention(own[0], *self._grouped(own[1], own[2], heads, kv_heads), row.layout, options)
        sizes = [tokens * mine * width] * self.ranks
        back = exchange(attended.flatten(), sizes, sizes, self.group)
        return back.view(self.ranks, tokens, mine, width).transpose(0, 1).reshape(1, tokens, heads, width)

    def _grouped(self, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values so that each KV head here serves as many query heads; else one for each query head."""
        mine, group = heads // self.ranks, heads // kv_heads
        first = self.rank * mine
        serves = [(first + head) // group - first // group for head in range(mine)]
        share = mine // key.shape[1]
        if serves == [head // share for head in range(mine)]:
            return key, value
        index = torch.tensor(serves, device=key.device)
        return key.index_select(1, index), value.index_select(1, index)


def kv_shares(heads: int, kv_heads: int, ranks: int) -> list[range]:
    """For each rank, the KV heads of its query heads; some go to several ranks if they do not divide."""
    mine, group = heads // ranks, heads // kv_heads
    return [range(rank * mine // group, ((rank + 1) * mine - 1) // group + 1) for rank in range(ranks)]


def _interleaved(query: Tensor, key: Tensor, value: Tensor, mine: int, shares: Sequence[range]) -> Tensor:
    """(all heads that are sent, tokens, D): for each rank in turn its query heads, KV heads of keys, of values."""
    wanted = [head for share in shares for head in share]
    key, value = key[0], value[0]
    if wanted != list(range(key.shape[0])):
        index = torch.tensor(wanted, device=key.device)
        key, value = key.index_select(0, index), value.index_select(0, index)
    sizes = [len(share) for share in shares]
    parts = zip(torch.split(query[0], mine), torch.split(key, sizes), torch.split(value, sizes), strict=True)
    return torch.cat([part for of_rank in parts for part in of_rank])


class _Exchange(torch.autograd.Function):
    """An all-to-all whose backward pass is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, to: list[int], of: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (of, to), group
        return _all_to_all(sent, to, of, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to, of = ctx.sizes
        return _all_to_all(gradients[0], to, of, ctx.group), None, None, None


def _all_to_all(sent: Tensor, to: list[int], of: list[int], group: dist.ProcessGroup) -> Tensor:
    received = sent.new_empty(sum(of))
    dist.all_to_all_single(received, sent.contiguous(), of, to, group=group)
    return received


def exchange(sent: Tensor, to: list[int], of: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all with gradients: ``to[r]`` elements of the flat ``sent`` go to rank r, ``of[r]`` come from it."""
    received: Tensor = _Exchange.apply(sent, to, of, group)  # type: ignore[no-untyped-call]
    return received


def shard_sequence(structure: Structure, group: dist.ProcessGroup, attention: SequenceAttention) -> SequenceShards:
    """Cut the rows of the trunk between the ranks of ``group``, all of which must get the same rows.

    With gradients the trunk gives the loss of the rank's own tokens, without them that of the whole row, by its places.
    Filler passes through the network, so a loss that counts how experts are used sees it.
    """
    from hpcmm.train.recipes.ring import Ring  # noqa: PLC0415 -- it is one of these shards

    forms = {SequenceAttention.ulysses: Ulysses, SequenceAttention.ring: Ring}
    shards: SequenceShards = forms[attention](group)
    shards.install(structure)
    return shards
