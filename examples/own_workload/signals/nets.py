"""The networks: each a class that a file in ``conf/net/`` names."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Net(nn.Module, ABC):
    """Signals (B, length) to logits (B, classes). The workload gives ``length`` and ``classes``, the file the rest."""

    @abstractmethod
    def forward(self, signals: Tensor) -> Tensor:
        """Signals (B, length) to logits (B, classes)."""


class ConvolutionNet(Net):
    """Two convolutions over time and the mean over time."""

    def __init__(self, length: int, classes: int, channels: int = 16) -> None:
        del length
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, channels, 7, padding=3), nn.GELU(), nn.Conv1d(channels, channels, 7, padding=3), nn.GELU()
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, signals: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(signals.unsqueeze(1)).mean(dim=2))
        return logits


class PerceptronNet(Net):
    """One hidden layer over all samples."""

    def __init__(self, length: int, classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(length, hidden), nn.GELU(), nn.Linear(hidden, classes))

    def forward(self, signals: Tensor) -> Tensor:
        logits: Tensor = self.layers(signals)
        return logits
