"""A tokenizer without a vocabulary file: one token a byte, for the small random text towers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

START, END = 256, 257
VOCABULARY = 258
LONGEST = 128


def tokenize(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Sentences to token numbers and to 1 for each that is no padding, both (len(sentences), L), int64; at most
    LONGEST."""
    rows = [[START, *sentence.encode()[: LONGEST - 2], END] for sentence in sentences]
    longest = max(map(len, rows))
    numbers = [row + [0] * (longest - len(row)) for row in rows]
    used = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(numbers), torch.tensor(used)
