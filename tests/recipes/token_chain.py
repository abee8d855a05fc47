"""A tiny model of tokens with an encoder, a connector and a network of ``transformers``, and its training on rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hpcmm.train.attention import NAME as ATTENTION
from hpcmm.train.structure import NO_LABEL, Row, Structure, TokenLoss
from hpcmm.train.workload import Training

WIDTH, VOCABULARY, IMAGE = 16, 48, 6
NETWORKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 4}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    ),
}


def network_of(kind: str, *, layers: int = 4, tied: bool = False, **more: Any) -> PreTrainedModel:
    model, config, own = NETWORKS[kind]
    more = {**own, **more}
    return model(
        config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
            attn_implementation=ATTENTION, **more,
        )
    )  # fmt: skip


@dataclass
class Batch:
    """A packed row; the first two tokens of each example stand for its image."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    images: Tensor


class Trunk(nn.Module):
    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.lm = network

    def forward(self, embedded: Tensor, positions: Tensor, labels: Tensor) -> TokenLoss:
        states = self.lm.model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        return self.head(states, labels)

    def head(self, states: Tensor, labels: Tensor) -> TokenLoss:
        labelled = labels[0] != NO_LABEL
        logits, truth = self.lm.lm_head(states[0][labelled]).float(), labels[0][labelled]
        total = functional.cross_entropy(logits, truth, reduction="sum")
        return TokenLoss(total, logits.detach().argmax(-1) == truth)


class TokenModel(nn.Module):
    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = Trunk(network)
        self.encoder = nn.Sequential(nn.Linear(IMAGE, 12), nn.GELU())
        self.connector = nn.Linear(12, WIDTH)

    def forward(self, batch: Batch) -> TokenLoss:
        return self.trunk(*self.embed(batch))

    def embed(self, batch: Batch) -> Row:
        row = self.trunk.lm.get_input_embeddings()(batch.tokens)[0]
        seen = self.connector(self.encoder(batch.images.to(self.connector.weight.dtype)))
        starts = (batch.positions[0] == 0).nonzero()[:, 0]
        places = torch.stack([starts, starts + 1], dim=1).flatten()
        return Row(row.index_copy(0, places, seen.to(row.dtype))[None], batch.positions, batch.labels)


class TokenTraining(Training):
    """``config``: a RunConfig; the rest as the keywords say."""

    def __init__(self, config: Any, device: torch.device, **options: Any) -> None:
        torch.manual_seed(options.pop("seed", 7))
        router_loss, elsewhere = options.pop("router_loss", False), options.pop("elsewhere", False)
        kind, examples = options.pop("kind", "llama"), config.train.micro_batch_size
        frozen, lora = options.pop("frozen", ""), options.pop("lora", False)
        self.model = TokenModel(network_of(kind, **options)).to(device)
        torch.manual_seed(1)
        self.model.encoder[0].reset_parameters()  # of its own file, whatever the seed
        self.model.trunk.lm.config.output_router_logits = router_loss
        if elsewhere:
            self.model.scale = nn.Parameter(torch.ones(1))
        for name, parameter in self.model.named_parameters():
            if any(name.startswith(each) for each in frozen.split()):
                parameter.requires_grad_(False)
        if lora:
            from peft import LoraConfig, inject_adapter_in_model

            kept = [each for each in self.model.parameters() if each.requires_grad]
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), self.model.trunk.lm)
            for each in kept:
                each.requires_grad_(not any(each is own for own in self.model.trunk.lm.parameters()))
            for name, each in self.model.named_parameters():
                if "lora_B" in name:  # zeros by default, through which no gradient comes to the other factor
                    nn.init.normal_(each, std=0.1)
        self.examples = examples

    def batches(self, rank: int, world_size: int, first: int) -> Iterator[Batch]:
        while True:
            yield random_row(first * world_size + rank, self.examples)
            first += 1

    def loss(self, engine: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return engine(batch).total, {}

    def tokens(self, batch: Batch) -> int:
        return int((batch.labels != NO_LABEL).sum())

    def structure(self) -> Structure:
        model = self.model
        assert isinstance(model, TokenModel)
        return Structure(
            embed=model.embed, embedders={"encoder": model.encoder, "connector": model.connector}, trunk=model.trunk,
            network=model.trunk.lm, network_name="trunk.lm", head=model.trunk.head,
        )  # fmt: skip


def random_row(number: int, examples: int) -> Batch:
    """Rows differ in length, by number."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(3, 12, (examples,), generator=generator).tolist()
    tokens = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = torch.randint(0, VOCABULARY, tokens.shape, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = NO_LABEL
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(tokens, positions, labels, torch.randn(2 * examples, IMAGE, generator=generator))
