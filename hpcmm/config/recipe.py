"""How a model is spread over the ranks: the recipe that ``parallel=NAME`` chooses, and what it refuses before the job.

A recipe is one class and one file in ``conf/parallel/``. hpcmm's own are all made by :class:`Recipe`, which cuts the
model along each axis of the mesh on top of DeepSpeed; the files give it the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.config.mesh import DATA, EXPERT, PIPELINE, SEQUENCE, TENSOR, Mesh
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.parts import import_class
from hpcmm.config.schema import Encoders, Offload, Precision, RunConfig, SequenceAttention
from hpcmm.errors import HpcmmError

if TYPE_CHECKING:
    import torch

    from hpcmm.train.engine import Engine
    from hpcmm.train.workload import Training

FP8_MULTIPLE = 16
"""Divides inputs and outputs of a linear map that a GPU multiplies in fp8."""


class Recipe:
    """Spreads a model over the ranks of a mesh. Subclass it for a recipe of your own, in a module without torch."""

    def mesh(self, config: RunConfig) -> Mesh:
        """How the ranks are laid out. Raises HpcmmError if ``parallel.mesh`` does not fit their number."""
        return Mesh.of(config.parallel.mesh, config.world_size)

    def problems(self, config: RunConfig, axes: frozenset[str], shape: ModelShape | None) -> Iterator[str]:
        """A sentence for each thing that this recipe cannot do, with its reason and what to do instead.

        ``axes``: those that the workload's model can be cut along. ``shape``: its sizes, if they are known here.
        Called before anything is submitted, and again on the ranks, which may know the sizes better.
        """
        try:
            mesh = self.mesh(config)
        except HpcmmError as error:
            yield str(error)
            return
        yield from _axis_problems(config, mesh, axes)
        yield from _zero_problems(config, mesh)
        yield from _offload_problems(config, mesh)
        yield from _mixed_problems(config, mesh)
        yield from _stage_problems(config, mesh, shape)
        if config.parallel.precision is Precision.fp8:
            yield from _fp8_problems(mesh, axes, shape)
        if shape is not None:
            yield from _shape_problems(config, mesh, shape)

    def engine(self, training: Training, config: RunConfig, rank: int, device: torch.device) -> Engine | None:  # noqa: ARG002
        """What trains the model on this rank; None, the default: what hpcmm itself makes of :meth:`mesh`.

        All ranks call it together, in the process group. Raises HpcmmError for what only a rank can see.
        """
        return None


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of the run. Raises HpcmmError if ``parallel._target_`` names none."""
    target = config.parallel._target_
    if target is None:
        return Recipe()
    found = import_class(target)
    if not issubclass(found, Recipe):
        raise HpcmmError(f"{target} is not a recipe: it must be a subclass of hpcmm.config.recipe.Recipe.")
    return found()


def _axis_problems(config: RunConfig, mesh: Mesh, axes: frozenset[str]) -> Iterator[str]:
    for axis in (PIPELINE, SEQUENCE, TENSOR, EXPERT):
        size = getattr(mesh, axis)
        if size > 1 and axis not in axes:
            others = ", ".join(sorted(axes))
            yield (
                f"parallel.mesh.{axis} is {size}, but this workload's model, as it is configured, cannot be cut along "
                f"{axis}: leave it out. It can be along {others}."
            )
    if config.parallel.encoders is Encoders.replicated and axes == {DATA}:
        yield (
            "parallel.encoders=replicated keeps whole encoders beside a divided language model, but this workload's "
            "model does not tell one from the other: leave it out."
        )


def _zero_problems(config: RunConfig, mesh: Mesh) -> Iterator[str]:
    parallel = config.parallel
    stage = parallel.zero_stage
    if mesh.pipeline > 1 and stage > 1:
        yield (
            f"parallel.zero_stage is {stage} with a pipeline, whose stages keep their gradients from micro-batch to "
            "micro-batch, so that ZeRO cannot give parts of them away: set parallel.zero_stage=1."
        )
    if mesh.pipeline > 1 and stage == 0 and parallel.precision is not Precision.fp32:
        yield (
            f"parallel.zero_stage is 0 with a pipeline in {parallel.precision}, whose checkpoints DeepSpeed cannot "
            "load again: set parallel.zero_stage=1."
        )
    if mesh.expert > 1 and stage == 0:
        yield (
            "parallel.zero_stage is 0 with experts, for which DeepSpeed clips by each rank's own norm and, in bf16, "
            "keeps no float32 weights, so that the ranks drift apart: set parallel.zero_stage=1."
        )
    if mesh.expert > 1 and stage == 3 and (mesh.tensor > 1 or mesh.sequence > 1):
        yield (
            "parallel.zero_stage is 3 with experts on a mesh that also cuts "
            f"{TENSOR if mesh.tensor > 1 else SEQUENCE}, which DeepSpeed's AutoEP does not do: set "
            "parallel.zero_stage=2."
        )


def _offload_problems(config: RunConfig, mesh: Mesh) -> Iterator[str]:
    parallel = config.parallel
    optimizer, parameters = parallel.offload_optimizer, parallel.offload_parameters
    if optimizer is not Offload.none and parallel.zero_stage == 0:
        yield (
            f"parallel.offload_optimizer is {optimizer}, but without ZeRO there are no optimizer states to move: set "
            "parallel.zero_stage to 1, 2 or 3."
        )
    if parameters is not Offload.none and parallel.zero_stage != 3:
        yield (
            f"parallel.offload_parameters is {parameters}, but only ZeRO stage 3 divides parameters: set "
            "parallel.zero_stage=3."
        )
    if Offload.nvme in (optimizer, parameters):
        if parallel.zero_stage != 3:
            yield "Offloading to NVMe takes ZeRO stage 3: set parallel.zero_stage=3, or offload to cpu."
        if parallel.nvme_path is None:
            yield "parallel.nvme_path is not given: name a folder on the nodes' own NVMe disks."
        elif not Path(parallel.nvme_path).is_absolute():
            yield (
                f"parallel.nvme_path is {parallel.nvme_path!r}, which would be a folder of wherever the job runs: give "
                "the whole path of one on the nodes' own NVMe disks."
            )
    if mesh.expert > 1 and mesh.tensor > 1 and (optimizer is not Offload.none or parameters is not Offload.none):
        yield (
            "parallel.offload_optimizer does not work in DeepSpeed's AutoEP if tensor is cut, too: set it to none, or "
            "leave parallel.mesh.tensor out."
        )
    if mesh.pipeline > 1 and (optimizer is not Offload.none or parameters is not Offload.none):
        yield "parallel.offload_optimizer does not work with a pipeline in DeepSpeed: set it to none."


def _mixed_problems(config: RunConfig, mesh: Mesh) -> Iterator[str]:
    """Axes that do not go together."""
    pairs = (
        (PIPELINE, SEQUENCE, "the stages of DeepSpeed's pipeline hand on whole sequences"),
        (PIPELINE, EXPERT, "DeepSpeed's AutoEP looks for experts in a whole model, not in stages"),
        (SEQUENCE, TENSOR, "both cut a layer's attention heads, and DeepSpeed's groups know one of them at a time"),
        (SEQUENCE, EXPERT, "DeepSpeed's expert groups are made of data ranks alone"),
    )
    for one, other, reason in pairs:
        if getattr(mesh, one) > 1 and getattr(mesh, other) > 1:
            yield (
                f"parallel.mesh has {one} {getattr(mesh, one)} and {other} {getattr(mesh, other)}, but {reason}: set "
                f"one of them to 1."
            )
    if config.parallel.encoders is Encoders.replicated and mesh.model_parallel == 1 and config.parallel.zero_stage < 3:
        yield (
            "parallel.encoders=replicated keeps whole encoders beside a divided language model, and this recipe "
            "divides none: set parallel.zero_stage=3, or a mesh with tensor or sequence."
        )
    if config.parallel.encoders is Encoders.replicated and mesh.pipeline > 1:
        yield "parallel.encoders=replicated does not go with a pipeline, whose first stage has them: leave it out."


def _stage_problems(config: RunConfig, mesh: Mesh, shape: ModelShape | None) -> Iterator[str]:
    layers = config.parallel.pipeline_layers
    if layers is None:
        return
    said = f"parallel.pipeline_layers={list(layers)}"
    if mesh.pipeline == 1:
        yield f"{said}, but there is one stage: set parallel.mesh.pipeline, or leave it out."
    elif len(layers) != mesh.pipeline:
        yield f"{said} has {len(layers)} numbers for {mesh.pipeline} stages: give one for each."
    elif min(layers) < 1:
        yield f"{said} leaves a stage without layers: give each at least 1."
    elif shape is not None and sum(layers) != shape.layers:
        yield f"{said} is {sum(layers)} layers, but the language model has {shape.layers}: let them sum to that."


def _fp8_problems(mesh: Mesh, axes: frozenset[str], shape: ModelShape | None) -> Iterator[str]:
    """Of a model in which nothing would multiply in fp8."""
    said, otherwise = "parallel.precision is fp8", "set parallel.precision=bf16"
    if axes == {DATA}:
        yield (
            f"{said}, which is for the linear maps of a language model, and this workload's model does not tell where "
            f"it has one: {otherwise}."
        )
    if mesh.tensor > 1:
        yield (
            f"{said}, but parallel.mesh.tensor is {mesh.tensor}, and the maps that AutoTP puts in place of the model's "
            f"own multiply in bf16: leave parallel.mesh.tensor out, or {otherwise}."
        )
    if shape is not None and shape.frozen:
        yield (
            f"{said}, which is for linear maps of the language model that train, and the language model is frozen: "
            f"{otherwise}."
        )
    if shape is not None and shape.width % FP8_MULTIPLE:
        yield (
            f"{said}, for which GPUs ask for widths that {FP8_MULTIPLE} divides, but the language model's is "
            f"{shape.width}: {otherwise}."
        )


def _shape_problems(config: RunConfig, mesh: Mesh, shape: ModelShape) -> Iterator[str]:
    if mesh.pipeline > shape.layers:
        yield (
            f"parallel.mesh.pipeline is {mesh.pipeline}, but the language model has {shape.layers} layers: set it to "
            f"at most {shape.layers}."
        )
    if shape.heads % mesh.tensor or shape.kv_heads % mesh.tensor:
        yield (
            f"parallel.mesh.tensor is {mesh.tensor}, but the language model has {shape.heads} heads and "
            f"{shape.kv_heads} of keys and values, which each rank must get as many of: choose a divisor of both."
        )
    inner = shape.dense_intermediate if shape.experts else shape.intermediate
    if inner % mesh.tensor:
        yield (
            f"parallel.mesh.tensor is {mesh.tensor}, but the language model's feed-forward networks are "
            f"{inner} wide, of which each rank must get as much: choose a divisor."
        )
    if config.parallel.attention is SequenceAttention.ulysses and shape.heads % mesh.sequence:
        yield (
            f"parallel.mesh.sequence is {mesh.sequence}, but the language model has {shape.heads} heads, which Ulysses "
            "gives each rank as many of: choose a divisor, or parallel.attention=ring, which divides no heads."
        )
    if mesh.expert > 1 and not shape.experts:
        yield f"parallel.mesh.expert is {mesh.expert}, but the language model has no experts: leave it out."
    elif shape.experts and shape.experts % mesh.expert:
        yield (
            f"parallel.mesh.expert is {mesh.expert}, but the language model has {shape.experts} experts a layer: "
            "choose a divisor."
        )
    if shape.experts and shape.frozen and mesh.expert > 1 and config.parallel.zero_stage == 3:
        yield (
            "parallel.zero_stage is 3 and the language model's experts are frozen, which DeepSpeed's AutoEP cannot "
            "save in a checkpoint: set parallel.zero_stage=2."
        )
    if shape.experts and mesh.tensor > 1 and mesh.expert == 1:
        yield (
            f"parallel.mesh.tensor is {mesh.tensor} and the language model has {shape.experts} experts, whose maps "
            "AutoTP does not divide by itself: add parallel.mesh.expert, or leave tensor out."
        )
