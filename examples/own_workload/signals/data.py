"""Signals, each a function of the seed and its number, so that a run repeats."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from signals.schema import SignalsData

CLASSES = ("sine", "square", "sawtooth")


def make_batch(numbers: list[int], data: SignalsData, seed: int) -> tuple[Tensor, Tensor]:
    """The signals of these numbers, (B, length), and their classes, (B,)."""
    signals, labels = zip(*(_signal(number, data, seed) for number in numbers), strict=True)
    return torch.from_numpy(np.stack(signals)), torch.tensor(labels)


def _signal(number: int, data: SignalsData, seed: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng([seed, number])
    label = int(random.integers(len(CLASSES)))
    turns = random.uniform(1, 4) * np.arange(data.length) / data.length + random.uniform()
    wave = (np.sin(2 * np.pi * turns), np.sign(np.sin(2 * np.pi * turns)), 2 * (turns % 1) - 1)[label]
    return (wave + data.noise * random.standard_normal(data.length)).astype(np.float32), label
