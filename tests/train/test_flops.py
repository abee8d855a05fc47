"""Floating-point operations: the formula against PyTorch's counter, parts that do not train, and peaks of GPUs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hpcmm.config.model_shape import ModelShape
from hpcmm.train.flops import MeasuredFlops, TransformerFlops, forward_flops
from hpcmm.train.peaks import peak_flops

SHAPE = ModelShape(layers=3, width=64, heads=4, kv_heads=2, head_width=16, intermediate=96, vocabulary=100)
LENGTH = 32


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def counted(model, backward: bool) -> int:
    tokens = torch.zeros((1, LENGTH), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def test_the_formula_is_what_pytorch_counts(llama) -> None:
    flops = forward_flops(SHAPE, [LENGTH])
    # Without a mask PyTorch computes all pairs of tokens; half of them, and the diagonal, are needed.
    all_pairs = flops.attention * 2 * LENGTH / (LENGTH + 1)
    assert counted(llama, backward=False) == flops.linear + flops.head + all_pairs
    assert counted(llama, backward=True) == 3 * (flops.linear + flops.head + all_pairs)


def test_attention_is_quadratic_in_each_example_and_all_else_linear() -> None:
    packed, alone, longer = (forward_flops(SHAPE, lengths) for lengths in ([16, 16], [16], [32]))
    assert packed.attention == 2 * alone.attention
    assert longer.attention > 3.5 * alone.attention
    assert packed.linear == longer.linear == 2 * alone.linear


def test_each_token_goes_through_its_own_experts_alone() -> None:
    mixed = ModelShape(**{**vars(SHAPE), "experts": 8, "experts_per_token": 2})
    more = forward_flops(mixed, [1]).linear - forward_flops(SHAPE, [1]).linear
    assert more == 3 * (2 * 3 * 64 * 96 + 2 * 64 * 8), "a second expert and the router, in three layers"


def test_logits_count_where_a_label_needs_them() -> None:
    assert forward_flops(SHAPE, [LENGTH], labels=4).head == 4 * 2 * 64 * 100


def test_what_does_not_train_costs_less(llama) -> None:
    connector = nn.Linear(8, 64)

    def flops(*, network: bool, before: bool, recomputes: bool = False):
        llama.requires_grad_(network)
        connector.requires_grad_(before)
        return TransformerFlops.of(SHAPE, llama, [connector], recomputes=recomputes).of_examples([LENGTH], None)

    forward = forward_flops(SHAPE, [LENGTH])
    linear = forward.linear + forward.head
    assert flops(network=True, before=False).model == 3 * (linear + forward.attention)
    assert flops(network=False, before=True).model == 2 * linear + 3 * forward.attention
    assert flops(network=False, before=False).model == linear + forward.attention
    again = flops(network=True, before=True, recomputes=True)
    assert again.hardware - again.model == forward.linear + forward.attention
    llama.requires_grad_(True)


def test_any_module_is_measured_and_then_counted_in_proportion_to_its_input() -> None:
    module = nn.Linear(10, 5, bias=False)
    measured = MeasuredFlops([module])
    module(torch.ones(7, 10))
    assert measured.take() == 0, "no step"
    measured.counts = True
    each = 3 * 2 * 10 * 5
    taken = []
    for rows in (4, 4, 2, 6, 8, 1):
        module(torch.ones(rows, 10)).sum().backward()
        taken.append(measured.take())
    assert taken == [0, 4 * each, 2 * each, 6 * each, 8 * each, each]
    module.requires_grad_(False)


def test_a_frozen_module_costs_its_forward_pass_alone() -> None:
    module = nn.Linear(10, 5, bias=False).requires_grad_(False)
    measured = MeasuredFlops([module])
    measured.counts = True
    for _ in range(3):
        module(torch.ones(4, 10))
    assert measured.take() == 2 * (4 * 2 * 10 * 5), "all but the first pass"


def test_a_module_that_fails_leaves_no_counter_behind() -> None:
    module = nn.Linear(10, 5)
    measured = MeasuredFlops([module])
    measured.counts = True
    module(torch.ones(1, 10))
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 9))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_gpus_peak_depends_on_its_kind_and_the_precision() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA GH200 480GB", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H200 NVL", "bf16") == 835.5e12
    assert peak_flops("NVIDIA GB200", "bf16") == 2500e12
    assert peak_flops("NVIDIA B200", "bf16") == 2250e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA A10", "fp32") == pytest.approx(31.2e12)
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None, "it has none"
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362.05e12
    assert peak_flops("NVIDIA GeForce GTX 1080", "fp16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_flops("NVIDIA L40S", "fp8") == 733e12
    assert peak_flops("NVIDIA H200", "fp8") == pytest.approx(2 * 989.4e12, rel=1e-3), "twice that of bf16"
