"""A frozen language model with LoRA under DeepSpeed: what trains, what a checkpoint holds, two ranks as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import hashlib, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from hpcmm.worker.distributed import select_accelerator
select_accelerator()
from hpcmm.node.cache import extensions_dir
from hpcmm.worker.compiled_ops import load_ops
from hpcmm.worker.environment import RankEnvironment
from hpcmm.worker.distributed import leave_group
from hpcmm.config.schema import *
from hpcmm.workloads.anomaly.schema import *
load_ops(extensions_dir(ClusterConfig(name="test")))
import deepspeed
from hpcmm.runs.run_dir import RunDir
from hpcmm.workloads.anomaly.models.losses import LossLearner
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.training import _mean_over_ranks
from hpcmm.train.checkpoint import Checkpoints
from hpcmm.train.engine import WholeEngine
from hpcmm.config.mesh import Mesh
from hpcmm.train.workload import Training
from hpcmm.train.checkpoint import start_from
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue

class ModelAlone(Training):
    def __init__(self, model):
        self.model = model

    def batches(self, rank, world_size, first):
        return iter(())

    def loss(self, engine, batch):
        raise AssertionError

torch.set_num_threads(1)
folder = Path(sys.argv[1])
deepspeed.init_distributed("gloo", verbose=False)
rank, world = dist.get_rank(), dist.get_world_size()
place = RankEnvironment(rank, rank, world, world, "0", "here", "127.0.0.1", int(os.environ["MASTER_PORT"]))
run = RunDir(folder / f"run-{world}")
if rank == 0:
    run.create()
dist.barrier()
model_config = ModelConfig(decoder_width=32, text_adapter_width=32, llm=LlmConfig(kind=LlmKind.tiny, lora_rank=2))
config = AnomalyConfig(
    name="test",
    cluster=ClusterConfig(name="test", nodes=1, ranks_per_node=world),
    model=model_config,
    train=AnomalyTrainConfig(micro_batch_size=2 // world, learning_rate=1e-2, warmup_steps=0, gradient_clip=1e9),
    parallel=ParallelConfig(zero_stage=2, precision=Precision.fp32),
)
model = build_model(model_config, 0)
before = {name: value.clone() for name, value in model.state_dict().items()}
whole = WholeEngine(ModelAlone(model), config, Mesh(data=world), rank)
engine = whole.deepspeed
learner = LossLearner(config.train)
generator = torch.Generator().manual_seed(0)
images = torch.randn(2, 3, 64, 64, generator=generator)
mask = torch.zeros(2, 1, 64, 64)
dialogues = [Dialogue("Where?", "Yes, there is an anomaly at the top left and the bottom right."), Dialogue("?", "No.")]
own = slice(rank, rank + 1) if world == 2 else slice(0, 2)
losses = []
for step in range(3):
    logits, text = engine(images[own], ["a lawn", "a wall"][own], dialogues[own])
    mean = _mean_over_ranks(text, torch.device("cpu"))
    losses.append(mean.detach().double())
    engine.backward(learner(logits, mask[own], mean)[0])
    engine.step()
Checkpoints(run, place, 2).save(whole, 3, {})
total = torch.stack(losses)
dist.all_reduce(total)
changed = sorted(name for name, value in model.state_dict().items() if not torch.equal(value, before[name]))
if rank == 0:
    fresh = build_model(model_config, 1)
    start_from(fresh, str(run.root))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    difference = max(
        float((value.float() - model.state_dict()[name].float()).abs().max())
        for name, value in fresh.named_parameters() if name in trained
    )
    from hpcmm.train.checkpoint import read_trained
    held = [name for name in read_trained(run) if name not in dict(model.named_buffers())]
    print("FACTS" + json.dumps({
        "text": (total / world).tolist(), "changed": changed, "trained": sorted(trained), "held": sorted(held),
        "difference": difference, "tied": model.language.llm.config.tie_word_embeddings,
    }))
dist.barrier()
engine.destroy()
leave_group()
"""


def run_ranks(folder: Path, world: int) -> dict:
    processes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", RANK, str(folder)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, outputs[0][1][-3000:]
    line = next(line for line in outputs[0][0].splitlines() if line.startswith("FACTS"))
    return json.loads(line.removeprefix("FACTS"))


@pytest.mark.timeout(600)
def test_lora_trains_alone_and_two_ranks_are_one(tmp_path: Path, compiled_ops):
    two = run_ranks(tmp_path, 2)
    lora = [name for name in two["trained"] if "lora_" in name]
    assert len(lora) == 16
    assert set(lora) <= set(two["changed"])
    base = [name for name in two["changed"] if name.startswith("language.llm.") and "lora_" not in name]
    assert base == []
    assert two["tied"]  # so that the frozen embedding has a second name
    assert two["held"] == two["trained"]
    assert two["difference"] < 1e-6
    one = run_ranks(tmp_path, 1)
    # Answers of 66 and 4 tokens: a mean of the ranks' means would be another loss.
    assert two["text"] == pytest.approx(one["text"], rel=1e-3)
