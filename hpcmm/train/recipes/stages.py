"""A model as a chain of modules, and which part of the chain each stage of a pipeline has.

The chain wraps the model's own modules: ``embed``, each layer of the network, and its norm and head. What goes along it
is a pair: hidden states (1, S, width), and the row's positions and labels as one tensor (2, S) int32. The labels travel
too, so that only the first stage reads data.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.train.structure import Structure, TokenLoss

Carried = tuple[Tensor, Tensor]
"""Hidden states (1, S, width), and positions and labels (2, S) int32."""


class Rows:
    """Positions (1, S) int64 and rotary embeddings of a row, made once for all layers of a stage."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._places: Tensor | None = None
        self._made: tuple[Tensor, Any] | None = None

    def __call__(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Any]:
        """Of the row with these positions and labels (2, S)."""
        if self._made is None or self._places is not places:
            positions = places[:1].long()
            with torch.no_grad():
                self._made = positions, self._rotary(hidden, positions)
            self._places = places
        return self._made


class Embedding(nn.Module):
    """A micro-batch to its row."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.parts = nn.ModuleList([structure.network.model.embed_tokens, *structure.embedders.values()])
        self.waiting: deque[Any] = deque()
        """Micro-batches in the order of their forward passes. They are no tensors, which alone DeepSpeed hands on."""
        self._embed = structure.embed

    def forward(self, given: Tensor) -> Carried:
        """The next of the micro-batches. ``given``: nothing, on the rank's device."""
        batch = self.waiting.popleft()
        if hasattr(batch, "to"):  # as a workload's own loss does
            batch = batch.to(given.device)
        row = self._embed(batch)
        hidden = row.embedded
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # the next stage sends a gradient in any case, also if nothing here trains
        return hidden, torch.cat([row.positions, row.labels]).int()


class Layer(nn.Module):
    """A layer of the network."""

    def __init__(self, layer: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.layer = layer
        self._rows = rows

    def forward(self, carried: Carried) -> Carried:
        """The next hidden states."""
        hidden, places = carried
        positions, rotary = self._rows(hidden, places)
        found = self.layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False
        )
        return (found[0] if isinstance(found, tuple) else found), places


class Head(nn.Module):
    """The network's norm and head, to the loss."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.norm = structure.network.model.norm
        self.lm_head = structure.network.lm_head
        self.share: Tensor | float = 1.0
        """What the loss is multiplied by for its backward pass."""
        self.found: list[TokenLoss] = []
        """Of the micro-batches since this was last emptied, without gradients."""
        self._head = structure.head

    def forward(self, carried: Carried) -> Tensor:
        """This rank's share of the step's loss, a scalar."""
        hidden, places = carried
        loss = self._head(self.norm(hidden), places[1:].long())
        self.found.append(TokenLoss(loss.total.detach(), loss.correct))
        return loss.total * self.share


class Anchor(nn.Module):
    """A parameter for a stage that has none to train, which DeepSpeed cannot be without. It changes nothing."""

    def __init__(self, after: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = after
        self.anchor = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, given: Any) -> Any:
        """As the module that it holds. ``given``: what is carried, or what the first module of all takes."""
        if isinstance(given, tuple):
            return self.module(self._anchored(*given))
        return self._anchored(*self.module(given))

    def _anchored(self, hidden: Tensor, places: Tensor) -> Carried:
        return _Anchored.apply(hidden, self.anchor), places  # type: ignore[no-untyped-call]


class _Anchored(torch.autograd.Function):
    """The hidden states themselves. The parameter's gradient is zero."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, anchor: Tensor) -> Tensor:
        context.save_for_backward(anchor)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (anchor,) = context.saved_tensors
        return gradients[0], torch.zeros_like(anchor)


def chain_of(structure: Structure) -> list[nn.Module]:
    """The model from a micro-batch to its loss.

    Raises HpcmmError if the network has a loss beside that of its tokens, which a stage does not see.
    """
    network = structure.network
    if getattr(network.config, "output_router_logits", False):
        raise HpcmmError(
            "The language model's config.json sets output_router_logits, whose loss needs all layers at once, and each "
            "stage of a pipeline has some of them: set it to false."
        )
    rows = Rows(network.model.rotary_emb)
    return [Embedding(structure), *(Layer(layer, rows) for layer in network.model.layers), Head(structure)]


def tied(structure: Structure) -> bool:
    """Whether the output map is the token embedding itself."""
    return structure.network.lm_head.weight is structure.network.model.embed_tokens.weight


def costs_of(chain: Sequence[nn.Module], structure: Structure, *, recomputed: bool) -> list[float]:
    """What a token costs in each module, in multiplications: those of the forward and the backward pass.

    Each weight counts once in the forward pass, once for the gradient of what comes in, and once for its own gradient
    if it trains. Of experts, those that a token goes through count; token embeddings are looked up, not multiplied.
    Encoders count as if all tokens went through them. ``recomputed``: layers do their forward pass twice.
    """
    config = structure.network.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    lookup = structure.network.model.embed_tokens.weight
    costs = []
    for module in chain:
        first = isinstance(module, Embedding)
        cost = 0.0
        for weight in module.parameters():
            if first and weight is lookup:
                continue
            used = weight.numel()
            if experts and weight.dim() == 3 and weight.shape[0] == experts:
                used = used * config.num_experts_per_tok // experts
            backward = (not first or any(each.requires_grad for each in module.parameters())) + weight.requires_grad
            cost += used * (1 + (recomputed and isinstance(module, Layer)) + backward)
        costs.append(cost)
    return costs


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Where each of ``stages`` contiguous, non-empty parts begins, and the number of costs at the end.

    The dearest part is as cheap as can be, and the others are as even as can be then.
    """
    sums = [0.0, *itertools.accumulate(costs)]
    count = len(costs)
    # best[i]: the dearest part, the sum of squares, and the bounds, of the first i costs in the parts so far
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for part in range(stages):
        found: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(part + 1, count - (stages - part - 1) + 1):
            options = (
                (max(dearest, own), squares + own * own, [*bounds, stop])
                for start, (dearest, squares, bounds) in best.items()
                if start < stop
                for own in (sums[stop] - sums[start],)
            )
            found[stop] = min(options)
        best = found
    return best[count][2]


def bounds_of(layers: Sequence[int]) -> list[int]:
    """As :func:`balanced`, for the number of the network's layers in each stage."""
    ends = list(itertools.accumulate(layers))
    return [0, *(1 + end for end in ends[:-1]), ends[-1] + 2]


def drop(chain: Sequence[nn.Module], kept: range) -> None:
    """Give the memory of the modules back that other stages have. The model keeps their shapes."""
    for number, module in enumerate(chain):
        if number not in kept:
            module.to("meta")


def parameters_of(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Each parameter once."""
    seen: set[int] = set()
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
