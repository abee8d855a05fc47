"""A model's scores of held-out images, and the numbers that sum them up by category."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from hpcmm.evaluate.evaluation import MEAN
from hpcmm.workloads.anomaly.data.anomaly import TestImages, collate
from hpcmm.workloads.anomaly.evaluation import POOLED
from hpcmm.workloads.anomaly.models.anomaly import AnomalyModel
from hpcmm.workloads.anomaly.models.answers import answer
from hpcmm.workloads.anomaly.models.scores import best_decision, image_auroc, pixel_auroc, region_overlap
from hpcmm.workloads.anomaly.question_answering.conversations import parse_answer
from hpcmm.workloads.anomaly.question_answering.scores import Statements, answer_scores, statements


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Of N images: score (N,), label (N,), map and mask (N, side, side), category (N,).

    With a language model also what its answers say and what would be right, as
    ``hpcmm.workloads.anomaly.question_answering.scores`` writes it.
    """

    score: NDArray[np.float32]
    label: NDArray[np.int64]
    map: NDArray[np.float32]
    mask: NDArray[np.bool_]
    category: NDArray[Any]
    said: Statements | None = None
    truth: Statements | None = None


@torch.no_grad()
def score_images(
    model: AnomalyModel,
    test: TestImages,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    *,
    words: bool = True,
) -> ImageScores:
    """Score every image of ``test``, in its order. ``progress`` is told how many are done, and of how many.

    Without ``words``, which take far longer than all else, a language model is not asked.
    """
    loader: DataLoader[Any] = DataLoader(test, batch_size=batch_size, collate_fn=collate)
    parts: list[tuple[NDArray[Any], ...]] = []
    done = 0
    for batch in loader:
        images = batch["image"].to(device)
        logits = model(images, batch["caption"])
        said: tuple[Statements, ...] = ()
        if words and model.language is not None:
            questions = [dialogue.question for dialogue in batch["dialogue"]]
            answers = answer(model, images, logits, batch["caption"], questions)
            right = [dialogue.answer for dialogue in batch["dialogue"]]
            said = tuple(statements([parse_answer(text) for text in texts]) for texts in (answers, right))
        parts.append(
            (
                model.score(logits).cpu().numpy(),
                batch["label"].numpy(),
                model.anomaly_map(logits).cpu().numpy(),
                batch["mask"][:, 0].numpy() > 0.5,
                np.array(batch["category"], dtype=object),
                *said,
            )
        )
        done += len(batch["caption"])
        progress(done, len(test))
    return ImageScores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def by_category(scored: ImageScores) -> pd.DataFrame:
    """One row a category, one of all images together, and last the mean over categories.

    Columns: category, images, abnormal and the metrics (0 to 1); if there are words, also what answers without a
    look at the image would get (``words_grid_constant``, ...). A metric that a category cannot have (no defect, no
    normal image) is nan, and left out of the mean.
    """
    categories = sorted(set(scored.category))
    rows = [_row(category, scored, scored.category == category) for category in categories]
    mean = pd.DataFrame(rows).drop(columns=["category", "images", "abnormal"]).mean().to_dict()
    pooled = _row(POOLED, scored, np.ones(len(scored.category), dtype=bool))
    total = {"category": MEAN, "images": pooled["images"], "abnormal": pooled["abnormal"], **mean}
    return pd.DataFrame([*rows, pooled, total])


def _row(name: str, scored: ImageScores, own: NDArray[np.bool_]) -> dict[str, object]:
    score, label, maps, mask = scored.score[own], scored.label[own], scored.map[own], scored.mask[own]
    decision = best_decision(score, label)
    words = {}
    if scored.said is not None and scored.truth is not None:
        words = answer_scores(scored.said[own], scored.truth[own])
    return {
        "category": name,
        "images": int(own.sum()),
        "abnormal": int(label.sum()),
        "image_auroc": image_auroc(score, label).value,
        "pixel_auroc": pixel_auroc(maps, mask).value,
        "pro": region_overlap(maps, mask).value,
        "f1": decision.f1,
        "accuracy": decision.accuracy,
        **words,
    }
