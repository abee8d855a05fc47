"""The published experiment, small: one array over decoders, runs that repeat, and its scores side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pandas as pd
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(600)]

SMALL = [
    "experiment=visa_to_mvtec",
    "profile=off",
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.gpus_per_node=1",
    "data.image_size=64",
    "data.train_images_per_category=3",
    "data.test_images_per_category=5",
    "train.steps=3",
    "launch.parallel_points=1",
]
POINTS = ["model/decoder=mlp,mlp_bn", "train.seed=3,4"]


def module(cluster, folder, name, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=cluster.env, cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def swept(cluster, folder):
    """The folder of a finished sweep over POINTS."""
    module(cluster, folder, "hpcmm.launch", *SMALL, *POINTS)
    sweep = (folder / "runs" / "latest").resolve()
    until = time.monotonic() + 400
    while cluster.run("squeue", "-h", "-t", "PD,R,CG,CF").strip():
        assert time.monotonic() < until, cluster.run("squeue")
        time.sleep(0.5)
    return sweep


@pytest.fixture(scope="module")
def sweep(slurm_cluster, tmp_path_factory):
    return swept(slurm_cluster, tmp_path_factory.mktemp("published"))


def losses(run):
    records = [json.loads(line) for line in (run / "metrics" / "rank_0001.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


def test_a_second_sweep_repeats_every_loss_and_score(sweep, slurm_cluster, tmp_path):
    again = swept(slurm_cluster, tmp_path)
    for index in range(4):
        runs = [folder / f"{index:04d}" for folder in (sweep, again)]
        assert len(losses(runs[0])) == 3
        assert losses(runs[0]) == losses(runs[1])
        scores = [(run / "metrics" / "evaluation.json").read_text() for run in runs]
        assert scores[0] == scores[1]
    assert losses(sweep / "0000") != losses(sweep / "0001")


def test_the_sweep_s_scores_are_those_that_its_ranks_worked_out(sweep, slurm_cluster, tmp_path):
    said = module(slurm_cluster, tmp_path, "hpcmm.evaluate", str(sweep), "--out", "scores").stdout
    assert "These are stand-ins" in said
    table = pd.read_csv(tmp_path / "scores" / "scores.csv")
    assert list(dict.fromkeys(table["model"])) == ["mlp", "mlp_bn"]
    assert set(table["seed"]) == {3, 4}
    for run, rows in table.groupby(table["run"]):
        own = json.loads((sweep / f"{run:04d}" / "metrics" / "evaluation.json").read_text())
        pooled = rows[rows["category"] == "all images"].iloc[0]
        assert pooled["image_auroc"] == pytest.approx(own["image_auroc_after"], abs=1e-6)
        assert pooled["pixel_auroc"] == pytest.approx(own["pixel_auroc_after"], abs=1e-4)
    written = {path.name for path in (tmp_path / "scores").iterdir()}
    assert written == {"scores.csv", "summary.csv", "comparison.md", "comparison.tex", "comparison.png", "maps.png"}
