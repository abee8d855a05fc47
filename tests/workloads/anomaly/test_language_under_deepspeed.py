"""A frozen language model with LoRA under DeepSpeed: what trains, what a checkpoint holds, two ranks as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from real_ranks import run_ranks

from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import ClusterConfig, ParallelConfig, Precision
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.workload import Training
from hpcmm.worker.environment import RankEnvironment
from hpcmm.workloads.anomaly.models import AnomalyModel, build_model
from hpcmm.workloads.anomaly.models.losses import LossLearner
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig, LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.anomaly.training import _mean_over_ranks

MODEL = ModelConfig(decoder_width=32, text_adapter_width=32, llm=LlmConfig(kind=LlmKind.tiny, lora_rank=2))
DIALOGUES = [Dialogue("Where?", "Yes, there is an anomaly at the top left and the bottom right."), Dialogue("?", "No.")]


class ModelAlone(Training):
    def __init__(self, model: AnomalyModel) -> None:
        self.model = model

    def batches(self, *_: int) -> Iterator[Any]:
        return iter(())

    def loss(self, *_: Any) -> Any:
        raise AssertionError


def config_of(world: int) -> AnomalyConfig:
    return AnomalyConfig(
        name="test",
        cluster=ClusterConfig(name="test", nodes=1, ranks_per_node=world),
        model=MODEL,
        train=AnomalyTrainConfig(micro_batch_size=2 // world, learning_rate=1e-2, warmup_steps=0, gradient_clip=1e9),
        parallel=ParallelConfig(zero_stage=2, precision=Precision.fp32),
    )


def trained(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Three steps on a rank, and what it finds of the model and of its checkpoint."""
    from hpcmm.train.checkpoint import Checkpoints, read_trained, start_from
    from hpcmm.train.engine import WholeEngine

    place = RankEnvironment(rank, rank, world, world, "0", "here", "127.0.0.1", 1)
    run = RunDir(folder / f"run-{world}")
    if rank == 0:
        run.create()
    dist.barrier()
    config = config_of(world)
    model = build_model(MODEL, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = WholeEngine(ModelAlone(model), config, Mesh(data=world), rank)
    engine = whole.deepspeed
    learner = LossLearner(config.train)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    mask = torch.zeros(2, 1, 64, 64)
    own = slice(rank, rank + 1) if world == 2 else slice(0, 2)
    losses = []
    for _ in range(3):
        logits, text = engine(images[own], ["a lawn", "a wall"][own], DIALOGUES[own])
        mean = _mean_over_ranks(text, torch.device("cpu"))
        losses.append(mean.detach().double())
        engine.backward(learner(logits, mask[own], mean)[0])
        engine.step()
    Checkpoints(run, place, 2).save(whole, 3, {})
    total = torch.stack(losses)
    dist.all_reduce(total)
    after = model.state_dict()
    fresh = build_model(MODEL, 1)
    start_from(fresh, str(run.root))
    names = sorted(name for name, value in model.named_parameters() if value.requires_grad)
    buffers = dict(model.named_buffers())
    return {
        "text": (total / world).tolist(),
        "changed": sorted(name for name, value in after.items() if not torch.equal(value, before[name])),
        "trained": names,
        "held": sorted(name for name in read_trained(run) if name not in buffers),
        "difference": max(
            float((value.float() - after[name].float()).abs().max())
            for name, value in fresh.named_parameters()
            if name in names
        ),
        "tied": model.language.llm.config.tie_word_embeddings,  # type: ignore[union-attr]
    }


@pytest.mark.timeout(600)
def test_lora_trains_alone_and_two_ranks_are_one(tmp_path: Path, compiled_ops: None):
    two = run_ranks(2, trained, 2, tmp_path)[0]
    lora = [name for name in two["trained"] if "lora_" in name]
    assert len(lora) == 16
    assert set(lora) <= set(two["changed"])
    base = [name for name in two["changed"] if name.startswith("language.llm.") and "lora_" not in name]
    assert base == []
    assert two["tied"]  # so that the frozen embedding has a second name
    assert two["held"] == two["trained"]
    assert two["difference"] < 1e-6
    (one,) = run_ranks(1, trained, 1, tmp_path)
    # Answers of 66 and 4 tokens: a mean of the ranks' means would be another loss.
    assert two["text"] == pytest.approx(one["text"], rel=1e-3)
