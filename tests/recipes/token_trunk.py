"""A tiny token model with a network of ``transformers``, for tests of what cuts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hpcmm.train.attention import NAME
from hpcmm.train.structure import NO_LABEL, Row, Structure, TokenLoss

WIDTH = 48
VOCABULARY = 64
WINDOW = 5


class Trunk(nn.Module):
    """Embedded tokens to a loss."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, embedded: Tensor, positions: Tensor, labels: Tensor) -> TokenLoss:
        logits = self.network(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0].float()
        labelled = labels[0] != NO_LABEL
        total = cross_entropy(logits, labels[0], ignore_index=NO_LABEL, reduction="sum")
        return TokenLoss(total, (logits.argmax(-1) == labels[0])[labelled])


def network(architecture: str, heads: int = 4, kv_heads: int = 2, attention: str = NAME) -> PreTrainedModel:
    """``llama``; ``qwen3`` with a sliding window in its second layer; ``mixtral`` with one in both, and experts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, "max_position_embeddings": 128,
        "attn_implementation": attention,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if architecture == "qwen3":
        window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **window))
    assert architecture == "mixtral"
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, sliding_window=WINDOW))


def structure(trunk: Trunk) -> Structure:
    """What a workload would tell of it; its rows are its batches."""
    return Structure(
        embed=lambda row: row, embedders={}, trunk=trunk, network=trunk.network, network_name="network",
        head=lambda _hidden, _labels: (_ for _ in ()).throw(AssertionError("no pipeline here")),
    )  # fmt: skip


def row(lengths: list[int], seed: int = 1, dtype: torch.dtype = torch.float32) -> Row:
    """Examples of these lengths, in tokens; some tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    labels = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
    labels[torch.rand(1, tokens, generator=generator) < 0.3] = NO_LABEL
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return Row(torch.randn(1, tokens, WIDTH, generator=generator).to(dtype), positions, labels)


def gradients(trunk: Trunk, of: Row) -> tuple[TokenLoss, dict[str, Tensor]]:
    """The loss of a row, and its gradients by name, that of what is embedded among them."""
    embedded = of.embedded.clone().requires_grad_()
    trunk.zero_grad()
    result = trunk(embedded, of.positions.clone(), of.labels)
    result.total.backward()
    found = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None} | {"embedded": embedded.grad}
    return result, {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
