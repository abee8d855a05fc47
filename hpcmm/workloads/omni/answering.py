"""A trained model that answers conversations, as a page or a script asks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpcmm.workloads.omni.data.conversations import Conversation
from hpcmm.workloads.omni.data.encoding import Encoder
from hpcmm.workloads.omni.data.tokenizer import load_tokenizer
from hpcmm.workloads.omni.folders import tokenizer_folder
from hpcmm.workloads.omni.models import OmniModel
from hpcmm.workloads.omni.models.answers import write_answers
from hpcmm.workloads.omni.schema import OmniConfig


class Answerer:
    """The model of a run, in evaluation mode, with the tokenizer that it was trained with."""

    def __init__(self, model: OmniModel, config: OmniConfig, device: torch.device) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self._tokenizer = load_tokenizer(tokenizer_folder(config))
        self._encoder = Encoder(self._tokenizer, model.readers(), config.data.max_tokens)

    def answer(self, conversations: Sequence[Conversation], most_tokens: int = 32) -> list[str]:
        """What the model says next in each, always the likeliest token, ``most_tokens`` of them at most.

        Raises HpcmmError for a file that cannot be read, and for a conversation that is too long.
        """
        prompts = [self._encoder.prompt(each).to(self._device) for each in conversations]
        stops = {token for each in conversations for token in self._encoder.format.stop_tokens(each)}
        return write_answers(self._model, prompts, self._tokenizer, sorted(stops), most_tokens)
