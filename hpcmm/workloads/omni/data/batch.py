"""Conversations as tokens, and micro-batches of them packed into one row without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcmm.train.structure import NO_LABEL


@dataclass(frozen=True, slots=True)
class ModalityBatch:
    """The images, or the sounds, of a row in their order."""

    prepared: list[Any]
    """What the modality's ``read`` gave of each file."""
    places: Tensor
    """(n,) int64: where the tokens of all of them lie in the row, the first file's first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the assistant's: what it says, its kind, and how many labels it has, with the one that ends it."""

    text: str
    kind: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations one behind the other, as one row of S tokens."""

    tokens: Tensor
    """(1, S) int64; 0 where a modality's tokens lie."""
    positions: Tensor
    """(1, S) int64; they begin at 0 with each conversation."""
    labels: Tensor
    """(1, S) int64: the token that follows each place, of answers alone; else -100."""
    modalities: Mapping[str, ModalityBatch]
    """By content type; also those that no conversation has."""
    answers: tuple[Answer, ...] = ()
    """In the order of their labels."""
    examples: int = 1
    padding: int = 0
    """How many of the S tokens stand for nothing."""
    lengths: tuple[int, ...] = ()
    """Tokens of each conversation that was packed, without padding."""

    @property
    def labelled(self) -> int:
        """How many labels are not -100."""
        return sum(answer.tokens for answer in self.answers)

    def to(self, device: torch.device | str) -> Batch:
        """All tensors on ``device``, also those within what the modalities prepared."""
        moved: Batch = _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin_memory(self) -> Batch:
        """All tensors in memory from which a GPU copies while others compute. A data loader calls it."""
        pinned: Batch = _with_tensors(self, lambda tensor: tensor.pin_memory())
        return pinned


def pack(examples: Sequence[Batch]) -> Batch:
    """The examples as one row, in their order. All of them know the same modalities."""
    lengths = [each.tokens.shape[1] for each in examples]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return Batch(
        tokens=torch.cat([each.tokens for each in examples], 1),
        positions=torch.cat([each.positions for each in examples], 1),
        labels=torch.cat([each.labels for each in examples], 1),
        modalities={
            key: ModalityBatch(
                [one for each in examples for one in each.modalities[key].prepared],
                torch.cat([each.modalities[key].places + start for each, start in zip(examples, starts, strict=True)]),
            )
            for key in examples[0].modalities
        },
        answers=tuple(answer for each in examples for answer in each.answers),
        examples=sum(each.examples for each in examples),
        padding=sum(each.padding for each in examples),
        lengths=tuple(length for each in examples for length in each.lengths or (each.tokens.shape[1] - each.padding,)),
    )


def pad(examples: Sequence[Batch]) -> Batch:
    """As :func:`pack`, with each example padded to the longest: what it costs is what packing saves."""
    longest = max(each.tokens.shape[1] for each in examples)
    return pack([_padded(each, longest - each.tokens.shape[1]) for each in examples])


def _padded(example: Batch, by: int) -> Batch:
    """With so many tokens more, which belong to the example and foretell nothing."""
    length = example.tokens.shape[1]
    return replace(
        example,
        tokens=functional.pad(example.tokens, (0, by)),
        positions=torch.cat([example.positions, torch.arange(length, length + by)[None]], 1),
        labels=functional.pad(example.labels, (0, by), value=NO_LABEL),
        padding=example.padding + by,
    )


def right_answers(batch: Batch, correct: Tensor) -> list[bool]:
    """Of each answer of ``batch`` whether a model that always takes the likeliest token would have written it.

    ``correct``: (labelled tokens,) bool, whether the likeliest token is the label, by place. It does write the answer
    if and only if all of them are: up to the first that is not, it is given what it would have written itself.
    """
    parts = torch.split(correct.cpu(), [answer.tokens for answer in batch.answers])
    return [bool(part.all()) for part in parts]


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with each tensor changed that lies in it, at any depth of dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_tensors(each, change) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with_tensors(each, change) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _with_tensors(getattr(value, each.name), change) for each in fields(value)})
    return value
