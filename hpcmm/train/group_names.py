"""What the process groups of a rank are for: DeepSpeed's own by its tables, all others by who is in them."""

from __future__ import annotations

from itertools import combinations

import torch.distributed as dist
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from hpcmm import annotate
from hpcmm.annotate.groups import named_groups
from hpcmm.annotate.schema import REPLICAS
from hpcmm.config.mesh import AXES, DATA, EXPERT, SEQUENCE, Mesh


def name_process_groups(mesh: Mesh) -> list[str]:
    """Name the groups that this rank is a member of by now, except those that have a name. Returns all groups' marks.

    On a mesh whose axes have several ranks, the ranks of a group tell along which axes it lies. Expert groups may have
    the same ranks as others, so that they go by DeepSpeed's own tables.
    """
    for name, known in (
        (EXPERT, groups._get_expert_parallel_group_dict),
        (REPLICAS, groups._get_expert_data_parallel_group_dict),
    ):
        for group in known().values():
            _name(group, name)
    by_ranks = _axes_by_ranks(mesh, dist.get_rank())
    for group in list(distributed_c10d._world.pg_names):
        if isinstance(group, dist.ProcessGroup):
            _name(group, by_ranks.get(tuple(sorted(dist.get_process_group_ranks(group))), ""))
    return [mark.format() for mark in named_groups().values()]


def _name(group: dist.ProcessGroup, name: str) -> None:
    if name and group.group_name not in named_groups() and dist.get_world_size(group) > 1:
        annotate.name_group(group, name)


def _axes_by_ranks(mesh: Mesh, rank: int) -> dict[tuple[int, ...], str]:
    """Names of the groups of ``rank`` along the mesh's axes, by their members.

    All ranks together are a group for something only along data and sequence, over both of which gradients are
    averaged, or if the mesh has one axis. The group that shares a sequence has a name from the recipe that made it, so
    that what else has its ranks averages gradients, too.
    """
    axes = [axis for axis in AXES if getattr(mesh, axis) > 1]
    if axes == [SEQUENCE]:
        return {tuple(mesh.group(rank, SEQUENCE)): f"{DATA} x {SEQUENCE}"}
    found: dict[tuple[int, ...], str] = {}
    for count in range(1, len(axes) + 1):
        for chosen in combinations(axes, count):
            if count < len(axes) or count == 1 or set(chosen) <= {DATA, SEQUENCE}:
                found.setdefault(tuple(mesh.group(rank, *chosen)), " x ".join(chosen))
    if mesh.expert > 1:
        found.setdefault(tuple(mesh.group(rank, EXPERT)), EXPERT)
    return found
