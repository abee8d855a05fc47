"""Images that cannot be used: each is told once a process, and the count is right whoever met them."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hpcmm.config.schema import ClusterConfig
from hpcmm.workloads.anomaly.data.anomaly import build_datasets, collate
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig, DataConfig, ModelConfig, OnError

BROKEN = (1, 4)


@pytest.fixture
def damaged(standins: Path, small: DataConfig, tmp_path: Path) -> DataConfig:
    """The stand-ins with two unreadable training images."""
    shutil.copytree(standins, tmp_path / "set")
    data = replace(small, root=str(tmp_path / "set"), on_error=OnError.skip, categories=["brick", "coins"])
    for number in BROKEN:
        sorted((tmp_path / "set" / "brick" / "train" / "good").iterdir())[number].write_bytes(b"no image")
    return data


@pytest.mark.parametrize("workers", [0, 3])
def test_skipped_images_are_counted_over_all_workers(damaged: DataConfig, workers: int):
    assert damaged.root is not None
    train, _ = build_datasets(Path(damaged.root), damaged, seed=0)
    epochs = [[place] for place in range(3 * len(train))]
    items = list(DataLoader(train, batch_sampler=epochs, collate_fn=collate, num_workers=workers))
    assert len(items) == 3 * len(train)
    assert train.skipped.flags.nonzero().flatten().tolist() == list(BROKEN)


def test_each_is_told_once_and_the_total_at_the_end(
    damaged: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from hpcmm.workloads.anomaly.training import AnomalyTraining

    caplog.set_level(logging.INFO)
    config = AnomalyConfig(
        cluster=ClusterConfig(cache_dir=str(tmp_path)),
        data=damaged,
        model=ModelConfig(image_encoder="vit_tiny"),
        train=AnomalyTrainConfig(micro_batch_size=6),
    )
    training = AnomalyTraining(config, torch.device("cpu"))
    batches = training.batches(0, 1)
    for _ in range(4):  # two epochs
        next(batches)
    training.finish(0, 1)
    told = [record.getMessage() for record in caplog.records]
    assert sum("It is replaced" in message for message in told) == len(BROKEN)
    assert [message for message in told if "were skipped" in message] == ["2 of 12 training images were skipped"]
