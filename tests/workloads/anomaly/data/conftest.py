"""One small stand-in data set for all tests of this folder; they only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.schema import DataConfig

TRAIN, TEST = 6, 8


@pytest.fixture(scope="session")
def small() -> DataConfig:
    return DataConfig(train_images_per_category=TRAIN, test_images_per_category=TEST, image_size=64)


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory, small: DataConfig) -> Path:
    root = tmp_path_factory.mktemp("it's a folder") / "stand ins"
    generate(root, small, seed=0)
    return root
