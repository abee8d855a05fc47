"""A finished run of an earlier version is analysed, told of, scored, served and started from, as it was then."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import kept_run
import numpy as np
import pytest
import yaml
from PIL import Image

from hpcmm.config import config_file
from hpcmm.config.parts import part_name
from hpcmm.config.untyped_config import read_untyped_config

pytestmark = pytest.mark.timeout(280)

SCORES = {
    ("brick", "image_auroc"): 1.0,
    ("brick", "pixel_auroc"): 0.94127,
    ("brick", "pro"): 0.81731,
    ("coins", "image_auroc"): 0.75,
    ("coins", "pixel_auroc"): 0.28525,
    ("all images", "image_auroc"): 0.875,
    ("all images", "pixel_auroc"): 0.681527,
    ("all images", "f1"): 0.888889,
}
"""What the run's own version says of its checkpoint, by category and score."""
NEAR = 0.005
"""How far a score may be off on another processor."""


def run_module(module: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of hpcmm in ``folder``, if no Slurm answers."""
    silent = folder / "no slurm"
    silent.mkdir(exist_ok=True)
    for name in ("squeue", "sacct", "sinfo", "scontrol"):
        (silent / name).write_text(
            f"#!/bin/sh\necho '{name}: error: Unable to contact slurm controller' >&2\nexit 1\n", encoding="utf-8"
        )
        (silent / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HPCMM"))}
    of_a_terminal = {"TERM": "dumb", "COLUMNS": "200", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    path = f"{silent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=inherited | of_a_terminal | {"PATH": path} | environment,
        cwd=folder, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as lines:
        return [*csv.DictReader(lines)]


def assert_holds(found: object, kept: object, where: str = "") -> None:
    """Every kept value is found in its place; what was added since, such as the class of a name, is as well."""
    if isinstance(found, dict) and "_target_" in found and isinstance(kept, str):
        found = found["name"]
    if not isinstance(kept, dict):
        assert found == kept, where
        return
    assert isinstance(found, dict), where
    for key, value in kept.items():
        assert key in found, f"{where}.{key}"
        assert_holds(found[key], value, f"{where}.{key}")


def test_its_analysis_names_the_same_bottleneck(run_v1, tmp_path):
    done = run_module("hpcmm.analyze", str(run_v1), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Rank 1 on fx2 costs 298 ms of each 394 ms step (76%): data loading in phase data.\n")
    assert "Try: data.num_workers=2" in done.stdout
    assert "9 steps of 394 ms ± 24.7 ms, warm-up step 734 ms apart; 2 of 2 ranks with steps" in done.stdout
    analysis = run_v1 / "analysis"
    first = rows_of(analysis / "bottlenecks.csv")[0]
    assert (first["cause"], first["rank"], first["node"], first["phase"]) == ("data loading", "1", "fx2", "data")
    assert float(first["lost_s_per_step"]) == pytest.approx(0.298, abs=0.001)
    assert float(first["step_share"]) == pytest.approx(0.757, abs=0.001)
    assert {row["rank"] for row in rows_of(analysis / "steps.csv")} == {"0", "1"}
    assert len(rows_of(analysis / "steps.csv")) == 20
    for name in ("collectives", "phases", "comm_wait", "efficiency", "startup", "waitpid", "osrt", "coverage"):
        assert rows_of(analysis / f"{name}.csv"), name
    assert (analysis / "report.html").is_file()
    assert "data loading" in (analysis / "summary.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_it_is_compared_with_itself(run_v1, tmp_path):
    done = run_module("hpcmm.analyze", "compare", str(run_v1), str(run_v1), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No difference seen in step time: 393.66 ms in A, 393.66 ms in B.\n")
    assert "delays by rank 1: data loading in data" in done.stdout


def test_its_state_and_its_logs_are_told_without_slurm(run_v1, tmp_path):
    status = run_module("hpcmm.jobs", "status", str(run_v1), folder=tmp_path)
    assert status.returncode == 0, status.stderr
    assert "Slurm does not answer" in status.stderr
    assert status.stdout.splitlines()[1].split() == ["3", "tiny", "COMPLETED", str(run_v1)]
    why = run_module("hpcmm.jobs", "why", str(run_v1), folder=tmp_path)
    assert why.stdout.startswith(f"job 3 ({kept_run.RUN}): COMPLETED. Nothing has failed.\n")
    values = json.loads(run_module("hpcmm.jobs", "why", str(run_v1), "--json", folder=tmp_path).stdout)
    assert (values["job_id"], values["state"], values["failed"]) == ("3", "COMPLETED", False)
    logs = run_module("hpcmm.jobs", "logs", str(run_v1), "-n", "1000", folder=tmp_path)
    assert logs.returncode == 0, logs.stderr
    lines = logs.stdout.splitlines()
    assert lines[0] == f"[batch] To train on: 4 normal images of 2 categories in {tmp_path}/project/data."
    assert any(line.startswith("[0] ") and "step 10/10: loss 0.7690 on this rank" in line for line in lines)
    assert any(line.startswith("[1] ") and "Job completed successfully" in line for line in lines)


def test_it_is_found_by_its_name_in_the_runs_folder(run_v1, tmp_path):
    for name in ("latest", "tiny"):
        status = run_module("hpcmm.jobs", "status", name, folder=tmp_path / "project")
        assert str(run_v1) in status.stdout, status.stderr


def test_the_points_of_its_sweep_are_told(run_v1, tmp_path):
    done = run_module("hpcmm.jobs", "status", str(run_v1.with_name(kept_run.SWEEP)), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:3]] == [
        ["4_0", "seeds", "COMPLETED"],
        ["4_1", "seeds", "COMPLETED"],
    ]
    assert "2 COMPLETED" in done.stdout


def test_its_model_is_scored_as_then(run_v1, tmp_path):
    done = run_module("hpcmm.evaluate", str(run_v1), "--out", "scores", folder=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["category"]: row for row in rows_of(tmp_path / "scores" / "scores.csv")}
    found = {(category, score): float(rows[category][score]) for category, score in SCORES}
    assert found == pytest.approx(SCORES, abs=NEAR)
    recorded = json.loads((run_v1 / "metrics" / "evaluation.json").read_text(encoding="utf-8"))
    for score in ("image_auroc", "pixel_auroc"):
        assert found["all images", score] == pytest.approx(recorded[f"{score}_after"], abs=NEAR)


@pytest.mark.long
def test_the_points_of_its_sweep_are_scored_with_the_names_of_what_differs(run_v1, tmp_path):
    sweep = run_v1.with_name(kept_run.SWEEP)
    done = run_module("hpcmm.evaluate", str(sweep), "--out", "scores", folder=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [row for row in rows_of(tmp_path / "scores" / "scores.csv") if row["category"] == "all images"]
    assert [(row["run"], row["model"], row["seed"]) for row in rows] == [
        ("0000", "resnet", "0"),
        ("0001", "resnet", "1"),
    ]
    assert [float(row["pixel_auroc"]) for row in rows] == pytest.approx([0.539428, 0.485969], abs=NEAR)


def test_it_is_served_with_the_findings_of_then(run_v1):
    from hpcmm.runs.run_dir import RunDir
    from hpcmm.train.checkpoint import load_model
    from hpcmm.workloads.anomaly.page.predictor import Predictor, Request
    from hpcmm.workloads.anomaly.page.served import ServedDetector

    config = config_file.load(run_v1 / "config.yaml")
    model = load_model(RunDir(run_v1), lambda: ServedDetector().build_model(config))
    predictor = Predictor(model, config.data.image_size)
    assert (predictor.side, predictor.speaks) == (64, False)
    asked = []
    for name in ("good/000", "hole/000"):
        with Image.open(run_v1.parents[1] / "data" / "brick" / "test" / f"{name}.png") as picture:
            asked.append(Request(np.asarray(picture.convert("RGB").resize((64, 64)), np.float32) / 255, "a brick wall"))
    good, hole = predictor(asked)
    assert good.map.shape == hole.map.shape == (64, 64)
    assert (good.score, hole.score) == pytest.approx((0.26634, 0.41892), abs=NEAR)


def test_a_new_run_starts_from_its_weights(run_v1, tmp_path):
    project = tmp_path / "project"
    done = run_module(
        "hpcmm.launch", "cluster=local", "cluster.ranks_per_node=1", "name=next", "wait=true", "model/decoder=resnet",
        "model.decoder_width=32", "model.text_adapter_width=4", f"data.root={project / 'data'}", "data.generate=false",
        "data.image_size=64", "train.steps=1", "train.micro_batch_size=2", f"train.init_from={kept_run.RUN}",
        folder=project,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    started = (project / "runs" / "latest").resolve()
    assert started != run_v1
    then = json.loads((run_v1 / "metrics" / "evaluation.json").read_text(encoding="utf-8"))
    now = json.loads((started / "metrics" / "evaluation.json").read_text(encoding="utf-8"))
    for score in ("image_auroc", "pixel_auroc"):
        assert now[f"{score}_before"] == pytest.approx(then[f"{score}_after"], abs=NEAR)
        assert abs(now[f"{score}_before"] - then[f"{score}_before"]) > 10 * NEAR


def test_its_configuration_is_read_with_its_values(run_v1):
    path = run_v1 / "config.yaml"
    kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert len(kept) == 15
    assert_holds(read_untyped_config(path), kept)
    loaded = config_file.load(path)
    assert_holds(asdict(loaded), kept)
    assert (loaded.name, loaded.cluster.nodes, loaded.cluster.ranks_per_node) == ("tiny", 2, 1)
    assert loaded.data.root == str(run_v1.parents[1] / "data")
    assert (loaded.data.slow_rank, loaded.data.slow_s, loaded.data.image_size) == (1, 0.3, 64)
    assert (part_name(loaded.model.decoder), loaded.model.decoder_width, loaded.model.text_adapter_width) == (
        "resnet",
        32,
        4,
    )
    assert (loaded.train.steps, loaded.train.learning_rate, loaded.train.betas) == (10, 0.01, [0.9, 0.95])
    assert (loaded.train.checkpoint_every, loaded.train.keep_checkpoints, loaded.train.init_from) == (5, 1, None)
    assert (loaded.profile.name, loaded.profile.ranks, loaded.parallel.zero_stage) == ("nsys", "all", 2)


@pytest.mark.parametrize("point", ["0000", "0001"])
def test_the_configuration_of_a_point_is_read_with_its_values(run_v1, point):
    path = run_v1.with_name(kept_run.SWEEP) / point / "config.yaml"
    kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert kept["train"]["seed"] == int(point)
    assert_holds(read_untyped_config(path), kept)
    assert_holds(asdict(config_file.load(path)), kept)
