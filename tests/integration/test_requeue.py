"""Runs that are ended early on the real local Slurm, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(400)]

STEPS = 24
TRAINING = [
    "experiment=anomaly_demo", "cluster.ranks_per_node=1", "cluster.gpus_per_node=0", f"train.steps={STEPS}",
    "train.evaluate=false", "train.micro_batch_size=2", "data.image_size=64", "data.train_images_per_category=4",
]  # fmt: skip
SLOWLY = ["data.slow_rank=0", "data.slow_s=0.3"]
"""A step lasts long enough for a fault to come in time, and needs the processors no longer."""


class Job:
    """A launched run, and what its files say of it."""

    def __init__(self, cluster, folder, *overrides, task=TRAINING):
        command = [sys.executable, "-m", "hpcmm.launch", *task, f"runs_root={folder}", *overrides]
        launched = subprocess.run(
            command, env=cluster.env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
        )
        assert launched.returncode == 0, launched.stderr
        self.cluster = cluster
        self.job_id = launched.stdout.split("job id:")[1].split()[0].rstrip(",")
        self.run = (folder / "latest").resolve()

    def state(self):
        return self.cluster.run("squeue", "-h", "--states=all", "-j", self.job_id, "-o", "%T").strip()

    def records(self, rank, event):
        lines = (self.run / "metrics" / f"rank_{rank:04d}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in found if record["event"] == event]

    def has_done(self, step, attempt=1):
        with contextlib.suppress(FileNotFoundError):
            return any(r["step"] >= step and r["attempt"] == attempt for r in self.records(0, "step"))
        return False

    def losses(self, rank):
        """By step, each of which must be there once."""
        steps = self.records(rank, "step")
        assert [record["step"] for record in steps] == list(range(len(steps)))
        return [record["loss"] for record in steps]

    def wait_until(self, condition, within_s):
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if condition():
                return
            time.sleep(0.3)
        logs = [(log.name, log.read_text()[-1500:]) for log in sorted(self.run.rglob("*.log"))]
        pytest.fail(f"not within {within_s} s; job {self.job_id} is {self.state()}; {logs}")

    def complete(self, within_s=120):
        self.wait_until(lambda: self.state() in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), within_s)
        assert self.state() == "COMPLETED", (self.run / "logs" / "rank_0000.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(slurm_cluster, tmp_path_factory):
    """Two equal runs that started at once on the same nodes."""
    nodes = f"cluster.sbatch.nodelist='{','.join(slurm_cluster.nodes[:2])}'"
    jobs = [
        Job(slurm_cluster, tmp_path_factory.mktemp("clean"), "profile=off", "cluster.nodes=2", nodes) for _ in range(2)
    ]
    for job in jobs:
        job.complete()
    return jobs


def test_two_jobs_that_start_at_once_on_the_same_nodes_do_not_meet(uninterrupted):
    first, second = uninterrupted
    assert first.records(0, "start")[0]["node"] == second.records(0, "start")[0]["node"]
    assert first.losses(0) == second.losses(0)


@pytest.mark.nsys
def test_a_preempted_run_goes_on_without_a_lost_or_repeated_step(uninterrupted, slurm_cluster, nsys, tmp_path):
    nodes = slurm_cluster.nodes[:2]
    where = ("cluster.nodes=2", f"cluster.sbatch.nodelist='{','.join(nodes)}'")
    job = Job(slurm_cluster, tmp_path, "profile.ranks='0'", *where, *SLOWLY)
    job.wait_until(lambda: job.has_done(3), within_s=90)
    slurm_cluster.run("srun", "--qos=urgent", "--exclusive", f"--nodelist={','.join(nodes)}", "true")
    job.wait_until(lambda: job.has_done(5, attempt=2), within_s=90)
    job.complete()
    stopped_at = job.records(0, "resume")[1]["step"]
    assert 4 <= stopped_at < STEPS
    assert job.records(0, "lost") == []
    for report in ("nsys/before_attempt_2/rank_0000.nsys-rep", "nsys/rank_0000.nsys-rep"):
        assert (job.run / report).stat().st_size > 100_000
    for rank in range(2):
        assert job.losses(rank) == uninterrupted[0].losses(rank)
    assert sorted(path.name for path in (job.run / "checkpoints").iterdir() if path.is_dir()) == [
        f"step_{stopped_at:06d}",
        f"step_{STEPS:06d}",
    ]

    # Damage to the newest checkpoint costs the steps since the one before, and no more.
    newest = job.run / "checkpoints" / f"step_{STEPS:06d}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    slurm_cluster.run("sbatch", "--wait", str(job.run / "submission.sh"), timeout_s=120)
    assert (
        "wrong checksum"
        in (job.run / "logs" / "rank_0000.log").read_text() + (job.run / "logs" / "rank_0001.log").read_text()
    )
    assert [record["step"] for record in job.records(0, "resume")] == [0, stopped_at, stopped_at]
    for rank in range(2):
        assert job.losses(rank) == uninterrupted[0].losses(rank)


def test_a_run_goes_on_after_its_time_limit_and_can_be_ended_in_peace(slurm_cluster, tmp_path):
    limit = ("cluster.time_limit_min=1", "cluster.stop_warning_s=25", "train.steps=10000")
    job = Job(slurm_cluster, tmp_path, "profile=off", "cluster.nodes=1", *limit)
    job.wait_until(lambda: job.has_done(0, attempt=2), within_s=150)
    first, second = (record["step"] for record in job.records(0, "resume"))
    assert first == 0 < second
    slurm_cluster.run("scancel", "--batch", "--signal=USR2", job.job_id)
    job.complete(within_s=30)
    assert job.losses(0)  # each step once
    steps_done = job.records(0, "step")[-1]["step"] + 1
    assert (job.run / "checkpoints" / "latest").read_text() == f"step_{steps_done:06d}"


def test_a_run_goes_on_without_the_node_that_failed(slurm_cluster, tmp_path):
    overrides = ("profile=off", "cluster.nodes=3", "requeue=on_node_failure", "train.checkpoint_every=4", *SLOWLY)
    job = Job(slurm_cluster, tmp_path, *overrides)
    job.wait_until(lambda: job.has_done(5), within_s=90)
    failed = job.records(1, "start")[0]["node"]
    slurm_cluster.fault("stop", failed)
    try:
        # What a site's health check does; by itself Slurm needs SlurmdTimeout, here 60 s, to give up a node.
        slurm_cluster.run("scontrol", "update", f"NodeName={failed}", "State=DOWN", "Reason=no answer")
        job.wait_until(lambda: job.has_done(5, attempt=2), within_s=150)
        job.complete()
    finally:
        slurm_cluster.fault("restore", failed)
    resumed_at = job.records(0, "resume")[1]["step"]
    assert resumed_at > 0
    assert resumed_at % 4 == 0
    for rank in range(3):
        assert len(job.losses(rank)) == STEPS
        assert job.records(rank, "start")[1]["node"] != failed


SCRIPT = """
import os, sys, time
from hpcmm import annotate
print("start", os.environ["HPCMM_RESTART_COUNT"], flush=True)
if sys.argv[1] == "goes on" and os.environ["HPCMM_RESTART_COUNT"] == "0":
    while not annotate.should_stop():
        time.sleep(0.1)
    annotate.stopped()
    sys.exit(0)
if sys.argv[1] == "is killed" and os.environ["HPCMM_RESTART_COUNT"] == "0":
    time.sleep(600)
sys.exit(42 if sys.argv[1] == "goes on" else 0)
"""


def launched(slurm_cluster, folder, *overrides):
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    task = ["cluster=local_slurm", "cluster.ranks_per_node=1", "cluster.gpus_per_node=0", "cluster.time_limit_min=5"]
    task += ["task=script", f"task.path={script}"]
    return Job(slurm_cluster, folder / "runs", *overrides, task=task)


def test_the_last_point_of_a_sweep_goes_on_and_ends_with_its_script_s_status(slurm_cluster, tmp_path):
    points = "task.args=['is well'],['goes on']"
    sweep = launched(slurm_cluster, tmp_path, "cluster.nodes=1", points)
    last, log = f"{sweep.job_id}_1", sweep.run / "0001" / "logs" / "rank_0000.log"

    def states():
        return sweep.state().split()

    sweep.wait_until(lambda: "COMPLETED" in states() and log.exists() and "start 0" in log.read_text(), within_s=90)
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", last)
    sweep.wait_until(lambda: sorted(states()) == ["COMPLETED", "FAILED"], within_s=120)
    assert (sweep.run / "0000" / "exit_status").read_text() == f"{sweep.job_id}_0 0\n"
    assert (sweep.run / "0001" / "exit_status").read_text() == f"{last} stopped\n{last} restarted\n{last} 42\n"
    assert f"job {last} goes back into the queue" in (sweep.run / "0001" / "logs" / "batch.log").read_text()
    shown = "squeue", "-h", "--states=all", "-j", last, "-O", "exit_code:20"
    assert slurm_cluster.run(*shown).split() == ["10752"]  # 42 << 8


def test_a_script_that_is_left_to_slurm_goes_on_after_a_preemption(slurm_cluster, tmp_path):
    grace = ("sacctmgr", "-i", "modify", "qos", "normal", "set")
    slurm_cluster.run(*grace, "gracetime=5")
    try:
        node = slurm_cluster.nodes[-1]
        where = ("cluster.nodes=1", f"+cluster.sbatch.nodelist={node}", "requeue=slurm")
        job = launched(slurm_cluster, tmp_path, "task.args=['is killed']", *where)
        log = job.run / "logs" / "rank_0000.log"
        job.wait_until(lambda: log.exists() and "start 0" in log.read_text(), within_s=90)
        slurm_cluster.run("srun", "--qos=urgent", "--exclusive", f"--nodelist={node}", "true", timeout_s=150)
    finally:
        slurm_cluster.run(*grace, "gracetime=60")
    job.complete()
    assert "start 1" in log.read_text()
    lines = (job.run / "exit_status").read_text().splitlines()
    assert lines[-2:] == [f"{job.job_id} restarted", f"{job.job_id} 0"]
