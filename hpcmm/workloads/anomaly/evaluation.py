"""The anomaly detector's scores to ``hpcmm.evaluate``: its metrics, its test sets, and what the numbers mean."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcmm.config.parts import part_name
from hpcmm.evaluate.evaluation import Evaluation, Progress, Published, Scored
from hpcmm.workloads.anomaly.question_answering import scores
from hpcmm.workloads.anomaly.schema import AnomalyConfig, Layout

if TYPE_CHECKING:
    import torch

    from hpcmm.workloads.anomaly.models import AnomalyModel
    from hpcmm.workloads.anomaly.scoring import ImageScores

POOLED = "all images"
"""The row of all images together, which one threshold has to tell apart: what a run's own evaluation reports."""
METRICS = ("image_auroc", "pixel_auroc", "pro", "f1", "accuracy", *scores.METRICS)
"""Those of the words take a language model."""
TITLES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO", "f1": "F1"}
_ANSWERED_AT_ONCE = 4
"""Micro-batches whose questions a language model answers together: many take it as long as few."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What the picture needs of one run: its scores, and some images (3, side, side), normalised, by their index."""

    scores: ImageScores
    images: dict[int, NDArray[np.float32]]


class AnomalyEvaluation(Evaluation):
    """Scores of held-out images by category, and a picture of what each model marks."""

    metrics = METRICS
    titles = TITLES
    charted = ("image_auroc", "pixel_auroc")
    pooled = POOLED
    named_by = ("model/decoder=", "model.decoder=")
    samples = "the held-out images"
    columns = """image and pixel AUROC, PRO, F1, accuracy,
                   and how right the words are, if there is a language model"""
    files = "  maps.png         an image a category with its true defect and each model's heat map\n"
    notes = """A run's
model is called by its decoder and by what else a sweep set; a second run of one model and seed also by its name.
F1 is the largest over all thresholds, accuracy is the one at that threshold."""

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--test-root", metavar="FOLDER", help="score this data set instead of the run's own")
        parser.add_argument("--test-layout", choices=[layout.value for layout in Layout], help="its layout")

    def with_options(self, config: AnomalyConfig, options: Namespace) -> AnomalyConfig:
        if options.test_root is None:
            return config
        layout = Layout(options.test_layout) if options.test_layout else config.data.test_layout
        data = replace(config.data, test_root=options.test_root, test_categories=[], test_layout=layout)
        return replace(config, data=data)

    def model_name(self, config: AnomalyConfig) -> str:
        return part_name(config.model.decoder)

    def build_model(self, config: AnomalyConfig) -> AnomalyModel:
        from hpcmm.workloads.anomaly.llm_folder import ensure_llm, model_config  # noqa: PLC0415
        from hpcmm.workloads.anomaly.models import build_model  # noqa: PLC0415 -- imports torch

        ensure_llm(config)
        return build_model(model_config(config), config.train.seed)

    def score(self, model: AnomalyModel, config: AnomalyConfig, device: torch.device, progress: Progress) -> Scored:
        from hpcmm.workloads.anomaly import maps_picture  # noqa: PLC0415
        from hpcmm.workloads.anomaly.data.anomaly import build_datasets  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.anomaly.data_root import data_config, data_root  # noqa: PLC0415
        from hpcmm.workloads.anomaly.origin import origins  # noqa: PLC0415
        from hpcmm.workloads.anomaly.scoring import by_category, score_images  # noqa: PLC0415 -- imports torch

        root, data = data_root(config), data_config(config)
        _, test = build_datasets(root, data, config.train.seed)
        batch_size = config.train.micro_batch_size * (1 if model.language is None else _ANSWERED_AT_ONCE)
        found = score_images(model, test, batch_size, device, progress)
        images = {index: test[index]["image"].numpy() for index in maps_picture.chosen(found)}
        return Scored(by_category(found), *origins(root, data), shown=Shown(found, images))

    def is_comparable(self, first: Scored, other: Scored) -> bool:
        return np.array_equal(first.shown.scores.mask, other.shown.scores.mask)

    def draw(self, out: Path, results: Sequence[tuple[str, Scored]]) -> None:
        from hpcmm.workloads.anomaly import maps_picture  # noqa: PLC0415

        images = results[0][1].shown.images
        maps_picture.draw(out / "maps.png", images, [(name, scored.shown.scores) for name, scored in results])

    def remarks(self, table: pd.DataFrame) -> list[str]:
        from hpcmm.workloads.anomaly.origin import STANDINS  # noqa: PLC0415

        if STANDINS not in {*table["trained_on"], *table["scored_on"]}:
            return []
        return [
            "These are stand-ins, cut from other photographs: the scores say that training works, and nothing about "
            "MVTec-AD or VisA. They cannot be compared with published numbers."
        ]

    def published(self, table: pd.DataFrame) -> Published | None:
        from hpcmm.workloads.anomaly.origin import PUBLISHED, is_published_experiment  # noqa: PLC0415

        if not is_published_experiment(table["trained_on"], table["scored_on"]):
            return None
        return Published("accuracy", "accuracies", PUBLISHED)
