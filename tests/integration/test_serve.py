"""The server as a real Slurm job: submitted, reached on its node's loopback, cancelled, and ended by its time limit."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(600)]

SMALL = [
    "cluster=local", "cluster.ranks_per_node=1", "name=small", "train.steps=1", "train.evaluate=false", "wait=true",
    "data.image_size=64", "data.train_images_per_category=2", "data.test_images_per_category=4",
    "model.decoder_width=32", "model.text_adapter_width=64",
]  # fmt: skip

VISIT = """\
import httpx, json, sys
with httpx.Client(base_url=sys.argv[1].partition("/?")[0]) as client:
    pages = ("/", sys.argv[1], "/", "/config")
    print(json.dumps([client.get(page).status_code for page in pages]))
"""


@pytest.fixture(scope="module")
def folder(slurm_cluster, tmp_path_factory):
    """A working directory with a trained run in it."""
    made = tmp_path_factory.mktemp("serve it's")
    run(slurm_cluster, made, "hpcmm.launch", *SMALL)
    return made


def run(cluster, folder, module, *arguments, expected=0):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=cluster.env | {"PYTHONPATH": str(Path.cwd())}, cwd=folder,
        capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def job_run(output):
    return Path(re.search(r"^run directory: +(.+)$", output, re.M)[1])


def wait_until(told, within_s=120):
    until = time.monotonic() + within_s
    while not told():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_a_job_serves_says_how_to_reach_it_and_can_be_cancelled(slurm_cluster, folder):
    latest = (folder / "runs" / "latest").readlink()
    done = run(slurm_cluster, folder, "hpcmm.serve", "small", "--cluster", "local_slurm", "--threshold", "0.5")
    job = job_run(done.stdout)
    tunnel = re.search(r"ssh -N -L (\d+):127\.0\.0\.1:\1 -J \S+ (\S+)$", done.stdout, re.M)
    url = re.search(r"^then open: +(http://127\.0\.0\.1:\d+/\?token=\S+)$", done.stdout, re.M)[1]
    assert tunnel[2] in slurm_cluster.nodes
    assert url.startswith(f"http://127.0.0.1:{tunnel[1]}/")
    assert stat.S_IMODE((job / "address.json").stat().st_mode) == 0o600
    assert (folder / "runs" / "latest").readlink() == latest  # a server is not a run to analyse
    # What comes through a tunnel comes from the node itself. The login node has another loopback interface.
    job_id = json.loads((job / "submission.json").read_text())["job_id"]
    asked = slurm_cluster.run("srun", f"--jobid={job_id}", "--overlap", "-n1", sys.executable, "-c", VISIT, url)
    assert json.loads(asked) == [403, 200, 200, 200]
    token = url.partition("token=")[2]
    for text in [
        path.read_text(errors="replace") for path in (*job.glob("logs/*"), job / "submission.sh", job / "config.yaml")
    ]:
        assert token not in text

    again = run(slurm_cluster, folder, "hpcmm.serve", job.name, "--address").stdout
    assert tunnel[0] in again
    assert url in again
    assert "RUNNING" in run(slurm_cluster, folder, "hpcmm.jobs", "status", job.name).stdout
    run(slurm_cluster, folder, "hpcmm.jobs", "cancel", job.name)
    wait_until(lambda: not (job / "address.json").exists())
    wait_until(lambda: "hpcmm.serve: ended." in (job / "logs" / "rank_0000.log").read_text())
    assert "Traceback" not in (job / "logs" / "rank_0000.log").read_text()


def test_before_its_time_limit_it_ends_by_itself(slurm_cluster, folder):
    limits = ["cluster.time_limit_min=2", "cluster.stop_warning_s=60"]
    words = ["small", *limits, "--cluster", "local_slurm", "--threshold", "0.5", "--detach"]
    done = run(slurm_cluster, folder, "hpcmm.serve", *words)
    job = job_run(done.stdout)
    assert f"python -m hpcmm.serve {job.name} --address" in done.stdout
    job_id = json.loads((job / "submission.json").read_text())["job_id"]
    wait_until((job / "address.json").exists)
    wait_until((job / "exit_status").exists, within_s=200)
    assert (job / "exit_status").read_text() == f"{job_id} 0\n"
    assert "hpcmm.serve: ended.\n" in (job / "logs" / "rank_0000.log").read_text()


def test_a_job_that_cannot_serve_says_why(slurm_cluster, folder):
    checkpoints = next((folder / "runs").glob("small-*")) / "checkpoints"
    checkpoints.chmod(0o777)
    try:
        done = run(slurm_cluster, folder, "hpcmm.serve", "small", "--cluster", "local_slurm", expected=1)
    finally:
        checkpoints.chmod(0o755)
    assert "ended as FAILED before the server answered" in done.stderr
    assert "can be written by another user" in done.stderr
