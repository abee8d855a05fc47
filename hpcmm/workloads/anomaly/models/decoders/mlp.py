"""Decoders that judge each place by itself: a multi-layer perceptron on its features of all levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hpcmm.workloads.anomaly.models.decoders.batch_norm import Float32BatchNorm2d
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder, stack_levels


class MlpDecoder(Decoder):
    """Feature maps (B, channels[i], h[i], w[i]), finest first, to patch embeddings (B, width, h[0], w[0]).

    1 x 1 convolutions are the same perceptron at every place; what a place knows of its surroundings comes from the
    coarser levels alone. Layer normalisation is left out: unit-length inputs need none.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_layer(sum(channels), width), *_layer(width, width), nn.Conv2d(width, width, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        patches: Tensor = self.layers(stack_levels(features))
        return patches


class MlpBatchNormDecoder(Decoder):
    """As :class:`MlpDecoder`, with batch normalisation after each hidden layer."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_layer(sum(channels), width, normalised=True),
            *_layer(width, width, normalised=True),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        patches: Tensor = self.layers(stack_levels(features))
        return patches


def _layer(inputs: int, outputs: int, *, normalised: bool = False) -> list[nn.Module]:
    norm = [Float32BatchNorm2d(outputs)] if normalised else []
    return [nn.Conv2d(inputs, outputs, 1, bias=not normalised), *norm, nn.GELU()]
