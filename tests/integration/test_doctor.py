"""The doctor on the real local Slurm, a slow link that it names, and a run that leaves the slow node out."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

ARRAY_TASKS = 1000


def run_module(cluster, folder, module, *arguments, timeout_s=200):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=cluster.env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def diagnosis(cluster, folder, *arguments):
    done = run_module(cluster, folder, "hpcmm.doctor", "cluster=local_slurm", "--nodes=4", "--json", *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_four_good_nodes_are_good_and_nothing_is_left_behind(slurm_cluster, nsys, tmp_path):
    status, told = diagnosis(slurm_cluster, tmp_path)
    assert status == 0, told["findings"]
    assert told["fit"]
    assert told["bad_nodes"] == []
    nodes = {name: facts for name, facts in told["nodes"].items() if name in slurm_cluster.nodes}
    assert sorted(nodes) == slurm_cluster.nodes
    for facts in nodes.values():
        assert facts["nsys_checked"]
        assert facts["nsys_problem"] is None
        assert all(missing == [] for missing in facts["shared"].values())
        assert abs(facts["clock"]["offset_s"]) <= facts["clock"]["error_s"] + 0.01  # one machine has one clock
        assert facts["interface"] == "eth0"
        assert None not in facts["names"].values()
    assert len({facts["packages"] for facts in nodes.values()}) == 1
    assert all(rate > 1e6 for rate in told["all_reduce_bytes_per_s"].values())
    # The stand-in GPUs are configured, and nvidia-smi is not there.
    assert {finding["check"] for finding in told["findings"]} == {"GPU"}
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.long
def test_a_throttled_node_is_named_and_a_run_with_a_spare_node_leaves_it_out(slurm_cluster, tmp_path):
    first, second, *others = slurm_cluster.nodes
    slurm_cluster.fault("throttle", second, "100mbit")
    try:
        status, told = diagnosis(slurm_cluster, tmp_path, "--no-nsys")
        launched = run_module(
            slurm_cluster,
            tmp_path,
            "hpcmm.launch",
            "cluster=local_slurm",
            "cluster.nodes=3",
            "cluster.ranks_per_node=1",
            "cluster.gpus_per_node=0",
            "launch.preflight=true",
            "launch.spare_nodes=1",
            "train.steps=1",
            "train.evaluate=false",
            "train.micro_batch_size=1",
            "data.image_size=64",
            "model.decoder_width=32",
            "wait=true",
        )
    finally:
        slurm_cluster.fault("restore", second)
    assert status == 1
    assert told["bad_nodes"] == [second]
    (finding,) = [each for each in told["findings"] if each["weight"] == "bad"]
    assert finding["check"] == "all-reduce"
    assert launched.returncode == 0, launched.stdout + launched.stderr
    run = (tmp_path / "runs" / "latest").resolve()
    starts = [json.loads((run / "metrics" / f"rank_{rank:04d}.jsonl").open().readline()) for rank in range(3)]
    assert [start["node"] for start in starts] == [first, *others]
    assert json.loads((run / "preflight.json").read_text())["bad_nodes"] == [second]


def test_the_status_of_a_thousand_tasks_comes_within_two_seconds(slurm_cluster, tmp_path):
    job = slurm_cluster.run(
        "sbatch", "--parsable", "--hold", f"--array=0-{ARRAY_TASKS - 1}", f"--output={tmp_path}/log", "--wrap=true"
    ).strip()
    try:
        slurm_cluster.run("scontrol", "release", f"{job}_[0-11]")
        began = time.perf_counter()
        told = run_module(slurm_cluster, tmp_path, "hpcmm.jobs", "status", job, "--json")
        took_s = time.perf_counter() - began
        shown = run_module(slurm_cluster, tmp_path, "hpcmm.jobs", "status", job)
        listed = run_module(slurm_cluster, tmp_path, "hpcmm.jobs", "list")
    finally:
        cancelled = run_module(slurm_cluster, tmp_path, "hpcmm.jobs", "cancel", job)
    assert told.returncode == 0, told.stderr
    assert sum(each["tasks"] for each in json.loads(told.stdout)["targets"][0]["jobs"]) == ARRAY_TASKS
    assert took_s < 2
    assert len(shown.stdout.splitlines()) < 30
    assert job in listed.stdout
    assert cancelled.returncode == 0, cancelled.stderr
    again = run_module(slurm_cluster, tmp_path, "hpcmm.jobs", "cancel", job)
    assert again.returncode == 1
    assert "Nothing to cancel" in again.stderr
