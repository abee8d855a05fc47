"""What a workload tells the recipes of its model, which itself knows no rank, group or collective.

A model that works on tokens is a chain: ``embed`` makes a row of embedded tokens of a micro-batch, the ``trunk`` turns
the row into a loss, and within the trunk lies a causal language model of ``transformers``. Each recipe cuts this chain
in its own way: the sequence recipe divides the row in front of the trunk, the tensor and expert recipes exchange
modules within the network, and the pipeline gives each stage some of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

NO_LABEL = -100
"""The label of a place that foretells nothing."""


class Row(NamedTuple):
    """A micro-batch as one row of embedded tokens: its examples one after another, without padding."""

    embedded: Tensor
    """(1, S, width)."""
    positions: Tensor
    """(1, S) int64: each example counts from 0 on, and attention stays within it."""
    labels: Tensor
    """(1, S) int64: the token that each place foretells, :data:`NO_LABEL` for none."""


class TokenLoss(NamedTuple):
    """What a trunk makes of a row."""

    total: Tensor
    """Scalar, float32: the cross-entropy summed over the row's labels."""
    correct: Tensor
    """(labels,) bool, by place: whether the likeliest token is the label. Without gradients."""


@dataclass(frozen=True)
class Structure:
    """The chain of a token model."""

    embed: Callable[[Any], Row]
    """A micro-batch to its row; a method of the model. A batch that has a method ``to`` is on the rank's device."""
    embedders: Mapping[str, nn.Module]
    """What ``embed`` uses, the network's token embedding aside, by the modules' names within the model: encoders and
    connectors."""
    trunk: nn.Module
    """``trunk(embedded, positions, labels)`` is the row's :class:`TokenLoss`."""
    network: Any
    """The ``transformers`` causal language model within the trunk: ``network.model`` has ``embed_tokens``, ``layers``,
    ``norm`` and ``rotary_emb``, and ``network.lm_head`` makes logits."""
    network_name: str
    """Its name within the model, such as ``trunk.network``."""
    head: Callable[[Tensor, Tensor], TokenLoss]
    """The network's last hidden states (1, S, width), after its norm, and labels (1, S) to the loss; it uses
    ``network.lm_head`` alone."""

    @property
    def outermost_embedders(self) -> list[nn.Module]:
        """The embedders that lie within no other one."""
        names = self.embedders
        return [module for name, module in names.items() if not any(name.startswith(f"{other}.") for other in names)]

    def checkpoint_activations(self) -> None:
        """Let the network's layers compute their activations again in the backward pass."""
        # transformers gave the method its new name, and warns of the old one, only after the lowest version that fits.
        enable = getattr(self.network, "activation_checkpointing_enable", None)
        (enable or self.network.gradient_checkpointing_enable)({"use_reentrant": False})
