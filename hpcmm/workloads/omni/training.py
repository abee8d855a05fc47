"""The omni-modal language model on one rank, as the training loop asks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor

from hpcmm.train.checkpoint import start_from
from hpcmm.train.sampling import even_share
from hpcmm.train.structure import Structure, TokenLoss
from hpcmm.train.workload import Training, gathered
from hpcmm.workloads.omni.data.batch import Batch
from hpcmm.workloads.omni.data.conversations import TEXT, TRAIN, ConversationFile
from hpcmm.workloads.omni.data.encoding import Encoder
from hpcmm.workloads.omni.data.kinds import AnswerKind, read_kinds
from hpcmm.workloads.omni.data.loading import Loading, TrainExamples
from hpcmm.workloads.omni.data.tokenizer import load_tokenizer
from hpcmm.workloads.omni.folders import conversations_folder, model_config, tokenizer_folder
from hpcmm.workloads.omni.models import OmniModel, build_model
from hpcmm.workloads.omni.schema import OmniConfig, OmniTrainConfig, OnError
from hpcmm.workloads.omni.scoring import HeldOut, ScoredAnswer, accuracies

log = logging.getLogger("hpcmm.train")


class OmniTraining(Training):
    """Conversations to train on, and others whose answers are scored."""

    model: OmniModel

    def __init__(self, config: OmniConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        tokenizer = load_tokenizer(tokenizer_folder(config))
        self.model = build_model(model_config(config), config.train.seed, tokenizer=tokenizer).to(device)
        if config.train.init_from is not None:
            start_from(self.model, config.train.init_from)
        root, data = conversations_folder(config), config.data
        modalities = self.model.readers()
        encoder = Encoder(tokenizer, modalities, data.max_tokens, self.model.vocabulary)
        self._loading = Loading(data, config.train.seed, pin_memory=device.type == "cuda")
        self._train = TrainExamples(ConversationFile(root / TRAIN, modalities), encoder, data.on_error)
        self._held_out = HeldOut(config, encoder, device)
        self._kinds = read_kinds(root)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """By learning rate: language model, connectors, encoders."""
        return groups_by_rate(self.model, self._config.train)

    def batches(self, rank: int, world_size: int, first: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches, each one packed row, from number ``first`` on, without end."""
        return self._loading.endless(self._train, self._config.train.micro_batch_size, rank, world_size, first)

    def loss(self, engine: deepspeed.DeepSpeedEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy summed over the row's labels."""
        loss: TokenLoss = engine(batch.to(self._device))
        return loss.total, {}

    def tokens(self, batch: Batch) -> int:
        """The row's labels."""
        return batch.labelled

    def lengths(self, batch: Batch) -> tuple[int, ...]:
        """Of the row's conversations."""
        return batch.lengths

    def structure(self) -> Structure:
        """Embedding, trunk and head."""
        return self.model.structure()

    def evaluate(
        self, engine: deepspeed.DeepSpeedEngine, rank: int, world_size: int, *, final: bool
    ) -> dict[str, float]:
        """Shares of right answers to the held-out questions, which the ranks share out."""
        del final
        engine.eval()
        own = self._own_answers(engine, rank, world_size)
        engine.train()
        answers = [answer for each in gathered(own, rank, world_size) for answer in each]
        return accuracies(answers, self._modality_of) if rank == 0 else {}

    def finish(self, rank: int, world_size: int) -> None:
        """Tell how many conversations could not be used, on any rank, in all. All ranks call this together."""
        if self._config.data.on_error is not OnError.skip:
            return
        skipped = torch.stack(gathered(self._train.skipped, rank, world_size)).amax(0)
        if rank == 0:
            log.info("%d of %d conversations to train on were skipped", int(skipped.sum()), len(skipped))

    def _own_answers(self, engine: Any, rank: int, world_size: int) -> list[ScoredAnswer]:
        """Those of this rank's share. Each rank runs through the model equally often, for that may be collective."""
        places = even_share(len(self._held_out), rank, world_size)
        answers = [answer for _, row in self._held_out.score(engine, places) for answer in row]
        if len(range(rank, len(self._held_out), world_size)) < len(places):  # the last is another rank's
            answers = answers[: len(answers) - self._held_out.answers_of(places[-1])]
        return answers

    def _modality_of(self, kind: str) -> str:
        return self._kinds.get(kind, AnswerKind()).modality or TEXT


def groups_by_rate(model: OmniModel, train: OmniTrainConfig) -> list[dict[str, Any]]:
    """The trained parameters of ``model``; encoders and connectors apart if they have a rate of their own."""
    rates = {"encoder": train.encoder_learning_rate, "connector": train.connector_learning_rate}
    groups: dict[float | None, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[2] if name.startswith("modalities.") else ""
            groups.setdefault(rates.get(part), []).append(parameter)
    return [{"params": own} if rate is None else {"params": own, "lr": rate} for rate, own in groups.items()]
