"""The anomaly detector on one rank: model, data, loss and scores, as the training loop asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hpcmm.train.checkpoint import start_from
from hpcmm.train.sampling import EndlessSampler, even_share
from hpcmm.train.workload import Training
from hpcmm.workloads.anomaly.data.anomaly import Batch, Item, build_datasets, collate
from hpcmm.workloads.anomaly.data_root import data_config, data_root
from hpcmm.workloads.anomaly.feature_cache import Ranks, keep_features
from hpcmm.workloads.anomaly.llm_folder import model_config
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.models.anomaly import AnomalyModel, Encoded
from hpcmm.workloads.anomaly.models.answers import answer
from hpcmm.workloads.anomaly.models.language import TextLoss
from hpcmm.workloads.anomaly.models.losses import LossLearner
from hpcmm.workloads.anomaly.models.scores import image_auroc, pixel_auroc
from hpcmm.workloads.anomaly.question_answering.conversations import parse_answer
from hpcmm.workloads.anomaly.question_answering.scores import answer_scores, statements
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig, OnError

log = logging.getLogger("hpcmm.train")

_SCORED_AT_ONCE = 4
"""Micro-batches of training that make a batch of scoring."""


class AnomalyTraining(Training):
    """Images with simulated anomalies to train on, held-out ones with true anomalies to score."""

    model: AnomalyModel

    def __init__(self, config: AnomalyConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.model = build_model(model_config(config), config.train.seed).to(device)
        if config.train.init_from is not None:
            start_from(self.model, config.train.init_from)
        self._loss = LossLearner(config.train)
        train, test = build_datasets(data_root(config), data_config(config), config.train.seed)
        self._skipped = train.skipped
        self._train: Dataset[Item] = train
        self._test: Dataset[Item] = test
        self._lengths = len(train), len(test)
        if config.data.feature_cache:
            ranks = Ranks(dist.get_rank(), dist.get_world_size())
            self._train, self._test = keep_features(config, self.model.image_encoder, train, test, ranks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """By learning rate: a decoder that is trained already bears less than prompts do."""
        return groups_by_rate(self.model, self._config.train)

    def batches(self, rank: int, world_size: int, first: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches, from number ``first`` on, without end."""
        data, train = self._config.data, self._config.train
        sampler = EndlessSampler(self._lengths[0], train.micro_batch_size, rank, world_size, train.seed, first)
        loader: DataLoader[Any] = DataLoader(
            self._train,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            pin_memory=self._device.type == "cuda",
            # Its own, for a loader draws a number when it starts: a resumed run would be one number ahead.
            generator=torch.Generator().manual_seed(train.seed),
        )
        delay_s = data.slow_s if rank == data.slow_rank else 0.0
        for batch in loader:
            if delay_s:
                time.sleep(delay_s)
            yield batch

    def loss(self, engine: deepspeed.DeepSpeedEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and its parts, scalars."""
        images, mask = self._images(batch), batch["mask"].to(self._device)
        if self.model.language is None:
            total, parts = self._loss(engine(images, batch["caption"]), mask)
        else:
            logits, text = engine(images, batch["caption"], batch["dialogue"])
            total, parts = self._loss(logits, mask, _mean_over_ranks(text, self._device))
        return total, {name: value.detach() for name, value in parts.items()}

    def finish(self, rank: int, world_size: int) -> None:
        """Tell how many training images could not be used, on any rank, in all. All ranks call this together."""
        if self._config.data.on_error is not OnError.skip:
            return
        flags = self._skipped.flags.int().to(self._device)
        if world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if rank == 0:
            log.info("%d of %d training images were skipped", int(flags.sum()), len(flags))

    def _images(self, batch: Batch) -> Tensor | Encoded:
        """What the model takes: images, or the features that were kept of them."""
        if "features" not in batch:
            return batch["image"].to(self._device, non_blocking=True)
        height, width = batch["mask"].shape[-2:]
        return Encoded([level.to(self._device, non_blocking=True) for level in batch["features"]], (height, width))

    @torch.no_grad()
    def evaluate(
        self, engine: deepspeed.DeepSpeedEngine, rank: int, world_size: int, *, final: bool
    ) -> dict[str, float]:
        """Image and pixel AUROC on the held-out images, which the ranks share out.

        With ``final``, since it takes far longer, also how right a language model's answers are. Only rank 0 gets the
        result.
        """
        share = range(rank, self._lengths[1], world_size)
        own = Subset(self._test, even_share(self._lengths[1], rank, world_size))
        # Without gradients more images have room, and a language model answers many as fast as few.
        loader: DataLoader[Any] = DataLoader(
            own,
            batch_size=_SCORED_AT_ONCE * self._config.train.micro_batch_size,
            collate_fn=collate,
            num_workers=self._config.data.num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        engine.eval()
        scored = _joined([self._score(engine, batch, words=final) for batch in loader])
        engine.train()
        own_scores = {name: values[: len(share)] for name, values in scored.items()}
        gathered: list[dict[str, np.ndarray]] | None = [{}] * world_size if rank == 0 else None
        dist.gather_object(own_scores, gathered, dst=0)
        if gathered is None:
            return {}
        columns = _joined(gathered)
        areas = {
            "image_auroc": image_auroc(columns["score"], columns["label"]),
            "pixel_auroc": pixel_auroc(columns["map"], columns["mask"]),
        }
        for name, area in areas.items():
            if area.reason:
                log.warning("no %s: %s", name, area.reason)
        scores = {name: area.value for name, area in areas.items()}
        return scores | answer_scores(columns["said"], columns["truth"]) if "said" in columns else scores

    def _score(self, engine: deepspeed.DeepSpeedEngine, batch: Batch, *, words: bool) -> dict[str, np.ndarray]:
        images = self._images(batch)
        logits = engine(images, batch["caption"])
        columns: dict[str, np.ndarray] = {}
        if words and self.model.language is not None:
            questions = [dialogue.question for dialogue in batch["dialogue"]]
            answers = answer(self.model, images, logits, batch["caption"], questions)
            columns["said"] = statements([parse_answer(text) for text in answers])
            columns["truth"] = statements([parse_answer(dialogue.answer) for dialogue in batch["dialogue"]])
        return columns | {
            "label": batch["label"].numpy(),
            "score": AnomalyModel.score(logits).cpu().numpy(),
            "mask": batch["mask"][:, 0].numpy().astype(bool),
            "map": AnomalyModel.anomaly_map(logits).cpu().numpy(),
        }


def groups_by_rate(model: AnomalyModel, train: AnomalyTrainConfig) -> list[dict[str, Any]]:
    """The trained parameters of ``model``; prompts and language model apart if they have a rate of their own."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    words = [value for name, value in named if name.startswith("language.")]
    others = [value for name, value in named if not name.startswith("language.")]
    if not words or train.words_learning_rate is None:
        return [{"params": [*others, *words]}]
    return [{"params": others}, {"params": words, "lr": train.words_learning_rate}]


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parts' columns, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _mean_over_ranks(text: TextLoss, device: torch.device) -> Tensor:
    """This rank's share of the mean over all ranks' answer tokens, times the number of ranks.

    Gradients are averaged over ranks, so that then each token counts the same, whichever rank has it and however long
    the answers of that rank are.
    """
    tokens = torch.tensor(float(text.tokens), device=device)
    dist.all_reduce(tokens)
    return text.total * dist.get_world_size() / tokens
