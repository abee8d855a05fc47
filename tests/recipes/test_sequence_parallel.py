"""A row that is cut between ranks gives the loss and the gradients of one process, by Ulysses and by ring attention.

Four processes do all of it once: in two groups of two ranks, and in one of four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from real_ranks import run_ranks
from token_trunk import Trunk, gradients, network, row, structure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcmm.config.schema import SequenceAttention
from hpcmm.errors import HpcmmError
from hpcmm.train.attention import find_layout
from hpcmm.train.recipes.ring import Ring
from hpcmm.train.recipes.sequence import CutRow, Ulysses, kv_shares, shard_sequence
from hpcmm.train.structure import Row

RANKS = 4
ULYSSES, RING = SequenceAttention.ulysses, SequenceAttention.ring
LENGTHS = [7, 1, 22, 13]
"""43 tokens: filler is needed. The third example lies on all of two ranks, and on three of four."""
ALONE = [1, 1]
"""Fewer tokens than ranks: some have nothing but filler."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of a gradient's largest element. bf16 has 8 bits, and the layers' gradients are rounded to it on each rank."""

HEADS = {ULYSSES: [(4, 4), (4, 2), (4, 1), (12, 3)], RING: [(4, 4), (4, 2), (4, 1), (3, 3), (6, 3), (3, 1)]}
"""Heads and KV heads. Between two ranks 3 KV heads cannot be divided, and of 12 heads 4 share each."""

Check = Callable[[dist.ProcessGroup], None]


def compare(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert result.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.float().abs().max().item()
        torch.testing.assert_close(
            result[name], gradient, atol=tolerance * scale + 1e-7, rtol=0, msg=lambda m, n=name: n + m
        )


def summed(found: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """What the optimizer gets: the ranks' gradients together."""
    sums = {name: gradient.float() for name, gradient in sorted(found.items())}
    for gradient in sums.values():
        dist.all_reduce(gradient, group=group)
    return {name: gradient.to(found[name].dtype) for name, gradient in sums.items()}


def as_one_process(trunk: Trunk, given: Row, form: SequenceAttention, group: dist.ProcessGroup) -> None:
    """Loss and gradients of ``given``, with and without gradients, are those without cutting."""
    dtype = given.embedded.dtype
    loss = {torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    expected, of_one = gradients(trunk, given)
    shards = shard_sequence(structure(trunk), group, form)
    try:
        mine, of_rank = gradients(trunk, given)
        with torch.no_grad():
            whole = trunk(*given)
    finally:
        shards.remove()
    total = mine.total.detach().clone()
    dist.all_reduce(total, group=group)
    for each in (total, whole.total):
        torch.testing.assert_close(each, expected.total.detach(), rtol=loss, atol=1e-6)
    assert whole.correct.shape == expected.correct.shape
    assert dtype is torch.bfloat16 or whole.correct.equal(expected.correct)
    # Ranks without a label may have no gradient for an expert that none of their tokens chose.
    compare(
        summed({n: of_rank.get(n, torch.zeros_like(g)) for n, g in of_one.items()}, group), of_one, TOLERANCE[dtype]
    )


def network_check(form: SequenceAttention, architecture: str, heads: tuple[int, int], dtype: torch.dtype) -> Check:
    def check(group: dist.ProcessGroup) -> None:
        trunk = Trunk(network(architecture, *heads)).to(dtype).train()
        as_one_process(trunk, row(LENGTHS, dtype=dtype), form, group)

    return check


def recomputed(form: SequenceAttention) -> Check:
    def check(group: dist.ProcessGroup) -> None:
        trunk = Trunk(network("qwen3")).train()
        structure(trunk).checkpoint_activations()
        as_one_process(trunk, row(LENGTHS), form, group)

    return check


def tiny_row(form: SequenceAttention) -> Check:
    return lambda group: as_one_process(Trunk(network("llama")), row(ALONE), form, group)


def copied_positions(form: SequenceAttention) -> Check:
    """What recomputes layers may copy what they take: the layers see other tensors than those that were cut."""

    def copied(_module: Any, _args: tuple[()], given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        return (), given | {"position_ids": given["position_ids"].clone()}

    def check(group: dist.ProcessGroup) -> None:
        trunk = Trunk(network("qwen3"))
        trunk.network.register_forward_pre_hook(copied, with_kwargs=True)
        as_one_process(trunk, row(LENGTHS), form, group)

    return check


class SentBytes(TorchDispatchMode):
    """What this rank sends to others by the operators of the ``c10d`` library."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d.alltoall_base_"):
            _, sent, _, _, sizes, *_ = args
            self.bytes += (sum(sizes) - sizes[self.rank]) * sent.element_size()
        elif name.startswith("c10d.send"):
            self.bytes += sum(each.numel() * each.element_size() for each in args[0])
        elif name.startswith("c10d."):
            assert name.startswith("c10d.recv_"), name
        return func(*args, **(kwargs or {}))


def textbook_bytes(form: SequenceAttention, dtype: torch.dtype) -> Check:
    def check(group: dist.ProcessGroup) -> None:
        heads, kv_heads, width, layers, tokens = 4, 4, 8, 2, 48
        ranks, size = dist.get_world_size(group), torch.finfo(dtype).bits // 8
        trunk = Trunk(network("llama", heads, kv_heads)).to(dtype)
        shards = shard_sequence(structure(trunk), group, form)
        given = row([tokens], dtype=dtype)
        sent = SentBytes(dist.get_rank(group))
        with sent:
            result = trunk(given.embedded.requires_grad_(), given.positions, given.labels)
        forward, sent.bytes = sent.bytes, 0
        with sent:
            result.total.backward()
        shards.remove()
        if form is ULYSSES:
            expected = tokens * (ranks - 1) // ranks**2 * (2 * heads + 2 * kv_heads) * width * size * layers
            assert (forward, sent.bytes) == (expected, expected)
        else:
            elements = (ranks - 1) * tokens // ranks * 2 * kv_heads * width * layers
            assert (forward, sent.bytes) == (elements * size, elements * (size + 4))

    return check


def refusals(group: dist.ProcessGroup) -> None:
    trunk = Trunk(network("llama", 3, 3))
    shards = shard_sequence(structure(trunk), group, ULYSSES)
    with pytest.raises(HpcmmError, match=r"3 attention heads cannot be shared .* parallel.attention=ring"):
        trunk(*row(LENGTHS))
    shards.remove()
    trunk.network.config.attention_dropout = 0.1
    for layer in trunk.network.model.layers:
        layer.self_attn.attention_dropout = 0.1
    shards = shard_sequence(structure(trunk.train()), group, RING)
    with pytest.raises(HpcmmError, match="no dropout of attention: set attention_dropout: 0"):
        trunk(*row(LENGTHS))
    shards.remove()


def even_work(group: dist.ProcessGroup) -> None:
    """Each rank of a ring sees as many keys, within a tile's rounding, and they are all of the triangle."""
    shards = Ring(group)
    tokens = 16 * shards.pieces
    plan = CutRow(find_layout(torch.arange(tokens).unsqueeze(0)))
    pairs = torch.zeros(shards.ranks, dtype=torch.long)
    for source in range(shards.ranks):
        for tile in shards._tiles(plan, source, None):
            rows, columns = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
            pairs[shards.rank] += rows * columns if tile.kind.name == "FULL" else rows * (rows + 1) // 2
    dist.all_reduce(pairs, group=group)
    assert pairs.sum() == tokens * (tokens + 1) // 2
    assert pairs.max() == pairs.min()


def gathered_again(group: dist.ProcessGroup) -> None:
    whole = torch.arange(48).unsqueeze(0)
    for shards in (Ring(group), Ulysses(group)):
        assert shards.gather(shards.cut(whole)).equal(whole)


CHECKS: dict[str, Check] = {
    **{
        f"{form}: {architecture}, {heads} heads, {kv} KV heads, float32": network_check(
            form, architecture, (heads, kv), torch.float32
        )
        for form, sizes in HEADS.items()
        for architecture in ("llama", "qwen3", "mixtral")
        for heads, kv in (sizes if architecture == "llama" else sizes[1:2])
    },
    **{f"{form}: bf16": network_check(form, "qwen3", (4, 2), torch.bfloat16) for form in HEADS},
    **{f"{form}: layers recomputed": recomputed(form) for form in HEADS},
    **{f"{form}: fewer tokens than ranks": tiny_row(form) for form in HEADS},
    **{f"{form}: positions copied": copied_positions(form) for form in HEADS},
    **{
        f"{form}: bytes as in the textbook, {str(dtype)[6:]}": textbook_bytes(form, dtype)
        for form in HEADS
        for dtype in TOLERANCE
    },
    "what is refused": refusals,
    "ring: as much work for each rank": even_work,
    "a cut tensor gathered again": gathered_again,
}


def all_checks(rank: int) -> None:
    """Raises the first failure; whoever started the ranks ends the others, which may wait for this one."""
    torch.set_num_threads(1)
    halves, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    for name, check in CHECKS.items():
        for group in (halves, dist.group.WORLD):
            try:
                check(group)
            except Exception as error:
                error.add_note(f"{name}, {dist.get_world_size(group)} ranks, on rank {rank}")
                raise


def test_a_row_cut_between_ranks_gives_what_one_process_gives():
    run_ranks(RANKS, all_checks)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(4, 4, 2), (12, 3, 2), (12, 3, 4), (8, 1, 8), (6, 3, 6)])
def test_each_rank_gets_the_kv_heads_of_its_query_heads(heads: int, kv_heads: int, ranks: int):
    for rank, share in enumerate(kv_shares(heads, kv_heads, ranks)):
        mine = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        assert list(share) == sorted({head // (heads // kv_heads) for head in mine})
