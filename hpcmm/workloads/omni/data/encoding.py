"""A conversation as one example: its tokens, its labels, and what the modalities read of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hpcmm.errors import HpcmmError
from hpcmm.train.structure import NO_LABEL
from hpcmm.workloads.omni.data.batch import Answer, Batch, ModalityBatch
from hpcmm.workloads.omni.data.chat import ChatFormat, Span
from hpcmm.workloads.omni.data.conversations import TEXT, Conversation


class TooLongError(HpcmmError):
    """A conversation of more tokens than are taken."""


class Preparer(Protocol):
    """What is asked of a modality while data are read, perhaps in a loader's process."""

    def read(self, path: Path) -> Any:
        """The file, or folder, as the arrays that the modality's encoder takes. Raises HpcmmError if it cannot."""

    def count(self, prepared: Any) -> int:
        """How many tokens what :meth:`read` gave takes in the row, 1 or more."""


class Encoder:
    """Makes examples of conversations, for one tokenizer and one set of modalities."""

    def __init__(
        self,
        tokenizer: Any,
        modalities: Mapping[str, Preparer],
        max_tokens: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """``modalities``: by content type. ``max_tokens``: of an example; None for any number. ``vocabulary``: how many
        tokens the language model has embeddings of; None for as many as the tokenizer knows.

        Raises HpcmmError if the tokenizer cannot be used.
        """
        self.format = ChatFormat(tokenizer)
        self.modalities = dict(modalities)
        self._max_tokens = max_tokens
        self._vocabulary = vocabulary

    def example(self, conversation: Conversation) -> Batch:
        """The conversation with its labels.

        Raises HpcmmError, with the conversation's origin, if a file cannot be read, and TooLongError.
        """
        return self._encode(conversation, self.format.spans(conversation))

    def prompt(self, conversation: Conversation) -> Batch:
        """What a model is given to write the next turn, an answer. What was answered before has labels."""
        return self._encode(conversation, self.format.prompt(conversation))

    def _encode(self, conversation: Conversation, spans: Sequence[Span]) -> Batch:
        tokens: list[int] = []
        answers: list[int | None] = []
        prepared: dict[str, list[Any]] = {key: [] for key in self.modalities}
        places: dict[str, list[int]] = {key: [] for key in self.modalities}
        for span in spans:
            if span.part.type == TEXT:
                new = self.format.tokens(span)
                if self._vocabulary is not None and max(new, default=0) >= self._vocabulary:
                    raise HpcmmError(
                        f"{conversation.origin}: a text has token {max(new)}, but the language model has embeddings of "
                        f"{self._vocabulary} tokens alone: its tokenizer is that of another model."
                    )
                answers += [span.answer] * len(new)
            else:
                new = [0] * self._read(span, conversation, prepared)
                answers += [None] * len(new)
                places[span.part.type] += range(len(tokens), len(tokens) + len(new))
            tokens += new
            if self._max_tokens is not None and len(tokens) > self._max_tokens:
                raise TooLongError(
                    f"{conversation.origin}: it has more than {self._max_tokens} tokens, images and sounds included: "
                    "raise data.max_tokens, shorten it, or leave such ones out with data.on_error=skip."
                )
        # A place foretells the next one, so the last of the row foretells nothing.
        labels = [NO_LABEL if answer is None else token for token, answer in zip(tokens, answers, strict=True)][1:]
        numbers = answers[1:]
        return Batch(
            tokens=torch.tensor([tokens]),
            positions=torch.arange(len(tokens))[None],
            labels=torch.tensor([[*labels, NO_LABEL]]),
            modalities={
                key: ModalityBatch(prepared[key], torch.tensor(places[key], dtype=torch.int64)) for key in prepared
            },
            answers=tuple(
                Answer(turn.text, turn.kind, numbers.count(number))
                for number, turn in enumerate(conversation.turns)
                if number in numbers
            ),
        )

    def _read(self, span: Span, conversation: Conversation, prepared: dict[str, list[Any]]) -> int:
        """Read a file of a modality into ``prepared``; the number of its tokens."""
        kind, path, one = span.part.type, span.part.path, span.part.prepared
        if kind not in self.modalities or (path is None and one is None):
            raise HpcmmError(f"{conversation.origin}: the model takes nothing of the type {kind}.")
        modality = self.modalities[kind]
        if one is None and path is not None:
            try:
                one = modality.read(path)
            except HpcmmError as error:
                raise HpcmmError(f"{conversation.origin}: {error}") from error
        count = modality.count(one)
        if count < 1:
            raise HpcmmError(f"{conversation.origin}: {path} is too small to make one token of it.")
        prepared[kind].append(one)
        return count
