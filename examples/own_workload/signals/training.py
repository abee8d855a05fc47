"""The half with torch: model, batches, loss and scores of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from hpcmm.config.parts import build_part
from hpcmm.train.sampling import EndlessSampler
from hpcmm.train.workload import Training
from signals.data import CLASSES, make_batch
from signals.nets import Net
from signals.schema import NET, SignalsConfig

_TEST_SEED = 1_000_000
"""Added to the run's seed, so that held-out signals are others."""


def build_net(config: SignalsConfig) -> Net:
    """The network, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        net = build_part(config.net, NET, length=config.data.length, classes=len(CLASSES))
    assert isinstance(net, Net)
    return net


def test_batch(config: SignalsConfig) -> tuple[Tensor, Tensor]:
    """The held-out signals (N, length) and their classes (N,)."""
    return make_batch(list(range(config.data.test_examples)), config.data, config.train.seed + _TEST_SEED)


class SignalsTraining(Training):
    """One rank's share of the training."""

    def __init__(self, config: SignalsConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.model = build_net(config).to(device)

    def batches(self, rank: int, world_size: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        data, train = self._config.data, self._config.train
        for numbers in EndlessSampler(data.examples, train.micro_batch_size, rank, world_size, train.seed, first):
            yield make_batch(numbers, data, train.seed)

    def loss(self, engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        signals, labels = (each.to(self._device) for each in batch)
        loss = functional.cross_entropy(engine(signals).float(), labels)
        return loss, {"cross_entropy": loss.detach()}

    @torch.no_grad()
    def evaluate(self, engine: Any, rank: int, world_size: int, *, final: bool) -> dict[str, float]:
        """The accuracy on the held-out signals, which the ranks share out."""
        del final
        signals, labels = (each[rank::world_size].to(self._device) for each in test_batch(self._config))
        engine.eval()
        right = (engine(signals).argmax(dim=1) == labels).sum().float()
        engine.train()
        dist.all_reduce(right)
        return {"accuracy": float(right) / self._config.data.test_examples}
