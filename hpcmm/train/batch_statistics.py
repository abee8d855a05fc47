"""One set of batch-normalisation statistics for all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def merge_batch_statistics(model: nn.Module) -> None:
    """Put each batch normalisation's running statistics of all ranks together, the same on each afterwards.

    A rank's statistics are of its own images, and only rank 0's reach the checkpoint. Of R ranks with mean m_r and
    variance v_r the merged mean is mean(m_r), and the variance mean(v_r) + mean(m_r^2) - mean(m_r)^2, that of their
    images together. A collective: every rank has to call it. Free for models without trained batch normalisation.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.weight.requires_grad
    ]
    if not norms or dist.get_world_size() == 1:
        return
    means = torch.cat([_statistic(norm.running_mean) for norm in norms])
    variances = torch.cat([_statistic(norm.running_var) for norm in norms])
    moments = torch.stack([means, variances + means.square()])
    dist.all_reduce(moments)
    moments /= dist.get_world_size()
    sizes = [norm.num_features for norm in norms]
    new_means = torch.split(moments[0], sizes)
    new_variances = torch.split(moments[1] - moments[0].square(), sizes)
    for norm, mean, variance in zip(norms, new_means, new_variances, strict=True):
        _statistic(norm.running_mean).copy_(mean)
        _statistic(norm.running_var).copy_(variance)


def _statistic(buffer: torch.Tensor | None) -> torch.Tensor:
    assert buffer is not None  # track_running_stats says so
    return buffer
