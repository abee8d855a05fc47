"""The language head: an image's features, its anomaly map and a question to the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from hpcmm.workloads.anomaly.models.llm import build_llm
from hpcmm.workloads.anomaly.models.prompt_learner import BASE_PROMPTS, PromptLearner
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue
from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES
from hpcmm.workloads.anomaly.schema import LlmConfig

_BASE_WORDS = " Look at every part of the anomaly map with care and name the parts that stand out"
"""The base prompts begin as the first of these tokens."""


class TextLoss(NamedTuple):
    """Cross-entropy summed over the tokens of a batch's answers, a scalar, and how many tokens there are.

    A tuple, for ZeRO stage 3 looks through what a module gives.
    """

    total: Tensor
    tokens: int


class LanguageHead(nn.Module):
    """Puts an image and its map into a language model's prompt.

    A sequence is: first token, human turn, one image token, the prompt learner's 18 prompts, caption and question,
    assistant turn, answer, end. Only the answer and the end are learnt. The image token is a linear map of the image
    encoder's coarsest features, averaged over all places.
    Source of the sequence: Z. Gu et al., "AnomalyGPT", AAAI 2024.
    """

    def __init__(self, config: LlmConfig, image_channels: int) -> None:
        super().__init__()
        llm = build_llm(config)
        self._tokenizer = llm.tokenizer
        self._config = config
        names, intact, base = self._embedded_words(llm.network)
        self.prompts = PromptLearner(names, intact, base)
        to_word = nn.LayerNorm(llm.width)
        nn.init.constant_(to_word.weight, float(base.square().mean().sqrt()))
        self.image_token = nn.Sequential(nn.LayerNorm(image_channels), nn.Linear(image_channels, llm.width), to_word)
        self.llm = llm.network
        self.register_state_dict_post_hook(_leave_out_tied)  # type: ignore[no-untyped-call]

    def forward(
        self, features: Tensor, maps: Tensor, captions: Sequence[str], dialogues: Sequence[Dialogue]
    ) -> TextLoss:
        """Features (B, image_channels), maps (B, H, W) from 0 to 1, B captions and B dialogues to the answers' loss."""
        questions = [dialogue.question for dialogue in dialogues]
        prefixes = self._prefixes(features, maps, captions, questions)
        answers = [self._answer_tokens(dialogue.answer).to(features.device) for dialogue in dialogues]
        sequences = [torch.cat([prefix, self._embed(answer)]) for prefix, answer in zip(prefixes, answers, strict=True)]
        states = self._last_states(sequences)
        # The state before each token of the answer foretells it; of no other place are the vocabulary's logits needed.
        foretelling = [
            state[len(prefix) - 1 : len(prefix) - 1 + len(answer)]
            for state, prefix, answer in zip(states, prefixes, answers, strict=True)
        ]
        logits = self.llm.lm_head(torch.cat(foretelling)).float()
        truth = torch.cat(answers)
        return TextLoss(functional.cross_entropy(logits, truth, reduction="sum"), len(truth))

    @torch.no_grad()
    def answer(self, features: Tensor, maps: Tensor, captions: Sequence[str], questions: Sequence[str]) -> list[str]:
        """The likeliest answer, token by token, to each of the B questions; of ``max_answer_tokens`` at most."""
        prefixes = self._prefixes(features, maps, captions, questions)
        embedded = pad_sequence(prefixes, batch_first=True, padding_side="left")
        attended = pad_sequence([_ones(prefix) for prefix in prefixes], batch_first=True, padding_side="left")
        embedding = self.llm.get_input_embeddings().weight
        tokens = self.llm.generate(
            inputs_embeds=embedded,
            attention_mask=attended,
            do_sample=False,
            synced_gpus=hasattr(embedding, "ds_id"),  # ZeRO-3: ranks gather weights together, so none stops before all
            max_new_tokens=self._config.max_answer_tokens,
            pad_token_id=self._tokenizer.eos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        return [str(text).strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _prefixes(
        self, features: Tensor, maps: Tensor, captions: Sequence[str], questions: Sequence[str]
    ) -> list[Tensor]:
        """All before the answer, embedded: for each image (tokens, width)."""
        images = self.image_token(features.to(self.prompts.base.dtype)).unsqueeze(1)
        prompts = self.prompts(maps)
        device = features.device
        before = self._embed(self._tokens(self._config.human_turn, first=True).to(device))
        after = self._tokens(self._config.assistant_turn).to(device)
        asked = [
            self._embed(torch.cat([self._question_tokens(caption, question).to(device), after]))
            for caption, question in zip(captions, questions, strict=True)
        ]
        return [torch.cat([before, *parts]) for parts in zip(images, prompts, asked, strict=True)]

    def _last_states(self, sequences: list[Tensor]) -> Tensor:
        """The language model's last hidden states (B, longest, width); shorter sequences are filled up at their end."""
        states: Tensor = self.llm.model(
            inputs_embeds=pad_sequence(sequences, batch_first=True),
            attention_mask=pad_sequence([_ones(sequence) for sequence in sequences], batch_first=True),
            use_cache=False,
        ).last_hidden_state
        return states

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.llm.get_input_embeddings()(tokens)
        return embedded

    def _question_tokens(self, caption: str, question: str) -> Tensor:
        """A user's words never count as the model's own marks of turns."""
        text = f"This is {caption}. {question}" if caption else question
        for mark in self._tokenizer.all_special_tokens:
            text = text.replace(mark, " ")
        return self._tokens(text)[: self._config.max_question_tokens]

    def _answer_tokens(self, answer: str) -> Tensor:
        end = torch.tensor([self._tokenizer.eos_token_id])
        return torch.cat([self._tokens(answer), end])

    def _tokens(self, text: str, *, first: bool = False) -> Tensor:
        numbers = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([self._tokenizer.bos_token_id, *numbers] if first else numbers, dtype=torch.int64)

    @torch.no_grad()
    def _embedded_words(self, network: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the cells' names and of a word for intact, means over tokens; of the base prompts' words."""
        embed = network.get_input_embeddings()
        names = torch.stack([embed(self._tokens(f" {name}")).mean(dim=0) for name in CELL_NAMES])
        intact = embed(self._tokens(" normal")).mean(dim=0)
        return names, intact, embed(self._tokens(_BASE_WORDS)[:BASE_PROMPTS])


def _leave_out_tied(head: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """The output map that is the embedding itself: under its second name it would pass for no frozen parameter."""
    assert isinstance(head, LanguageHead)
    if head.llm.lm_head.weight is head.llm.get_input_embeddings().weight:
        state.pop(f"{prefix}llm.lm_head.weight", None)


def _ones(sequence: Tensor) -> Tensor:
    return torch.ones(len(sequence), dtype=torch.int64, device=sequence.device)
