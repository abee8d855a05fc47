"""Models are deterministic and cheap to share: one for all tests that only read it."""

from __future__ import annotations

import pytest
import torch

from hpcmm.workloads.anomaly.models import AnomalyModel, build_model
from hpcmm.workloads.anomaly.schema import ModelConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, which wait for one another on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> AnomalyModel:
    """The demo's model. Do not train it."""
    return build_model(ModelConfig(), seed=0)


@pytest.fixture
def images() -> torch.Tensor:
    """Two random images of 64 pixels."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
