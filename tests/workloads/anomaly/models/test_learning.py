"""The whole chain learns: stand-ins, data set, model, loss, scores, in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hpcmm.workloads.anomaly.data.anomaly import TestImages, build_datasets, collate
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.models import AnomalyModel, build_model
from hpcmm.workloads.anomaly.models.losses import LossLearner
from hpcmm.workloads.anomaly.models.scores import image_auroc
from hpcmm.workloads.anomaly.schema import AnomalyTrainConfig, DataConfig, ModelConfig

STEPS = 30
DATA = DataConfig(
    image_size=64,
    categories=["brick", "coins"],
    train_images_per_category=16,
    test_images_per_category=24,
    anomaly_probability=0.6,
)
MODEL = ModelConfig(decoder_width=64, text_adapter_width=128)


@torch.no_grad()
def score(model: AnomalyModel, test: TestImages) -> float:
    """Image AUROC on the held-out images."""
    batch = collate(list(test))
    scores = model.score(model(batch["image"], batch["caption"]))
    return image_auroc(scores.numpy(), batch["label"].numpy()).value


def test_loss_falls_and_unseen_defects_are_found(tmp_path: Path):
    generate(tmp_path / "set", replace(DATA, categories=[]), seed=0)
    train, test = build_datasets(tmp_path / "set", DATA, seed=0)
    model, loss = build_model(MODEL, seed=0), LossLearner(AnomalyTrainConfig())
    before = score(model, test)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=1e-3)
    losses = []
    for step in range(STEPS):
        batch = collate([train[step * 16 + place] for place in range(16)])
        total, _ = loss(model(batch["image"], batch["caption"]), batch["mask"])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())

    assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:4])
    assert before < 0.7
    assert score(model, test) > 0.75
