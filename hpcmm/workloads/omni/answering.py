"""A trained model that answers conversations, as a page or a script asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpcmm.workloads.omni.data.batch import Batch
from hpcmm.workloads.omni.data.conversations import Conversation
from hpcmm.workloads.omni.data.encoding import Encoder, TooLongError
from hpcmm.workloads.omni.data.tokenizer import load_tokenizer
from hpcmm.workloads.omni.folders import model_config, tokenizer_folder
from hpcmm.workloads.omni.models import OmniModel, build_model
from hpcmm.workloads.omni.models.answers import Written, write_answers
from hpcmm.workloads.omni.schema import OmniConfig


def model_of(config: OmniConfig) -> OmniModel:
    """A run's model as it was before training, once what it needs is there."""
    tokenizer = load_tokenizer(tokenizer_folder(config))
    return build_model(model_config(config), config.train.seed, tokenizer=tokenizer)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model is given it to write one more turn."""

    batch: Batch
    stop_tokens: tuple[int, ...]
    """Each ends the answer."""
    room: int
    """How many tokens the answer may have before the model's context is full."""

    @property
    def tokens(self) -> int:
        return int(self.batch.tokens.shape[1])


class Answerer:
    """The model of a run, in evaluation mode, with the tokenizer that it was trained with."""

    def __init__(self, model: OmniModel, config: OmniConfig, device: torch.device) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self._tokenizer = load_tokenizer(tokenizer_folder(config))
        self._encoder = Encoder(self._tokenizer, model.readers(), config.data.max_tokens, model.vocabulary)
        self._context = int(model.trunk.lm.config.max_position_embeddings)

    def answer(self, conversations: Sequence[Conversation], most_tokens: int = 32) -> list[str]:
        """What the model says next in each, always the likeliest token, ``most_tokens`` of them at most.

        Raises HpcmmError as :meth:`prompt` does.
        """
        return [written.text for written in self.write([self.prompt(each) for each in conversations], most_tokens)]

    def prompt(self, conversation: Conversation) -> Prompt:
        """Read the conversation's files, and make tokens of it. Several threads may call it at once.

        Raises HpcmmError for a file that cannot be read, TooLongError if the conversation exceeds ``data.max_tokens``
        or leaves no room for an answer in the model's context.
        """
        batch = self._encoder.prompt(conversation)
        room = self._context - int(batch.tokens.shape[1])
        if room < 1:
            raise TooLongError(
                f"{conversation.origin}: it has {batch.tokens.shape[1]} tokens, images and sounds included: no room "
                f"is left for an answer in the model's context of {self._context}: shorten it."
            )
        return Prompt(batch, tuple(self._encoder.format.stop_tokens(conversation)), room)

    def write(self, prompts: Sequence[Prompt], most_tokens: int) -> list[Written]:
        """An answer to each, always the likeliest token, at most ``most_tokens`` and what its context has room for."""
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for place, prompt in enumerate(prompts):
            alike.setdefault((prompt.stop_tokens, min(most_tokens, prompt.room)), []).append(place)
        written: dict[int, Written] = {}
        # Together only those that end alike, so that nobody's answer depends on who asks at the same time.
        for (stops, most), places in alike.items():
            batches = [prompts[place].batch.to(self._device) for place in places]
            found = write_answers(self._model, batches, self._tokenizer, stops, most)
            written.update(zip(places, found, strict=True))
        return [written[place] for place in range(len(prompts))]
