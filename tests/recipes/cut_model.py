"""A tiny token model with an encoder, for the recipes that cut models, and what one process makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from hpcmm.train.structure import NO_LABEL, Row, Structure, TokenLoss
from hpcmm.train.workload import Training

VOCABULARY, WIDTH = 64, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
EXPERTS = {**SIZES, "num_experts_per_tok": 2}


def network(kind: str) -> nn.Module:
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    if kind == "tied":
        fewer = {**SIZES, "num_key_value_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fewer, tie_word_embeddings=True))
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8))
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, num_local_experts=4))
    sizes = {**EXPERTS, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}
    norm = kind == "qwen3_moe"
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, norm_topk_prob=norm, decoder_sparse_step=1)
    )


class Encoder(nn.Module):
    """Named like maps of a language model, which it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 16)
        self.down_proj = nn.Linear(16, WIDTH)
        self.seen = 0

    def forward(self, things: list[torch.Tensor]) -> torch.Tensor:
        self.seen += len(things)
        return self.down_proj(functional.gelu(self.q_proj(torch.cat(list(things)).to(self.q_proj.weight.dtype))))


class Trunk(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lm = network(kind)

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> TokenLoss:
        options = {"output_router_logits": True} if getattr(self.lm.config, "output_router_logits", False) else {}
        found = self.lm.model(inputs_embeds=embedded, position_ids=positions, use_cache=False, **options)
        loss = self.head(found.last_hidden_state, labels)
        if options:
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            config = self.lm.config
            extra = load_balancing_loss_func(found.router_logits, config.num_local_experts, 2)
            loss = loss._replace(total=loss.total + 0.5 * extra * (labels != NO_LABEL).sum())
        return loss

    def head(self, states: torch.Tensor, labels: torch.Tensor) -> TokenLoss:
        labelled = labels[0] != NO_LABEL
        logits = self.lm.lm_head(states[0][labelled]).float()
        truth = labels[0][labelled]
        total = functional.cross_entropy(logits, truth, reduction="sum")
        return TokenLoss(total, logits.detach().argmax(-1) == truth)


@dataclass
class Batch:
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    things: list[torch.Tensor]
    places: torch.Tensor


def batch(number: int) -> Batch:
    """A row of two examples, with none to three things of any size. Rows are of different lengths."""
    draw = torch.Generator().manual_seed(100 + number)
    length = 20 + 2 * (number % 4)
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=draw)
    labels = tokens.roll(-1)
    labels[0, : 3 + number % 3] = NO_LABEL
    positions = torch.cat([torch.arange(8), torch.arange(length - 8)])[None]
    things = [torch.randn(1 + (number + each) % 3, 6, generator=draw) for each in range(1 + number % 3)]
    places = torch.randperm(length, generator=draw)[: sum(map(len, things))]
    return Batch(tokens, positions, labels, things, places)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.trunk = Trunk(kind)

    def embed(self, given: Batch) -> Row:
        row = self.trunk.lm.get_input_embeddings()(given.tokens)[0]
        row = row.index_copy(0, given.places, self.encoder(given.things).to(row.dtype))
        return Row(row[None], given.positions, given.labels)

    def forward(self, given: Batch) -> TokenLoss:
        return self.trunk(*self.embed(given))


class TinyTraining(Training):
    """``kind``: the network's. ``variant``: how it trains."""

    def __init__(self, kind: str, variant: str = "") -> None:
        torch.manual_seed(0)
        self.model = Model(kind)
        lm = self.model.trunk.lm
        if variant == "aux":
            lm.config.output_router_logits = True
        if variant in ("frozen", "lora"):
            lm.requires_grad_(False)
        if variant == "encoder frozen":
            self.model.encoder.requires_grad_(False)
        if variant.endswith("lora"):
            targets = ["q_proj", "v_proj", "o_proj"] + ["up_proj", "down_proj"] * (kind in ("llama", "qwen3"))
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets), lm)
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
                elif variant == "all and lora":
                    parameter.requires_grad_(True)

    def batches(self, rank, world_size, first):
        number = first
        while True:
            yield batch(number * world_size + rank)
            number += 1

    def loss(self, engine, given):
        return engine(given).total, {}

    def tokens(self, given):
        return int((given.labels != NO_LABEL).sum())

    def structure(self):
        model = self.model
        return Structure(
            embed=model.embed,
            embedders={"encoder": model.encoder},
            trunk=model.trunk,
            network=model.trunk.lm,
            network_name="trunk.lm",
            head=model.trunk.head,
        )


def one_process(
    training: TinyTraining, optimizer: torch.optim.Optimizer, micro_batches: int, steps: int, clip: float
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of plain PyTorch over all micro-batches of each step."""
    losses, norms = [], []
    for step in range(steps):
        batches = [batch(step * micro_batches + each) for each in range(micro_batches)]
        tokens = sum(map(training.tokens, batches))
        loss = sum(training.model(each).total for each in batches) / tokens
        loss.backward()
        trained = [each for each in training.model.parameters() if each.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms
