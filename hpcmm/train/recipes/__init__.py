"""The axes of a mesh, one module each: how a model that knows nothing of them is cut along it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hpcmm.config.mesh import EXPERT, PIPELINE, SEQUENCE, TENSOR, Mesh
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.engine import Engine, WholeEngine
from hpcmm.train.structure import Structure
from hpcmm.train.workload import Training


def build(training: Training, config: RunConfig, mesh: Mesh, rank: int) -> Engine:
    """The engine that trains ``training.model`` on the mesh. All ranks call it together.

    Raises HpcmmError if the model has no structure to be cut along one of the mesh's axes.
    """
    structure = _structure(training, config, mesh)
    if mesh.pipeline > 1:
        from hpcmm.train.recipes.pipeline import PipelineEngine  # noqa: PLC0415 - other recipes do without

        assert structure is not None
        return PipelineEngine(training, config, mesh, rank, structure)
    settings: dict[str, Any] = {}
    if structure is not None and mesh.sequence > 1:
        from hpcmm.train.recipes.sequence import shard_sequence  # noqa: PLC0415 -- it imports transformers

        group, _ = dist.new_subgroups_by_enumeration(mesh.groups(SEQUENCE))  # type: ignore[no-untyped-call]
        shard_sequence(structure, group, config.parallel.attention)
    # The ranks that share a sequence are data ranks to DeepSpeed: see the sequence recipe.
    return WholeEngine(training, config, mesh, rank, settings=settings, averaged=mesh.data * mesh.sequence)


def _structure(training: Training, config: RunConfig, mesh: Mesh) -> Structure | None:
    cut = [axis for axis in (PIPELINE, SEQUENCE, TENSOR, EXPERT) if getattr(mesh, axis) > 1]
    structure = training.structure()
    if structure is None and cut:
        raise HpcmmError(
            f"parallel.mesh.{cut[0]} is {getattr(mesh, cut[0])}, but {type(training).__name__}.structure() gives "
            "nothing that could be cut: leave it out."
        )
    if config.parallel.activation_checkpointing:
        training.checkpoint_activations()
    return structure
