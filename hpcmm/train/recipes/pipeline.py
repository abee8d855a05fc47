"""Pipeline parallelism: each stage has some of the layers, and micro-batches follow each other through the stages.

DeepSpeed's pipeline runs the stages: its schedule (one forward, one backward), its messages, its sums of tied weights.
What a stage is comes from :mod:`hpcmm.train.recipes.stages`. A step of M micro-batches over P stages keeps each rank
idle for (P - 1) / (M + P - 1) of its time. D. Narayanan et al., "PipeDream", 2019; "Megatron-LM", 2021.

Bytes: at each boundary between stages, a micro-batch of S tokens of width W and e bytes an element sends ``S W e``
forward and as much backward, beside ``8 S`` for its positions and labels and 1,024 for the row's length. Each rank of
a tensor group sends whole rows to its neighbour.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from hpcmm import annotate
from hpcmm.config.mesh import PIPELINE, TENSOR, Mesh
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.engine import CountedTokens, Engine, build_engine
from hpcmm.train.recipes import stages
from hpcmm.train.recipes.encoders import group_of
from hpcmm.train.recipes.tensor import cut_parameters, gathered, shard_tensor
from hpcmm.train.structure import Structure, TokenLoss
from hpcmm.train.weights import load_trained, trained_weights
from hpcmm.train.workload import Training

TIED = "embedding"
"""DeepSpeed's key of the weight that the first and the last stage share."""
_WHOLE_ROWS = {"pipe_partitioned": False, "grad_partitioned": False}
"""Else tensor ranks would send parts of a row, and DeepSpeed takes all rows to be as long as the first."""


class PipelineEngine(Engine):
    """A stage of the model on this rank; the ranks of one data rank are the whole model."""

    def __init__(self, training: Training, config: RunConfig, mesh: Mesh, rank: int, structure: Structure) -> None:
        """``structure``: that of ``training.model``, whose parts that other stages have lose their memory."""
        super().__init__(training, config, mesh, rank)
        place = mesh.coordinates(rank)
        self._stage = place[PIPELINE]
        chain = stages.chain_of(structure)
        bounds = _bounds(chain, structure, config, mesh)
        self._catalogue = Catalogue(training.model, chain, bounds)
        tied, device = stages.tied(structure), next(training.model.parameters()).device
        own = range(bounds[self._stage], bounds[self._stage + 1])
        names = {parameter: name for name, parameter in training.model.named_parameters()}
        kept = [chain[number] for number in own]
        self._cut, self._tensor_group = _cut_maps(training.model, structure, kept, mesh, rank)
        stages.drop(chain, own)
        self._names = {parameter: names[parameter] for parameter in stages.parameters_of(kept)}
        self._waiting = chain[0].waiting if isinstance(chain[0], stages.Embedding) and own.start == 0 else None
        self._head = chain[-1] if isinstance(chain[-1], stages.Head) and own.stop == len(chain) else None
        shared = _tied_here(chain, own) if tied else None
        groups = _own_groups(training.parameter_groups(), self._names)
        if not groups:  # stage 0 takes no hidden states, and its parameters are those of all its micro-batches
            chain[own[-1]] = anchored = stages.Anchor(chain[own[-1]], device)
            groups = [{"params": [anchored.anchor], "weight_decay": 0.0}]
        with redirect_stdout(io.StringIO()):  # it reports on its layers
            module = _Stage(chain, bounds, mesh, shared)
            _count_once(module, self._cut, counted=place[TENSOR] == 0)
            self.deepspeed = build_engine(module, config, groups, {"pipeline": _WHOLE_ROWS})
        self._drive(self.deepspeed)
        for tie in module.tied_comms.values():  # the axes' own groups are known by their ranks
            annotate.name_group(tie["group"], "pipeline")
        self._model = Chain(self)

    def _drive(self, engine: Any) -> None:
        """Put this recipe's ways in place of DeepSpeed's: where micro-batches come from, phases, and what is told."""
        annotated = {
            schedule.RecvActivation: "forward",
            schedule.ForwardPass: "forward",
            schedule.SendActivation: "forward",
            schedule.RecvGrad: "backward",
            schedule.BackwardPass: "backward",
            schedule.SendGrad: "backward",
            schedule.ReduceTiedGrads: "backward",
            schedule.ReduceGrads: "backward",
            schedule.OptimizerStep: "optimizer",
        }
        engine._INSTRUCTION_MAP = {
            **{each: _in_phase(annotated.get(each), run) for each, run in engine._INSTRUCTION_MAP.items()},
            schedule.LoadMicroBatch: _load_nothing,
        }
        engine._aggregate_total_loss = self._told
        engine._compute_loss = True

    @property
    def model(self) -> Any:
        """The chain of all stages."""
        return self._model

    @property
    def parameter_names(self) -> dict[nn.Parameter, str]:
        """See :class:`Engine`."""
        return self._names

    def step(self, batches: Iterator[Any]) -> dict[str, float]:
        """See :class:`Engine`. The first stage alone reads data."""
        tokens = 0
        if self._waiting is not None:
            for _ in range(self.rounds):
                with annotate.phase("data"):
                    self._waiting.append(next(batches))
            tokens = self._tokens(self._waiting)
        # The first stage counts for all stages.
        counted = CountedTokens(tokens * self.mesh.pipeline, self.mesh, self.device)
        if self._head is not None:
            # DeepSpeed divides by the micro-batches of a step and by the data ranks.
            self._head.share = self.rounds * self.mesh.data / counted.over_ranks()
        else:
            counted.over_ranks()
        total, labels = self.deepspeed.train_batch().tolist()
        return {"loss": total / max(1.0, labels), "tokens": labels}

    def _tokens(self, micro_batches: Iterator[Any] | Sequence[Any]) -> int:
        counts = [self.training.tokens(batch) for batch in micro_batches]
        if None in counts:
            raise HpcmmError(
                f"{type(self.training).__name__}.tokens() counts nothing, and a pipeline's loss is a sum over tokens: "
                "let it count the labels of a batch."
            )
        return sum(count or 0 for count in counts)

    def _told(self) -> Tensor:
        """The loss of this data rank's micro-batches and the number of their labels, (2,) float64, on all stages."""
        told = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self._head is not None:
            told[0] = torch.stack([each.total.double() for each in self._head.found]).sum()
            told[1] = sum(len(each.correct) for each in self._head.found)
            self._head.found.clear()
        self.broadcast(told)
        return told

    def broadcast(self, value: Tensor) -> None:
        """Give all stages what the last one has."""
        grid = self.deepspeed.grid
        dist.broadcast(value, src=grid.pp_group[-1], group=grid.get_pipe_parallel_group())

    def forward(self, batch: Any) -> TokenLoss:
        """The loss of a micro-batch, which the first stage needs alone, on all stages. Without gradients."""
        engine: Any = self.deepspeed
        if self._waiting is not None:
            self._waiting.append(batch)
        if self._head is not None:
            self._head.share = 1.0
        with torch.no_grad():
            engine._exec_schedule(engine._inference_schedule(1))
        head = torch.zeros(2, dtype=torch.float64, device=self.device)
        correct = torch.zeros(0, dtype=torch.uint8, device=self.device)
        if self._head is not None:
            found = self._head.found.pop()
            head[0], head[1] = found.total, len(found.correct)
            correct = found.correct.to(torch.uint8)
        self.broadcast(head)
        if self._head is None:
            correct = correct.new_zeros(int(head[1]))
        self.broadcast(correct)
        return TokenLoss(head[0].float(), correct.bool())

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        cut = {self._names[parameter]: dimension for parameter, dimension in self._cut.items()}
        own = {
            name: value if name not in cut else gathered(value, self._tensor_group, cut[name])
            for name, value in trained_weights(self._names)
        }
        own |= {name: buffer for name, buffer in self.training.model.named_buffers() if not buffer.is_meta}
        return self._catalogue.gathered(own, self.mesh, self.device)

    def load(self, folder: Path) -> dict[str, Any]:
        """See :class:`Engine`."""
        _, state = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        return dict(state)


class Chain:
    """The model over all stages, called as it is itself."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine

    def __call__(self, batch: Any) -> TokenLoss:
        """See :meth:`PipelineEngine.forward`."""
        return self._engine.forward(batch)

    def train(self, mode: bool = True) -> Chain:
        """As of a module."""
        self._engine.training.model.train(mode)
        self._engine.deepspeed.module.train(mode)
        return self

    def eval(self) -> Chain:
        """As of a module."""
        return self.train(False)


class Catalogue:
    """What a model's checkpoint holds, and on which stage."""

    def __init__(self, model: nn.Module, chain: Sequence[nn.Module], bounds: Sequence[int]) -> None:
        """Of the whole model. Raises HpcmmError if it trains something that no stage would have."""
        stage_of: dict[int, int] = {}
        for stage in reversed(range(len(bounds) - 1)):  # what several stages have is the first one's
            for module in chain[bounds[stage] : bounds[stage + 1]]:
                stage_of |= {id(each): stage for each in (*module.parameters(), *module.buffers())}
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if lost := [name for name, parameter in trained.items() if id(parameter) not in stage_of]:
            raise HpcmmError(
                f"{lost[0]} trains, but it is neither in the structure's network nor one of its embedders, so that no "
                "stage of a pipeline would have it: name its module in embedders."
            )
        kept = model.state_dict(keep_vars=True)
        buffers = {name: each for name, each in model.named_buffers() if name in kept}
        self._entries = [
            (name, stage_of.get(id(each), 0), tuple(each.shape), _kept_type(each))
            for name, each in {**trained, **buffers}.items()
        ]

    def gathered(self, own: dict[str, Tensor], mesh: Mesh, device: torch.device) -> dict[str, Tensor]:
        """``own`` of this rank; on rank 0 that of all stages, on the CPU. A collective."""
        rank, found = dist.get_rank(), dict[str, Tensor]()
        for name, stage, shape, dtype in self._entries:
            source = stage * (mesh.world_size // mesh.pipeline)  # its first data and tensor rank
            if rank == source:
                value = own[name].to(dtype)
                if rank:
                    dist.send(value.contiguous(), dst=0)
            elif rank == 0:
                value = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(value, src=source)
            else:
                continue
            found[name] = value.cpu() if rank == 0 else value
        return found


class _Stage(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's module of this rank's part of a chain, at bounds that hpcmm has found."""

    def __init__(
        self, chain: Sequence[nn.Module], bounds: Sequence[int], mesh: Mesh, tied: tuple[nn.Module, ...] | None
    ) -> None:
        """``tied``: the one of the chain's ends, which share a weight, that is here, if any; None: they do not."""
        self._bounds, self._tied = list(bounds), tied
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.data)
        super().__init__(list(chain), topology=topology, dynamic_shape=True)

    def _partition_layers(self, method: str = "") -> None:  # noqa: ARG002
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _index_tied_modules(self) -> dict[str, Any]:
        """The weight that the ends share: DeepSpeed sums its gradients, and counts it once in the norm."""
        if self._tied is None:
            return {}
        ends = [[pipe[0], pipe[-1]] for pipe in self._grid.pipe_groups]
        groups = [dist.new_group(ranks) for ranks in ends]  # by all ranks
        if not self._tied:
            return {}
        (module,) = self._tied
        self.tied_modules[TIED] = module
        ranks, group = next(
            (ranks, group) for ranks, group in zip(ends, groups, strict=True) if self.global_rank in ranks
        )
        if self.global_rank == ranks[-1]:
            module.weight.ds_pipe_replicated = True  # type: ignore[union-attr]
        return {TIED: {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": module}}

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:  # noqa: ARG002
        """As DeepSpeed's, for files without the frozen parameters. Raises HpcmmError if they are of another model."""
        for number, layer in enumerate(self.forward_funcs):
            path = self.ckpt_layer_path(load_dir, number)
            load_trained(checkpoint_engine.load(path, map_location="cpu"), layer)


def _bounds(chain: Sequence[nn.Module], structure: Structure, config: RunConfig, mesh: Mesh) -> list[int]:
    """Where each stage begins in the chain, and its length."""
    parallel = config.parallel
    layers = len(chain) - 2
    if parallel.pipeline_layers is None:
        costs = stages.costs_of(chain, structure, recomputed=parallel.activation_checkpointing)
        return stages.balanced(costs, mesh.pipeline)
    if len(parallel.pipeline_layers) != mesh.pipeline or sum(parallel.pipeline_layers) != layers:
        raise HpcmmError(
            f"parallel.pipeline_layers={parallel.pipeline_layers} does not fit: it needs {mesh.pipeline} numbers, one "
            f"a stage, whose sum is the language model's {layers} layers."
        )
    return stages.bounds_of(parallel.pipeline_layers)


def _own_groups(groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> list[dict[str, Any]]:
    """The groups of an optimizer, with this rank's parameters alone."""
    own = [{**group, "params": [each for each in group["params"] if each in names]} for group in groups]
    return [group for group in own if group["params"]]


def _tied_here(chain: Sequence[nn.Module], own: range) -> tuple[nn.Module, ...]:
    """Which of the modules of one weight, at the ends of the chain, this rank has."""
    first, last = chain[0], chain[-1]
    embedding = (first.parts[0],) if isinstance(first, stages.Embedding) and own.start == 0 else ()
    head = (last.lm_head,) if isinstance(last, stages.Head) and own.stop == len(chain) else ()
    return embedding or head


def _cut_maps(
    model: nn.Module, structure: Structure, kept: Sequence[nn.Module], mesh: Mesh, rank: int
) -> tuple[dict[nn.Parameter, int], Any]:
    """Cut the linear maps of this stage's layers along the tensor axis. The parameters that are cut, along which
    dimension, and the group of ranks that have the other parts.
    """
    if mesh.tensor == 1:
        return {}, None
    group = group_of(mesh, rank, TENSOR)
    shard_tensor(model, structure.network, group)
    own = set(stages.parameters_of(kept))
    return {each: cut for each, cut in cut_parameters(model).items() if each in own}, group


def _count_once(module: nn.Module, cut: Mapping[nn.Parameter, int], *, counted: bool) -> None:
    """Tell DeepSpeed whose share of the gradients' norm this rank adds: without it that of stage 0 alone is seen.

    ``cut``: parameters that each rank of a tensor group has a part of. ``counted``: whether it adds all others.
    """
    for parameter in module.parameters():
        replicated = getattr(parameter, "ds_pipe_replicated", False)
        parameter.model_parallel = not replicated and (counted or parameter in cut)  # type: ignore[attr-defined]


def _in_phase(name: str | None, run: Callable[..., Any]) -> Callable[..., Any]:
    if name is None:
        return run

    def annotated(engine: Any, **arguments: Any) -> Any:
        with annotate.phase(name):
            return run(engine, **arguments)

    return annotated


def _load_nothing(engine: Any, buffer_id: int) -> None:
    """The first stage takes its micro-batches itself: DeepSpeed would hand on tensors alone. The last needs none."""
    if engine.is_first_stage():
        engine.pipe_buffers["inputs"][buffer_id] = torch.empty(0, device=engine.device)


def _kept_type(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype
