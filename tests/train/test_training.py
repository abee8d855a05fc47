"""A workload that is written from the protocol's docstrings alone trains, is scored, saved and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.node.network import find_free_port
from hpcmm.runs.run_dir import RunDir

RANK = '''
import json, os, sys
from pathlib import Path
from hpcmm.worker.distributed import select_accelerator
select_accelerator()
from hpcmm.config.schema import *
from hpcmm.node.cache import extensions_dir
from hpcmm.worker.compiled_ops import load_ops
load_ops(extensions_dir(ClusterConfig(name="test")))
import torch
from torch import nn
from hpcmm.config.workload import Workload
from hpcmm.runs.run_dir import steps_in_newest_checkpoint
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.loop import train
from hpcmm.train.sampling import EndlessSampler
from hpcmm.train.workload import Training
from hpcmm.worker.distributed import process_group
from hpcmm.worker.environment import RankEnvironment

calls = []
XS = torch.linspace(-1, 1, 16)[:, None]

class Line(Training):
    """Learns y = 3 x."""

    def __init__(self, config, device):
        self._train = config.train
        self.model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)).to(device)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.5)

    def batches(self, rank, world_size, first):
        calls.append(f"batches from {first}")
        for batch in EndlessSampler(len(XS), self._train.micro_batch_size, rank, world_size, self._train.seed, first):
            yield XS[[number % len(XS) for number in batch]]

    def loss(self, engine, batch):
        calls.append("loss")
        error = (engine(batch) - 3 * batch).square().mean()
        return error, {"error": error.detach()}

    def evaluate(self, engine, rank, world_size, *, final):
        calls.append(f"evaluate final={final}")
        with torch.no_grad():
            return {"fit": -float((engine(XS) - 3 * XS).square().mean())}

    def merge_rank_state(self):
        calls.append("merge")
        super().merge_rank_state()

    def finish(self, rank, world_size):
        calls.append("finish")

class LineWorkload(Workload):
    def training_class(self):
        return Line

run = RunDir(Path(sys.argv[1]))
workload = LineWorkload()
config = RunConfig(
    cluster=ClusterConfig(name="test"),
    train=TrainConfig(
        steps=int(sys.argv[2]), checkpoint_every=2, learning_rate=0.1, warmup_steps=0, gradient_accumulation_steps=2,
        schedule=Schedule.constant,
    ),
)
port = int(sys.argv[3])
rank_env = RankEnvironment(0, 0, 1, 1, "0", "here", "127.0.0.1", port)
before = workload.is_finished(config, steps_in_newest_checkpoint(run) or 0)
with MetricsWriter(run.rank_metrics(0)) as metrics:
    metrics.start(**rank_env.identity())
    with process_group(rank_env, config, metrics) as device:
        scores = train(workload, config, run, rank_env, device, metrics)
finished = before, workload.is_finished(config, steps_in_newest_checkpoint(run) or 0)
print("FACTS" + json.dumps({"calls": calls, "scores": scores, "finished": finished}))
'''


def train_line(run: RunDir, steps: int) -> dict:
    command = [sys.executable, "-c", RANK, str(run.root), str(steps), str(find_free_port("127.0.0.1"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FACTS"))
    return json.loads(line.removeprefix("FACTS"))


@pytest.mark.timeout(400)
def test_a_workload_of_a_newcomer_is_trained_scored_saved_and_resumed(tmp_path: Path, compiled_ops: None):
    run = RunDir(tmp_path / "run")
    run.create()
    facts = train_line(run, 3)
    step = ["loss", "loss"]  # two micro-batches a step
    assert facts["calls"] == [
        *("merge", "evaluate final=False", "batches from 0"),
        *(*step, *step, "merge", *step, "merge"),  # saved after step 2, and at the end
        *("finish", "merge", "evaluate final=True"),
    ]
    assert facts["scores"]["fit_after"] > facts["scores"]["fit_before"]
    assert facts["finished"] == [False, True]
    assert json.loads(run.evaluation.read_text(encoding="utf-8")) == facts["scores"]
    records = [json.loads(line) for line in run.rank_metrics(0).read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert all(record["loss"] == pytest.approx(record["error"]) for record in steps)

    longer = train_line(run, 5)
    assert longer["calls"] == [
        *("batches from 6", *step, "merge", *step, "merge"),
        *("finish", "merge", "evaluate final=True"),
    ]
    assert longer["scores"]["fit_before"] == facts["scores"]["fit_before"]
    assert longer["scores"]["fit_after"] > facts["scores"]["fit_after"]
    assert longer["finished"] == [False, True]
