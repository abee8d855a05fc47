"""Floating-point operations of a step: of a transformer by formula, of any other module as it was measured once.

A product of (m, k) and (k, n) counts 2mkn, as in Narayanan et al., "Efficient Large-Scale Language Model Training on
GPU Clusters Using Megatron-LM" (2021); norms, activations and the softmax are left out. A backward pass costs one such
product for the gradients of the inputs, and one for those of the weights. Model FLOPs are those of a step without
recomputation (Chowdhery et al., "PaLM" (2022), appendix B); hardware FLOPs count what activation checkpointing computes
again (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022)).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpcmm.annotate.ranges import batch_size
from hpcmm.config.model_shape import ModelShape


@dataclass(frozen=True)
class ForwardFlops:
    """Of one forward pass."""

    linear: float
    """Of the layers' linear maps."""
    attention: float
    """Of queries with keys, and of weights with values."""
    head: float
    """Of the map to the vocabulary."""


def forward_flops(shape: ModelShape, lengths: Sequence[int], labels: int | None = None) -> ForwardFlops:
    """Of examples of these ``lengths`` in tokens, however they are packed: none attends to another.

    Attention is causal: token t of an example attends to t tokens. A feed-forward network has three maps (gate, up and
    down), each token goes through ``experts_per_token`` of them. ``labels``: the places whose logits are needed; None:
    all. A sliding window is not known, and counts as if the whole example was attended to.
    """
    tokens = sum(lengths)
    heads, shared = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    projections = 2 * shape.width * (2 * heads + 2 * shared)
    networks = 2 * 3 * shape.width * shape.intermediate * (shape.experts_per_token or 1)
    router = 2 * shape.width * shape.experts
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return ForwardFlops(
        linear=float(shape.layers * tokens * (projections + networks + router)),
        attention=float(shape.layers * 2 * 2 * heads * pairs),
        head=float(2 * shape.width * shape.vocabulary * (tokens if labels is None else labels)),
    )


@dataclass(frozen=True)
class StepFlops:
    """Of forward and backward passes."""

    model: float
    hardware: float
    """With what is computed again."""


@dataclass(frozen=True)
class TransformerFlops:
    """What a network costs in training."""

    shape: ModelShape
    trained: float
    """Share of the network's weights that train, in [0, 1]."""
    has_gradients: bool
    """Whether gradients pass through it, to its own weights or to what is before it."""
    recomputes: bool
    """Whether its layers compute their activations again in the backward pass."""

    @classmethod
    def of(
        cls, shape: ModelShape, network: nn.Module, before: Iterable[nn.Module], *, recomputes: bool
    ) -> TransformerFlops:
        """``before``: what makes the network's inputs. Call it while the parameters are whole."""
        trained = _trained_share(network)
        upstream = any(p.requires_grad for module in before for p in module.parameters())
        return cls(shape, trained, trained > 0 or upstream, recomputes)

    def of_examples(self, lengths: Sequence[int], labels: int | None) -> StepFlops:
        """Of one micro-batch."""
        forward = forward_flops(self.shape, lengths, labels)
        layers = forward.linear + forward.attention
        linear = (forward.linear + forward.head) * (1 + self.has_gradients + self.trained)
        model = linear + forward.attention * (3 if self.has_gradients else 1)
        return StepFlops(model, model + (layers if self.recomputes and self.has_gradients else 0.0))


def _trained_share(module: nn.Module) -> float:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    whole = sum(size for size, _ in sizes)
    return sum(size for size, trains in sizes if trains) / whole if whole else 0.0


_UNMEASURED, _MEASURED = 1, 3
"""The first forward pass may do what is done once; the next ones are measured."""


@dataclass
class _Module:
    """What is known of one module."""

    passes: int = 0
    flops: float = 0.0
    """Of the passes that were measured."""
    elements: int = 0
    """Of their inputs."""
    counter: FlopCounterMode | None = None
    """While a pass is measured."""


class MeasuredFlops:
    """Counts what modules do: measured in a few forward passes, and in proportion to their inputs from then on.

    A backward pass costs twice the forward pass of weights that train, as it does on average over a module.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Call it when a recipe has put its own hooks on the modules, so that what a rank really does is seen."""
        self.counts = False
        """Whether what runs belongs to a step; an evaluation does not."""
        self._total = 0.0
        self._known: dict[nn.Module, _Module] = {}
        for module in modules:
            self._known[module] = _Module()
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            module.register_forward_hook(self._end, with_kwargs=True, always_call=True)

    def take(self) -> float:
        """FLOPs since the last call, of forward and backward passes; 0 before they are known."""
        taken, self._total = self._total, 0.0
        return taken

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        known = self._known[module]
        if not self.counts or known.counter is not None:
            return
        known.passes += 1
        if known.passes > _UNMEASURED + _MEASURED:
            elements = _elements(arguments, keywords)
            self._total += known.flops * (elements / known.elements if known.elements else 1 / _MEASURED)
        elif known.passes > _UNMEASURED:
            known.counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
            known.counter.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], _output: Any) -> None:
        known = self._known[module]
        if known.counter is None:
            return
        counter, known.counter = known.counter, None
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        flops = counter.get_total_flops() * (1 + 2 * _trained_share(module))
        known.flops += flops
        known.elements += _elements(arguments, keywords)
        self._total += flops


def _elements(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """Of the tensors that a module is called with, also of those in the fields of an object."""
    found = batch_size([arguments, keywords])
    return found or sum(
        batch_size(vars(each)) for each in (*arguments, *keywords.values()) if hasattr(each, "__dict__")
    )


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of fused attention on CPUs, by the shapes of its inputs (batch, heads, length, width)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""PyTorch's counter knows fused attention of GPUs alone."""
