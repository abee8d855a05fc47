"""The causal language model over a packed row of embedded tokens, to the loss of the labelled ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.train.structure import NO_LABEL, TokenLoss


class Trunk(nn.Module):
    """A causal language model of ``transformers``, made with the attention of :mod:`hpcmm.train.attention`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.lm = network

    def forward(self, embedded: Tensor, positions: Tensor, labels: Tensor) -> TokenLoss:
        """Embedded tokens (1, S, width), their positions within their example and labels, both (1, S) int64."""
        with_router = asks_for_router_loss(self.lm.config) and torch.is_grad_enabled()
        options = {"output_router_logits": True} if with_router else {}
        found = self.lm.model(inputs_embeds=embedded, position_ids=positions, use_cache=False, **options)
        loss = self.head(found.last_hidden_state, labels)
        if with_router:
            # A mean over tokens by itself: times the labelled tokens, it adds over micro-batches as the rest does.
            weight = self.lm.config.router_aux_loss_coef * len(loss.correct)
            loss = loss._replace(total=loss.total + weight * _imbalance(found.router_logits, self.lm.config))
        return loss

    def head(self, states: Tensor, labels: Tensor) -> TokenLoss:
        """The network's last hidden states (1, S, width) and labels (1, S) to the loss."""
        labelled = labels[0] != NO_LABEL
        truth = labels[0][labelled]
        # Only labelled places need the vocabulary's logits, which are the largest tensor of all.
        logits = self.lm.lm_head(states[0][labelled]).float()
        total = functional.cross_entropy(logits, truth, reduction="sum")
        return TokenLoss(total, logits.detach().argmax(dim=-1) == truth)


def asks_for_router_loss(config: Any) -> bool:
    """Whether a network's configuration wants experts to be chosen evenly."""
    return bool(getattr(config, "output_router_logits", False))


def _imbalance(router_logits: Any, config: Any) -> Tensor:
    """How unevenly a row's tokens are spread over the experts: 1 times the experts of a token if they are not."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: PLC0415

    if not router_logits:
        raise HpcmmError(
            "The language model's config.json sets output_router_logits, but its experts tell no router logits as they "
            "are divided over ranks: set it to false."
        )
    loss = load_balancing_loss_func(router_logits, config.num_local_experts, config.num_experts_per_tok)
    assert isinstance(loss, Tensor)
    return loss
