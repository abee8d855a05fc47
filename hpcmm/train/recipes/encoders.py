"""Encoders that are data-parallel beside a divided language model: each rank has them whole, and works on its share.

The ranks that divide a language model between them get the same micro-batch, and would each encode all of its images
and sounds. Here each encodes some of them, and the features go to all. Under ZeRO stage 3 the encoders' parameters stay
whole on each rank, while those of the language model are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcmm import annotate
from hpcmm.config.mesh import Mesh
from hpcmm.train.structure import Structure


def group_of(mesh: Mesh, rank: int, axis: str) -> dist.ProcessGroup:
    """The rank's group along an axis, with its name. All ranks call it together, for all make all groups."""
    made = {tuple(ranks): dist.new_group(ranks) for ranks in mesh.groups(axis)}
    group: dist.ProcessGroup = made[tuple(mesh.group(rank, axis))]
    annotate.name_group(group, axis)
    return group


def share_encoders(structure: Structure, group: dist.ProcessGroup, *, partial: bool) -> None:
    """Let each rank of ``group`` encode a share of the things that each embedder is called with.

    This is done for embedders that are called with a list of things, and give the rows (rows, ...) of one after
    another. An embedder within another is left as it is. The ranks of the group must get the same lists.

    ``partial``: a rank's gradient of the features is that of its own tokens alone, as if the sequence is cut, and the
    engine sums all ranks' gradients. Else each has the whole gradient, as if linear maps are cut, and what a rank's
    share gives to the encoder's parameters is summed here.
    """
    for module in structure.outermost_embedders:
        _Shared(module, group, partial)


def keep_whole(engine: Any, structure: Structure) -> None:
    """Keep the parameters of the embedders whole on each rank of ``engine``, DeepSpeed's at ZeRO stage 3.

    Their gradients and optimizer states stay divided.
    """
    optimizer = engine.optimizer
    kept = {id(parameter) for parameter in optimizer.persistent_parameters}
    for module in structure.embedders.values():
        for parameter in module.parameters():
            if id(parameter) not in kept:
                kept.add(id(parameter))
                setattr(parameter, "ds_persist", True)  # noqa: B010 -- DeepSpeed's own attribute
                optimizer.persistent_parameters.append(parameter)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def shares(sizes: Sequence[int], ranks: int) -> list[range]:
    """Neighbouring things for each rank, so that the sums of their sizes are about the same.

    A thing goes to the rank in whose share of the whole its middle lies.
    """
    total = max(1, sum(sizes))
    ends = accumulate(sizes)
    owners = [min(ranks - 1, (2 * end - size) * ranks // (2 * total)) for size, end in zip(sizes, ends, strict=True)]
    starts = [sum(owner < rank for owner in owners) for rank in range(ranks + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(ranks)]


class _Shared:
    """One embedder, whose calls are shared."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, partial: bool) -> None:
        self._group, self._partial = group, partial
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._sharing = self._idle = False
        module.register_forward_pre_hook(self._own_share)
        module.register_forward_hook(self._all_features)
        if not partial:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._sum)  # type: ignore[no-untyped-call]

    def _own_share(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        things: Any = arguments[0] if arguments else None
        self._sharing = isinstance(things, (list, tuple)) and len(things) > 0
        if not self._sharing:
            return None
        sizes = [thing.numel() if isinstance(thing, Tensor) else 1 for thing in things]
        mine = shares(sizes, self._ranks)[self._rank]
        self._idle = not mine
        # A rank without a share runs, too: it takes part in collectives within, and in those of the gradients.
        own = [things[sizes.index(min(sizes))]] if self._idle else things[mine.start : mine.stop]
        return (own, *arguments[1:])

    def _all_features(self, _module: nn.Module, _arguments: tuple[Any, ...], features: Tensor) -> Tensor | None:
        if not self._sharing:
            return None
        own = features[:0] if self._idle else features
        gathered: Tensor = _Gather.apply(own, self._group, self._partial)  # type: ignore[no-untyped-call]
        return gathered

    def _sum(self, gradient: Tensor) -> Tensor:
        if not self._sharing:  # each rank did all of it
            return gradient
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self._group)
        return gradient


class _Gather(torch.autograd.Function):
    """The rows (own rows, ...) of all ranks, one rank's after another's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(ranks)]
        dist.all_gather(counts, torch.tensor([len(own)], device=own.device), group=group)
        rows = [int(count) for count in counts]
        longest = max(rows)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=group)
        ctx.group, ctx.partial, ctx.own = group, partial, (sum(rows[:rank]), rows[rank])
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.partial:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.group)
        return gradient.narrow(0, *ctx.own).contiguous(), None, None
