"""Faults of what surrounds a run: the controller, the accounting daemon, the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from test_requeue import SLOWLY, Job

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(300)]


def end_daemon(cluster, name):
    pid = int((cluster.directory / "run" / f"{name}.pid").read_text())
    os.kill(pid, signal.SIGKILL)


def test_a_run_outlives_the_controller_and_needs_no_accounting(slurm_cluster, tmp_path):
    end_daemon(slurm_cluster, "slurmdbd")
    try:
        job = Job(slurm_cluster, tmp_path, "profile=off", "cluster.nodes=2", *SLOWLY)
        job.wait_until(lambda: job.has_done(2), within_s=90)
        end_daemon(slurm_cluster, "slurmctld")
        time.sleep(2)
    finally:
        assert slurm_cluster.command("up").returncode == 0
    job.complete()
    assert len(job.losses(0)) == 24


@pytest.fixture
def small_disk(tmp_path):
    """Room for one checkpoint, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=170m", "small", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_run_directory_is_said_and_the_last_checkpoint_stays_whole(slurm_cluster, small_disk):
    job = Job(slurm_cluster, small_disk, "profile=off", "cluster.nodes=1", "train.checkpoint_every=2")
    job.wait_until(lambda: job.state() in ("COMPLETED", "FAILED"), within_s=90)
    assert job.state() == "FAILED"
    log = (job.run / "logs" / "rank_0000.log").read_text()
    assert "could not save the checkpoint after step 4" in log
    assert "make room" in log
    assert (job.run / "checkpoints" / "latest").read_text() == "step_000002"
    assert len(job.losses(0)) == 3
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    slurm_cluster.run("sbatch", "--wait", str(job.run / "submission.sh"), timeout_s=120)
    assert [record["step"] for record in job.records(0, "resume")] == [0, 2]
    assert len(job.losses(0)) == 24
