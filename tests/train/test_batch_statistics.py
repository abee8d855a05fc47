"""Batch statistics of several ranks become those of their images together."""

from __future__ import annotations

from pathlib import Path

import torch
from real_ranks import run_ranks
from torch import nn

from hpcmm.train.workload import merge_batch_statistics
from hpcmm.workloads.anomaly.models.decoders.batch_norm import Float32BatchNorm2d

RANKS = 3


def images(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (rank + 1) * torch.randn(4, 2, 5, 5, generator=generator) + 10 * rank


def merged_on_a_rank(rank: int, folder: str) -> None:
    model = nn.Sequential(Float32BatchNorm2d(2, momentum=1.0), nn.BatchNorm2d(2).requires_grad_(False))
    model(images(rank))
    frozen = model[1].running_mean.clone()
    merge_batch_statistics(model)
    torch.save([model[0].running_mean, model[0].running_var, model[1].running_mean - frozen], f"{folder}/{rank}.pt")


def test_statistics_are_those_of_all_ranks_images(tmp_path: Path, compiled_ops: None):
    run_ranks(RANKS, merged_on_a_rank, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    together = torch.stack([images(rank) for rank in range(RANKS)])
    within = torch.stack([images(rank).var(dim=(0, 2, 3)) for rank in range(RANKS)]).mean(dim=0)
    between = together.mean(dim=(1, 3, 4)).var(dim=0, correction=0)
    for mean, variance, frozen_change in found:
        torch.testing.assert_close(mean, together.mean(dim=(0, 1, 3, 4)))
        torch.testing.assert_close(variance, within + between, rtol=1e-4, atol=1e-4)
        assert not frozen_change.any()
