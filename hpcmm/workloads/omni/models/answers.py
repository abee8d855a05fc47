"""Answers word by word: the likeliest token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hpcmm.workloads.omni.data.batch import Batch
from hpcmm.workloads.omni.models.omni import OmniModel

_GENERATING = "sdpa"
"""Attention with a cache and a mask, which that over packed rows has not."""


class Written(NamedTuple):
    """An answer, how many tokens it has, and whether the model ended it; else it was cut off."""

    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def write_answers(
    model: OmniModel, prompts: Sequence[Batch], tokenizer: Any, stop_tokens: Sequence[int], most_tokens: int
) -> list[Written]:
    """The model's answer to each of ``prompts``, of one conversation each, on the model's device.

    ``stop_tokens``: each ends an answer. ``most_tokens``: of an answer.
    """
    network = model.trunk.lm
    rows = [model.embed(prompt).embedded[0] for prompt in prompts]
    embedded = pad_sequence(rows, batch_first=True, padding_side="left")
    attended = pad_sequence([_ones(row) for row in rows], batch_first=True, padding_side="left")
    with _attention(network, _GENERATING):
        tokens = network.generate(
            inputs_embeds=embedded,
            attention_mask=attended,
            do_sample=False,
            max_new_tokens=most_tokens,
            eos_token_id=list(stop_tokens),
            pad_token_id=tokenizer.eos_token_id,
        )
    return [_written(row, tokenizer, stop_tokens) for row in tokens.tolist()]


def _written(tokens: Sequence[int], tokenizer: Any, stop_tokens: Sequence[int]) -> Written:
    """A row of what was generated. Behind the token that ends it come others, up to the longest of the batch."""
    length = next((place for place, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()
    return Written(text, length, ended=length < len(tokens))


@contextmanager
def _attention(network: Any, name: str) -> Iterator[None]:
    before = network.config._attn_implementation
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _ones(row: Tensor) -> Tensor:
    return torch.ones(len(row), dtype=torch.int64, device=row.device)
