"""What a rank notes of a step: each part of the work once, whoever shares it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpcmm.config.mesh import Mesh
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.schema import ParallelConfig, Precision, TrainConfig
from hpcmm.train.flops import TransformerFlops
from hpcmm.train.structure import Structure
from hpcmm.train.throughput import Throughput, note_device, peak_memory_bytes

SHAPE = ModelShape(layers=2, width=8, heads=2, kv_heads=2, head_width=4, intermediate=16, vocabulary=10)
CPU = torch.device("cpu")


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Embedded()


class Training:
    """Of a network with one encoder; a batch is the lengths of its examples."""

    def __init__(self) -> None:
        self.encoder = nn.Linear(4, 8, bias=False)
        self.model = nn.ModuleDict({"encoder": self.encoder, "network": Network()})

    def structure(self):
        network = self.model["network"]
        unused = {"embed": None, "head": None}
        return Structure(
            embedders={"encoder": self.encoder}, trunk=network, network=network, network_name="network", **unused
        )

    def lengths(self, batch):
        return batch

    def tokens(self, batch):
        return len(batch)


def step_of(training, mesh: Mesh, rank: int, shape=SHAPE, encoders=3):
    """What the last of some steps notes; the encoder runs ``encoders`` times, on 2 rows each."""
    config = SimpleNamespace(parallel=ParallelConfig(), train=TrainConfig(micro_batch_size=2))
    throughput = Throughput(training, shape, config)
    throughput.attach(SimpleNamespace(mesh=mesh), rank)
    batches = throughput.watched(iter([[3, 5]] * 4))
    for _ in range(4):
        next(batches)
        with throughput.step():
            for _ in range(encoders):
                training.encoder(torch.ones(2, 4))
        noted = throughput.take(CPU)
    return noted


def test_ranks_that_share_a_model_note_it_once() -> None:
    mesh = Mesh(data=2, tensor=2)
    training = Training()
    noted = [step_of(training, mesh, rank) for rank in range(4)]
    assert [each.get("input_tokens", 0) for each in noted] == [8, 0, 8, 0]
    assert [each.get("samples", 0) for each in noted] == [2, 0, 2, 0]
    network = TransformerFlops.of(SHAPE, training.model["network"], [], recomputes=False).of_examples([3, 5], 2).model
    of_encoder = 3 * 3 * 2 * 2 * 4 * 8
    assert sum(each["model_flops"] for each in noted) == pytest.approx(2 * (network + of_encoder))


def test_a_model_without_tokens_is_measured_as_a_whole() -> None:
    training = Training()
    training.structure = lambda: None
    training.lengths = lambda _batch: None
    training.model = training.encoder
    noted = step_of(training, Mesh(data=2), 1, shape=None)
    assert noted["model_flops"] == 3 * 3 * 2 * 2 * 4 * 8
    assert "input_tokens" not in noted
    assert "hardware_flops" not in noted


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory_bytes(CPU) < 1e12


def test_a_cpu_has_no_peak() -> None:
    noted = {}
    note_device(SimpleNamespace(device=lambda **values: noted.update(values)), CPU, Precision.bf16)
    assert noted == {"name": "CPU", "precision": "bf16", "peak_flops": None}
