"""How many answers are right: an answer is if the likeliest token is the true one at each of its places.

That is what the model would write if it always took the likeliest token, without the cost of writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from hpcmm.train.structure import TokenLoss
from hpcmm.workloads.omni.data.batch import Batch, right_answers
from hpcmm.workloads.omni.data.conversations import TEST, ConversationFile
from hpcmm.workloads.omni.data.encoding import Encoder
from hpcmm.workloads.omni.data.loading import Loading, TestExamples
from hpcmm.workloads.omni.data.tokenizer import load_tokenizer
from hpcmm.workloads.omni.folders import conversations_folder, tokenizer_folder
from hpcmm.workloads.omni.models import OmniModel
from hpcmm.workloads.omni.schema import OmniConfig

_SCORED_AT_ONCE = 2
"""Micro-batches of training that make a row of scoring, which needs no memory for gradients."""


class ScoredAnswer(NamedTuple):
    """An answer's kind, and whether it is right."""

    kind: str
    right: bool


class HeldOut:
    """The held-out conversations of a run."""

    def __init__(self, config: OmniConfig, encoder: Encoder, device: torch.device) -> None:
        file = ConversationFile(conversations_folder(config) / TEST, encoder.modalities)
        self._examples = TestExamples(file, encoder, config.data.on_error)
        self._loading = Loading(config.data, config.train.seed, pin_memory=device.type == "cuda")
        self._at_once = _SCORED_AT_ONCE * config.train.micro_batch_size
        self._device = device

    @classmethod
    def of(cls, config: OmniConfig, model: OmniModel, device: torch.device) -> HeldOut:
        """Those of a run that is over, with the tokenizer that it had."""
        tokenizer = load_tokenizer(tokenizer_folder(config))
        encoder = Encoder(tokenizer, model.readers(), config.data.max_tokens, model.vocabulary)
        return cls(config, encoder, device)

    def __len__(self) -> int:
        return len(self._examples)

    def answers_of(self, place: int) -> int:
        """How many answers conversation ``place`` has."""
        return len(self._examples[place].answers)

    @torch.no_grad()
    def score(
        self, model: Callable[[Batch], TokenLoss], places: Sequence[int]
    ) -> Iterator[tuple[int, list[ScoredAnswer]]]:
        """Conversations ``places`` in their order, some at a time: how many they are, and their answers."""
        for batch in self._loading.once(self._examples, places, self._at_once):
            right = right_answers(batch, model(batch.to(self._device)).correct)
            scored = [ScoredAnswer(answer.kind, each) for answer, each in zip(batch.answers, right, strict=True)]
            yield batch.examples, scored


def accuracies(answers: Sequence[ScoredAnswer], modality_of: Callable[[str], str]) -> dict[str, float]:
    """Shares of right answers: of all, and of those on each modality, such as ``accuracy_image``."""
    groups: dict[str, list[bool]] = {}
    for kind, right in answers:
        groups.setdefault(modality_of(kind), []).append(right)
    found = {f"accuracy_{name}": _share(groups[name]) for name in sorted(groups)}
    return {"accuracy": _share([right for _, right in answers]), **found}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
