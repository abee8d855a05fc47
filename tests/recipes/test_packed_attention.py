"""Attention over packed rows is that of one example at a time, without a mask over the row."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from token_trunk import WINDOW, Trunk, gradients, network, row, structure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, GptOssForCausalLM

from hpcmm.errors import HpcmmError
from hpcmm.train import attention, tiles
from hpcmm.train.attention import Layout, Options, find_layout, packed_attention
from hpcmm.train.structure import Row
from hpcmm.train.tiles import Kind, tiled_attention, tiles_of

LENGTHS = [7, 1, 20, 12]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seen(boundaries: list[int], window: int | None) -> Tensor:
    """(S, S) bool: query i sees key j."""
    token = torch.arange(boundaries[-1])
    example = torch.bucketize(token, torch.tensor(boundaries[1:]), right=True)
    mask = (example[:, None] == example) & (token[:, None] >= token)
    return mask if window is None else mask & (token > token[:, None] - window)


def examples(of: Row) -> Iterator[Row]:
    starts = [*(of.positions[0] == 0).nonzero().flatten().tolist(), of.positions.shape[1]]
    for start, stop in pairwise(starts):
        yield Row(*(each[:, start:stop] for each in of))


def attention_tensors(dtype: torch.dtype = torch.float32, tokens: int = 600, value_width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 6, tokens, 16), (1, 2, tokens, 16), (1, 2, tokens, value_width)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_a_packed_row_is_its_examples_one_at_a_time(architecture: str):
    packed, alone = Trunk(network(architecture)), Trunk(network(architecture, attention="sdpa"))
    together, of_row = gradients(packed, row(LENGTHS))
    total = torch.zeros(())
    sums: dict[str, Tensor] = {}
    embedded, correct = [], []
    for example in examples(row(LENGTHS)):
        result, found = gradients(alone, example)
        total += result.total.detach()
        correct.append(result.correct)
        embedded.append(found.pop("embedded"))
        for name, gradient in found.items():
            sums[name] = sums.get(name, 0) + gradient
    torch.testing.assert_close(together.total.detach(), total)
    assert together.correct.equal(torch.cat(correct))
    torch.testing.assert_close(of_row, sums | {"embedded": torch.cat(embedded, 1)}, atol=1e-5, rtol=1e-5)


def test_a_layer_computes_in_bf16_as_exactly_as_one_example_alone():
    alone, packed = Trunk(network("llama", attention="sdpa")), Trunk(network("llama"))
    given = row(LENGTHS, dtype=torch.bfloat16)
    total = sum(alone.to(torch.bfloat16)(*example).total for example in examples(given))
    torch.testing.assert_close(packed.to(torch.bfloat16)(*given).total, total, atol=0, rtol=1e-5)


def test_no_pair_of_tokens_is_in_two_tiles_or_in_none():
    choose = random.Random(0)  # noqa: S311 -- it only chooses sizes
    for _ in range(500):
        tokens = choose.randint(1, 40)
        boundaries, cuts = (
            sorted({0, tokens, *choose.sample(range(tokens), choose.randint(0, min(4, tokens - 1)))}) for _ in "ab"
        )
        window = choose.choice([None, 1, 2, 3, 5, 9])
        counted = torch.zeros(tokens, tokens, dtype=torch.long)
        pieces = [range(start, stop) for start, stop in pairwise(cuts)]
        for tile in (t for queries in pieces for keys in pieces for t in tiles_of(boundaries, queries, keys, window)):
            ones = torch.ones_like(counted[tile.queries, tile.keys])
            assert ones.numel()
            shape = {Kind.FULL: ones, Kind.CAUSAL: ones.tril(), Kind.ANTICAUSAL: ones.triu()}[tile.kind]
            counted[tile.queries, tile.keys] += shape
        assert counted.equal(seen(boundaries, window).long()), (boundaries, cuts, window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("value_width", [16, 12])  # no kernel takes values of another width
def test_tiles_give_what_a_mask_gives(window: int | None, value_width: int):
    boundaries = [0, 30, 31, 50, 64, 600]
    tensors = attention_tensors(value_width=value_width)
    expected = scaled_dot_product_attention(*tensors, attn_mask=seen(boundaries, window), scale=0.3, enable_gqa=True)
    found = tiled_attention(*tensors, tuple(tiles_of(boundaries, range(600), range(600), window)), 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, tensors, upstream),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_a_window_in_bf16_is_merged_in_float32():
    boundaries = (0, 30, 600)
    exact = [each.float().detach() for each in attention_tensors(torch.bfloat16)]
    layout, options = Layout(boundaries, torch.device("cpu")), Options(0.3, 7, 0.0)
    found = packed_attention(*(each.to(torch.bfloat16) for each in exact), layout, options)
    torch.testing.assert_close(found.float(), packed_attention(*exact, layout, options), atol=0.02, rtol=0.02)


def test_the_formulas_for_gpus_without_a_kernel_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch):
    boundaries = [0, 30, 600]
    tensors = attention_tensors()
    pieces = tuple(tiles_of(boundaries, range(600), range(600), 200))
    kernel = tiled_attention(*tensors, pieces, 0.3)
    monkeypatch.setattr(tiles, "_cpu_kernel", lambda _query, _value: False)
    formulas = tiled_attention(*tensors, pieces, 0.3)
    torch.testing.assert_close(formulas, kernel)
    upstream = torch.randn_like(kernel)
    by_formulas = torch.autograd.grad(formulas, tensors, upstream)
    monkeypatch.undo()
    torch.testing.assert_close(by_formulas, torch.autograd.grad(kernel, tensors, upstream), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_is_looked_at_once_for_all_layers(checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    looks = []
    monkeypatch.setattr(attention.layout_of, "_find", lambda positions: looks.append(1) or find_layout(positions))
    trunk = Trunk(network("llama")).train()
    if checkpointing:
        structure(trunk).checkpoint_activations()
    for number in (1, 2):
        gradients(trunk, row(LENGTHS))
        assert len(looks) == number


def test_a_row_that_was_changed_in_place_is_looked_at_again():
    positions = row(LENGTHS).positions
    assert attention.layout_of(positions).lengths == LENGTHS
    positions[:, 3] = 0
    assert attention.layout_of(positions).lengths == [3, 4, 1, 20, 12]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(e.numel() for e in tree_leaves(result) if isinstance(e, Tensor))])
        return result


@pytest.mark.parametrize("window", [None, 100])
def test_no_tensor_grows_with_the_square_of_the_row(window: int | None):
    tensors = attention_tensors(tokens=3000)
    with LargestTensor() as largest:
        layout = Layout((0, 900, 3000), torch.device("cpu"))
        packed_attention(*tensors, layout, Options(0.3, window, 0.0)).sum().backward()
    assert largest.elements <= max(each.numel() for each in tensors)


def test_dropout_drops_some_of_what_is_attended_to():
    tensors = attention_tensors()
    layout = Layout((0, 600), torch.device("cpu"))
    dropped = packed_attention(*tensors, layout, Options(0.3, None, 0.5))
    assert not torch.allclose(dropped, packed_attention(*tensors, layout, Options(0.3, None, 0.0)))
    with pytest.raises(HpcmmError, match=r"a sliding window of 7 tokens with dropout .* set attention_dropout: 0"):
        packed_attention(*tensors, layout, Options(0.3, 7, 0.5))


def test_what_is_not_supported_is_refused_with_the_remedy():
    model = network("llama")
    given = row(LENGTHS)
    with pytest.raises(HpcmmError, match="begin with 0, not 3: count them from each example's start"):
        model(inputs_embeds=given.embedded, position_ids=given.positions + 3, use_cache=False)
    with pytest.raises(HpcmmError, match="takes no attention mask: call the network with position_ids alone"):
        model(inputs_embeds=given.embedded, attention_mask=torch.ones(1, 1, 40, 40), position_ids=given.positions)
    with pytest.raises(HpcmmError, match=r"the shape \(1, tokens\), not \(2, 5\)"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long), position_ids=torch.arange(5).expand(2, 5))
    cache = model(inputs_embeds=given.embedded, position_ids=given.positions, use_cache=True).past_key_values
    with pytest.raises(HpcmmError, match=r"41 and 1 as in generation .* attn_implementation='sdpa'"):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    sinks = GptOssConfig(
        vocab_size=8, hidden_size=48, intermediate_size=8, num_hidden_layers=1, num_attention_heads=6, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, attn_implementation="hpcmm",
    )  # fmt: skip
    with pytest.raises(HpcmmError, match="does not support attention sinks: train another architecture"):
        GptOssForCausalLM(sinks)(inputs_embeds=given.embedded, position_ids=given.positions, use_cache=False)


def test_the_window_of_a_network_counts_its_own_token():
    trunk = Trunk(network("mixtral"))
    given = row([20])
    changed = Row(given.embedded.clone(), given.positions, given.labels)
    changed.embedded[0, 0] += 1
    first, second = (
        trunk.network(inputs_embeds=each.embedded, position_ids=each.positions, use_cache=False).logits[0]
        for each in (given, changed)
    )
    # Two layers hand on what the first token says by WINDOW - 1 tokens each.
    assert (first - second).abs().amax(-1).gt(1e-7).tolist() == [place <= 2 * (WINDOW - 1) for place in range(20)]
