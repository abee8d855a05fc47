"""A job that hangs, on the real local Slurm: seen while it runs, then ended by its watchdog."""

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
    run = job.launch(*ONE_A_NODE, "cluster.gpus_per_node=0", "launch.hang_s=30", "--", "train.py")
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
