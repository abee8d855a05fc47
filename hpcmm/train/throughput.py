"""What a rank notes of a step beside its loss: tokens, operations, peak memory, and of some steps what it exchanges.

Each rank notes its part, so that the sums over the ranks are the step's: of the ranks that share a micro-batch the
first notes the tokens and the network's operations, and each what its encoders did.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hpcmm.annotate.collectives import Exchange, counted_bytes
from hpcmm.annotate.groups import named_groups
from hpcmm.config.mesh import DATA, Mesh
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.schema import Encoders, Precision, RunConfig
from hpcmm.runs.metrics import COMM_BYTES, MetricsWriter
from hpcmm.train.engine import Engine
from hpcmm.train.flops import MeasuredFlops, TransformerFlops
from hpcmm.train.peaks import peak_flops
from hpcmm.train.workload import Training

BYTES_COUNTED_IN = range(1, 4)
"""The steps of an attempt whose collectives are counted. To count one costs some 0.1 ms, so it is not done in all."""


class Throughput:
    """Counts what goes through the model. Make it before the engine, while the model's parameters are whole."""

    def __init__(self, training: Training, shape: ModelShape | None, config: RunConfig) -> None:
        """``shape``: of the network in the training's structure, if there is one."""
        self._training = training
        self._config = config
        self._structure = structure = training.structure()
        self._network: TransformerFlops | None = None
        if structure is not None and shape is not None:
            recomputes = config.parallel.activation_checkpointing
            before = [*structure.embedders.values(), structure.network.model.embed_tokens]
            self._network = TransformerFlops.of(shape, structure.network, before, recomputes=recomputes)
        self._measured = MeasuredFlops([])
        self._is_first = False
        self._same_encoders = 1
        self._values: dict[str, float] = {}
        self._steps = 0
        self._mesh, self._rank = Mesh(), 0

    def attach(self, engine: Engine, rank: int) -> None:
        """Count what the modules of the engine's model do, from now on."""
        mesh = engine.mesh
        self._mesh, self._rank = mesh, rank
        self._is_first = not any(place for axis, place in mesh.coordinates(rank).items() if axis != DATA)
        if self._network is not None and self._structure is not None:
            self._measured = MeasuredFlops(self._structure.outermost_embedders)
            if self._config.parallel.encoders is not Encoders.replicated:  # else each encodes its own share
                self._same_encoders = mesh.sequence * mesh.tensor
        elif mesh.model_parallel == 1:
            self._measured = MeasuredFlops([self._training.model])

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches as they come."""
        for batch in batches:
            lengths = self._training.lengths(batch) if self._is_first else None
            if self._is_first:
                self._add("samples", self._config.train.micro_batch_size)
            if lengths is not None:
                self._add("input_tokens", sum(lengths))
                if self._network is not None:
                    flops = self._network.of_examples(lengths, self._training.tokens(batch))
                    self._add("model_flops", flops.model)
                    self._add("hardware_flops", flops.hardware)
            yield batch

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all of a step's computation."""
        self._measured.counts = True
        try:
            if self._steps in BYTES_COUNTED_IN:
                with counted_bytes() as exchanged:
                    yield
                by_axis = bytes_by_axis(exchanged, self._mesh, self._rank)
                self._values |= {f"{COMM_BYTES}{name}": count for name, count in by_axis.items()}
            else:
                yield
        finally:
            self._measured.counts = False
            self._steps += 1

    def take(self, device: torch.device) -> dict[str, float]:
        """What the step that is over adds to its record; names of what is not known are left out."""
        measured = self._measured.take() / self._same_encoders
        if measured:
            self._add("model_flops", measured)
            self._add("hardware_flops", measured)
        values, self._values = self._values, {}
        if values.get("hardware_flops") == values.get("model_flops"):
            values.pop("hardware_flops", None)
        return {**values, "peak_memory_bytes": peak_memory_bytes(device)}

    def _add(self, name: str, value: float) -> None:
        self._values[name] = self._values.get(name, 0.0) + value


def bytes_by_axis(exchanged: Mapping[Exchange, int], mesh: Mesh, rank: int) -> dict[str, float]:
    """What ``rank`` exchanged, by what the groups are for: ``data``, ``data_x_sequence``, ``other``.

    Of sends and receives the sends count, for each message is in both. They lie along the axis that both ranks differ
    in, whichever group carries them: DeepSpeed's pipeline sends in that of all ranks.
    """
    found: dict[str, float] = {}
    here = mesh.coordinates(rank)
    for each, count in exchanged.items():
        if each.op == "recv":
            continue
        mark = named_groups().get(each.group)
        name = "other" if mark is None else mark.name
        if each.peer is not None:
            there = mesh.coordinates(each.peer)
            name = " x ".join(axis for axis in here if here[axis] != there[axis])
        name = name.replace(" ", "_")
        found[name] = found.get(name, 0.0) + count
    return found


def peak_memory_bytes(device: torch.device) -> float:
    """The most that this process has ever had of its device's memory; on a CPU of the node's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def note_device(metrics: MetricsWriter, device: torch.device, precision: Precision) -> None:
    """Record what the rank computes on, and how fast that could be."""
    rounded = precision is Precision.fp32 and torch.get_float32_matmul_precision() != "highest"
    inputs = "tf32" if rounded and device.type == "cuda" else str(precision.value)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, inputs) if device.type == "cuda" else None
    metrics.device(name=name, precision=inputs, peak_flops=peak)
