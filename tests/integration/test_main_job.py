"""The main job on the real local Slurm under the real nsys: from one command to a blamed bottleneck."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.nsys, pytest.mark.timeout(600)]

SHORT = ["experiment=anomaly_demo", "wait=true", "train.steps=10", "train.evaluate=false", "data.image_size=64"]
INJECT = Path(__file__).resolve().parents[1] / "ground_truth" / "inject"
ONE_A_NODE = ["cluster.ranks_per_node=1", "cluster.gpus_per_node=0"]
LIGHT = [*ONE_A_NODE, "train.steps=6"]
RUN_TIMEOUT_S = 400


def run_module(cluster, module, *arguments, cwd, timeout_s=RUN_TIMEOUT_S, **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=cluster.env | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def train_and_analyze(cluster, folder, *overrides, **environment):
    """Run the short demo in ``folder``; returns its run directory, after analysis, and what the analysis printed."""
    launched = run_module(cluster, "hpcmm.launch", *SHORT, *overrides, cwd=folder, **environment)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    run = (folder / "runs" / "latest").resolve()
    analyzed = run_module(cluster, "hpcmm.analyze", str(run), cwd=folder)
    assert analyzed.returncode == 0, analyzed.stdout + analyzed.stderr
    return run, analyzed.stdout


def table(run, name):
    return pd.read_csv(run / "analysis" / f"{name}.csv")


@pytest.fixture(scope="module")
def slow_data(slurm_cluster, nsys, tmp_path_factory):
    """The run, and what its analysis printed. Rank 2 sleeps before each batch: put in from outside of the training
    code, as in the recordings of tests/ground_truth."""
    # A path with a blank and quotes, as a home directory may have one.
    folder = tmp_path_factory.mktemp('it\'s a "run"')
    slow = json.dumps([{"at": "data", "do": "sleep", "seconds": 1.0, "ranks": [2]}])
    return train_and_analyze(slurm_cluster, folder, PYTHONPATH=str(INJECT), HPCMM_GROUND_TRUTH=slow)


def test_the_job_completed_on_four_nodes_with_eight_ranks(slow_data, slurm_cluster):
    run, _ = slow_data
    record = json.loads((run / "job.json").read_text(encoding="utf-8"))
    assert record["state"] == "COMPLETED"
    assert record["sacct"][0]["NNodes"] == "4"
    starts = [json.loads((run / "metrics" / f"rank_{rank:04d}.jsonl").open().readline()) for rank in range(8)]
    assert [start["rank"] for start in starts] == list(range(8))
    nodes = slurm_cluster.nodes
    assert [start["node"] for start in starts] == [nodes[rank // 2] for rank in range(8)]
    assert {start["world_size"] for start in starts} == {8}


def test_the_run_directory_holds_everything(slow_data, slurm_cluster):
    run, _ = slow_data
    nodes = slurm_cluster.nodes
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["train"]["steps"] == 10
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o444
    assert run.stat().st_mode & 0o777 == 0o700
    assert "#SBATCH --nodes=4" in (run / "submission.sh").read_text(encoding="utf-8")
    for rank in range(8):
        assert (run / "nsys" / f"rank_{rank:04d}.nsys-rep").stat().st_size > 100_000
        assert f"rank_{rank:04d}" in (run / "logs" / f"rank_{rank:04d}.log").read_text(encoding="utf-8")  # its report
        start = json.loads((run / "metrics" / f"rank_{rank:04d}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert (start["rank"], start["node"]) == (rank, nodes[rank // 2])
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_000010"


def test_eight_reports_were_read(slow_data):
    run, _ = slow_data
    coverage = table(run, "coverage").sort_values("rank")
    assert list(coverage["rank"]) == list(range(8))
    assert set(coverage["status"]) == {"found"}
    assert (coverage["events"] > 1000).all()


def test_the_phases_of_each_step_add_up_to_it(slow_data):
    run, _ = slow_data
    phases = table(run, "phases")
    assert set(phases["rank"]) == set(range(8))
    assert set(phases["step"]) == set(range(10))
    assert {"data", "forward", "backward", "optimizer"} <= set(phases["phase"])
    summed = phases.groupby(["rank", "step"])["duration_s"].sum()
    recorded = pd.Series(
        {
            (rank, record["step"]): record["step_s"]
            for rank in range(8)
            for record in map(json.loads, (run / "metrics" / f"rank_{rank:04d}.jsonl").read_text().splitlines())
            if record["event"] == "step"
        }
    )
    # A rank that the system takes off its core between two phases loses that time, in one step or another.
    missed_s = recorded - summed
    assert missed_s.min() > -0.01
    assert missed_s.median() < 0.01
    assert missed_s.sum() < 0.03 * recorded.sum()


def test_every_rank_took_part_in_every_collective(slow_data):
    run, _ = slow_data
    collectives = table(run, "collectives")
    in_steps = collectives[collectives["step"].notna()]
    took_part = in_steps.groupby(["group", "op", "sequence"])["rank"].nunique()
    assert len(took_part) >= 10 * 3
    assert (took_part == 8).all()
    # ZeRO-2 sends each step's gradients, of at least five million trained float32 parameters, over the wire.
    one_rank = in_steps[(in_steps["rank"] == 0) & (in_steps["op"] == "all_reduce") & (in_steps["step"] == 5)]
    assert one_rank["bytes"].sum() >= 4 * 5_000_000


def test_bottlenecks_are_printed_with_the_report_s_path(slow_data):
    run, printed = slow_data
    assert len(table(run, "bottlenecks")) > 0
    assert str(run / "analysis" / "report.html") in printed
    assert (run / "analysis" / "report.html").stat().st_size > 10_000


def test_the_checkpoint_loads_again(slow_data):
    run, _ = slow_data
    code = (
        "import sys; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merged;"
        "state = merged(sys.argv[1], exclude_frozen_parameters=True);"
        "print(sum(tensor.numel() for tensor in state.values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run / "checkpoints")], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout.split()[-1]) >= 5_000_000


def test_nobody_else_can_write_a_checkpoint(slow_data):
    run, _ = slow_data
    written = [run / "checkpoints", *(run / "checkpoints").rglob("*")]
    assert len(written) > 8
    assert not [path for path in written if path.stat().st_mode & 0o022]


@pytest.mark.long
def test_the_script_runs_again_when_submitted_by_hand(slow_data, slurm_cluster):
    run, _ = slow_data
    submitted = slurm_cluster.run("sbatch", "--wait", str(run / "submission.sh"), timeout_s=RUN_TIMEOUT_S)
    job_id = submitted.split()[-1]
    assert slurm_cluster.run("sacct", "-nPXj", job_id, "-o", "State").strip() == "COMPLETED"
    starts = [line for line in (run / "metrics" / "rank_0000.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 2


@pytest.mark.long
def test_a_throttled_link_makes_communication_the_first_row(slurm_cluster, nsys, tmp_path):
    node = slurm_cluster.nodes[2]
    slurm_cluster.fault("throttle", node, "150mbit")
    try:
        slow, _ = train_and_analyze(slurm_cluster, tmp_path, *LIGHT)
    finally:
        slurm_cluster.fault("restore", node)
    first = table(slow, "bottlenecks").iloc[0]
    assert "communication" in first["cause"]
    assert first["step_share"] > 0.3


def test_a_rank_with_slow_data_loading_is_named(slow_data, slurm_cluster):
    run, printed = slow_data
    first = table(run, "bottlenecks").iloc[0]
    assert first["rank"] == 2
    assert first["node"] == slurm_cluster.nodes[1]
    assert first["phase"] == "data"
    assert "data" in first["cause"]
    # Below the 1 s that rank 2 sleeps, for meanwhile the others share two cores among fewer.
    assert 0.2 < first["lost_s_per_step"] < 1.2
    assert "rank 2" in printed


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.partition=none_such"], "cluster.partition is none_such"),
        (["cluster.gpus_per_node=3", "cluster.ranks_per_node=3"], "4 nodes with 3 ranks"),
        (["cluster.memory_gb=900"], "cluster.memory_gb is 900"),
        (["cluster.sbatch.no-such-option=1"], "Slurm refused the job"),
    ],
)
def test_a_refused_job_is_one_sentence(slurm_cluster, tmp_path, overrides, expected):
    done = run_module(slurm_cluster, "hpcmm.launch", "experiment=anomaly_demo", *overrides, cwd=tmp_path, timeout_s=60)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(
            ["model.image_taps=[1]"], "EfficientNet-Lite0 gives its four strides", marks=pytest.mark.long, id="rank"
        ),
        pytest.param(
            ["data.generate=false", "data.root=/none/such"],
            "before any rank started: Input cannot be used: data.root is /none/such",
            id="preparation",
        ),
    ],
)
def test_a_rank_or_a_preparation_that_fails_ends_the_job_and_its_log_is_shown(
    slurm_cluster, tmp_path, overrides, expected
):
    done = run_module(slurm_cluster, "hpcmm.launch", *SHORT, *LIGHT, "profile=off", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILED" in done.stderr
    assert expected in " ".join(done.stderr.split())
    record = json.loads((tmp_path / "runs/latest/job.json").read_text(encoding="utf-8"))
    assert record["state"] == "FAILED"


def test_launching_returns_at_once_and_the_job_can_be_found(slurm_cluster, tmp_path):
    done = run_module(
        slurm_cluster, "hpcmm.launch", "experiment=anomaly_demo", "cluster.sbatch.hold=''", cwd=tmp_path, timeout_s=30
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(":", 1) for line in done.stdout.splitlines())
    job_id, run = said["job id"].strip(), Path(said["run directory"].strip())
    try:
        assert slurm_cluster.run("squeue", "-hj", job_id, "-o", "%T").strip() == "PENDING"
        assert (run / "submission.sh").is_file()
        assert said["then, analyse"].strip() == f"python -m hpcmm.analyze {shlex.quote(str(run))}"
    finally:
        slurm_cluster.run("scancel", job_id)


@pytest.mark.long
def test_a_cancelled_job_ends_soon_with_its_reports_and_leaves_no_process(slurm_cluster, nsys, tmp_path):
    overrides = [override for override in SHORT if override != "wait=true"]
    overrides += ["train.steps=100000", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.gpus_per_node=0"]
    launched = run_module(slurm_cluster, "hpcmm.launch", *overrides, cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    job_id = launched.stdout.split("job id:")[1].split()[0]
    run = (tmp_path / "runs" / "latest").resolve()
    wait_until(lambda: '"step": 2' in (run / "metrics/rank_0000.jsonl").read_text(), within_s=200)
    slurm_cluster.run("scancel", job_id)
    wait_until(lambda: slurm_cluster.run("squeue", "-h").strip() == "", within_s=40)  # KillWait is 30 s
    wait_until(lambda: not processes_with(str(run)), within_s=30)
    assert sorted(path.stem for path in (run / "nsys").glob("rank_*.*")) == ["rank_0000", "rank_0001"]


def wait_until(condition, within_s):
    """Poll ``condition``, for which a missing file is a no."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.5)
    pytest.fail(f"not within {within_s} s")


def processes_with(word):
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if word in line]
