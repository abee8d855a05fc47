"""The axes of a mesh, one module each: how a model that knows nothing of them is cut along it."""

from __future__ import annotations

from hpcmm.config.mesh import EXPERT, PIPELINE, SEQUENCE, TENSOR, Mesh
from hpcmm.config.schema import Encoders, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.engine import Engine, WholeEngine
from hpcmm.train.recipes.encoders import group_of, keep_whole, share_encoders
from hpcmm.train.structure import Structure
from hpcmm.train.workload import Training, trained_parameters

ZERO_OF_PARAMETERS = 3
"""The stage of ZeRO that divides parameters."""


def build(training: Training, config: RunConfig, mesh: Mesh, rank: int) -> Engine:
    """The engine that trains ``training.model`` on the mesh. All ranks call it together.

    Raises HpcmmError if the model has no structure to be cut along one of the mesh's axes, or no parameter trains.
    """
    if not trained_parameters(training.model):
        raise HpcmmError(
            "Nothing of the model trains, for all its parameters are frozen: let one of its parts train, such as "
            "connectors or LoRA."
        )
    structure = _structure(training, config, mesh)
    if structure is None:
        return WholeEngine(training, config, mesh, rank)
    if mesh.pipeline > 1:
        from hpcmm.train.recipes.pipeline import PipelineEngine  # noqa: PLC0415 - other recipes do without

        return PipelineEngine(training, config, mesh, rank, structure)
    whole_encoders = config.parallel.encoders is Encoders.replicated
    sequence_group = None
    if mesh.sequence > 1:
        from hpcmm.train.recipes.sequence import shard_sequence  # noqa: PLC0415 -- it imports transformers

        sequence_group = group_of(mesh, rank, SEQUENCE)
        shard_sequence(structure, sequence_group, config.parallel.attention)
        if whole_encoders:
            share_encoders(structure, sequence_group, partial=True)
    if mesh.tensor > 1 or mesh.expert > 1:
        from hpcmm.train.recipes.cut import CutEngine  # noqa: PLC0415 -- as above

        engine: WholeEngine = CutEngine(training, structure, config, mesh, rank)
    else:
        engine = WholeEngine(training, config, mesh, rank, sequence_group=sequence_group)
    if whole_encoders and config.parallel.zero_stage == ZERO_OF_PARAMETERS:
        keep_whole(engine.deepspeed, structure)
    return engine


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
