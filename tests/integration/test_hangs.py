"""A job that hangs, on the real local Slurm: seen while it runs, then ended by its watchdog.

And what is told of a rank of a recipe that hangs or raises in the middle of its training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SCRIPT = """
import time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
for step in range(10):
    dist.all_reduce(torch.ones(10))
    if step == 5 and dist.get_rank() == 1:
        print("asleep", flush=True)
        time.sleep(10_000)
"""


class Job:
    def __init__(self, cluster, folder):
        self.environ, self.folder = cluster.env, folder
        (folder / "train.py").write_text(SCRIPT, encoding="utf-8")

    def module(self, name, *arguments):
        return subprocess.run(
            [sys.executable, "-m", name, *arguments],
            env=self.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def launch(self, *overrides):
        done = self.module("hpcmm.launch", "cluster=local_slurm", *overrides)
        assert done.returncode == 0, done.stderr
        said = dict(line.split(":", 1) for line in done.stdout.splitlines())
        return Path(said["run directory"].strip())

    def why(self, run):
        done = self.module("hpcmm.jobs", "why", str(run), "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)


def wait_for(condition, within_s=120):
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {within_s} s"
        time.sleep(0.5)


ONE_A_NODE = ("cluster.nodes=2", "cluster.ranks_per_node=1")


def test_a_hang_is_seen_while_it_lasts_and_ended_with_what_tells_of_it(slurm_cluster, tmp_path):
    job = Job(slurm_cluster, tmp_path)
    run = job.launch(*ONE_A_NODE, "cluster.gpus_per_node=0", "launch.hang_s=20", "--", "train.py")
    log = run / "logs" / "rank_0001.log"
    wait_for(lambda: log.exists() and "asleep" in log.read_text(encoding="utf-8"))

    told = job.why(run)
    assert (told["state"], told["failed"], told["ranks"]["missing"]) == ("RUNNING", False, [1])
    waiting, asleep = told["ranks"]["groups"]
    assert (waiting["ranks"], asleep["ranks"]) == ([0], [1])
    assert waiting["at"] == "all_reduce number 7, called at train.py:8 in <module>"
    assert asleep["at"] == "train.py:11 in <module>: time.sleep(10_000)"

    wait_for((run / "exit_status").exists)
    told = job.why(run)
    assert (told["class"], told["first"]["rank"], told["first"]["node"]) == ("hang", 1, slurm_cluster.nodes[1])
    assert told["ranks"]["missing"] == [1]
    assert (run / "exit_status").read_text(encoding="utf-8").split()[1] == "hung"


def test_workers_of_torchrun_tell_where_they_stand_and_stood_when_the_job_was_cancelled(slurm_cluster, tmp_path):
    job = Job(slurm_cluster, tmp_path)
    run = job.launch(*ONE_A_NODE, "--", "torchrun", "--nproc-per-node", "2", "train.py")
    log = run / "logs" / "rank_0000.log"
    wait_for(lambda: log.exists() and "asleep" in log.read_text(encoding="utf-8"))

    at = ["all_reduce number 7, called at train.py:8 in <module>", "train.py:11 in <module>: time.sleep(10_000)"]
    told = job.why(run)
    assert [group["ranks"] for group in told["ranks"]["groups"]] == [[0, 2, 3], [1]]
    assert [group["at"] for group in told["ranks"]["groups"]] == at

    assert job.module("hpcmm.jobs", "cancel", str(run)).returncode == 0
    wait_for(lambda: job.why(run)["state"].startswith("CANCELLED"))
    told = job.why(run)
    assert (told["class"], told["ranks"]["missing"]) == ("cancelled", [1])
    assert [group["ranks"] for group in told["ranks"]["groups"]] == [[0, 2, 3], [1]]


WORKLOAD = """
from hpcmm.workloads.omni.workload import OmniWorkload

class FaultyWorkload(OmniWorkload):
    def training_class(self):
        from faulty.training import FaultyTraining
        return FaultyTraining
"""
TRAINING = """
import os
import time

import torch.distributed as dist

from hpcmm.annotate.ranges import step_begun
from hpcmm.workloads.omni.training import OmniTraining

FAULT, RANK = os.environ["FAULT"].split(":")

class FaultyTraining(OmniTraining):
    def __init__(self, config, device):
        super().__init__(config, device)
        if dist.get_rank() == int(RANK):
            for layer in self.structure().network.model.layers:
                layer.register_forward_pre_hook(fail)

def fail(*_):
    if step_begun() == 2 and FAULT == "raise":
        raise ArithmeticError("the loss is not a number")
    if step_begun() == 2:
        print("asleep", flush=True)
        time.sleep(10_000)
"""
TASK = """# @package _global_
defaults: [{/model: omni_tiny}, _self_]
task: {name: faulty, _target_: faulty.workload.FaultyWorkload}
train: {micro_batch_size: 1, gradient_accumulation_steps: 2, evaluate: false, steps: 100000}
"""


@pytest.fixture
def start(slurm_cluster, compiled_ops, tmp_path):
    """Starts four ranks on two nodes with a recipe, of which one has a fault in its third step."""
    for name, text in {"__init__": "", "workload": WORKLOAD, "training": TRAINING}.items():
        (tmp_path / "faulty").mkdir(exist_ok=True)
        (tmp_path / "faulty" / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "faulty.yaml").write_text(TASK, encoding="utf-8")

    def start(recipe, fault, *overrides):
        job = Job(slurm_cluster, tmp_path)
        job.environ |= {"FAULT": fault, "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "0"}
        two_nodes = ("cluster.nodes=2", "cluster.ranks_per_node=2", "cluster.kill_wait_s=20")
        recipes = ("launch.config_dir=conf", "task=faulty", f"parallel={recipe}")
        return job, job.launch(*two_nodes, *recipes, *overrides)

    return start


@pytest.mark.long
def test_a_hang_of_stages_of_tensor_groups_names_the_rank_and_the_groups_in_which_the_others_wait(start, slurm_cluster):
    job, run = start("3d", "hang:2", "launch.hang_s=20")
    wait_for((run / "exit_status").exists, 240)
    told = job.why(run)
    assert (told["class"], told["first"]["rank"], told["first"]["node"]) == ("hang", 2, slurm_cluster.nodes[1])
    assert told["ranks"]["missing"] == [2]
    missing = told["ranks"]["findings"][0]
    assert "rank 0 in recv from rank 2 of the pipeline group of ranks 0,2" in missing
    assert "rank 3 in all_reduce" in missing
    assert "of the tensor group of ranks 2-3" in missing
    assert any("time.sleep(10_000)" in group["at"] for group in told["ranks"]["groups"])


@pytest.mark.long
def test_an_error_on_one_stage_comes_before_those_of_the_stages_that_lose_it(start, slurm_cluster):
    job, run = start("pipeline", "raise:3")
    wait_for((run / "exit_status").exists, 240)
    told = job.why(run)
    assert (told["class"], told["first"]["rank"], told["first"]["node"]) == ("exception", 3, slurm_cluster.nodes[1])
    assert told["first"]["what"] == "ArithmeticError: the loss is not a number"
    first, *others = told["events"]
    assert first["rank"] == 3
    assert {event["kind"] for event in others} <= {"peer lost"}
