"""The command: what can be scored is, and what cannot is named."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig
from hpcmm.config.workload import Workload, workload_of
from hpcmm.evaluate import __main__ as command
from hpcmm.evaluate.evaluation import MEAN, Evaluation, Progress, Scored
from hpcmm.runs.run_dir import RunDir
from hpcmm.workloads.anomaly.data.anomaly import TestImages, build_datasets
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.evaluation import Shown
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.models.language import LanguageHead
from hpcmm.workloads.anomaly.schema import DataConfig, LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.anomaly.scoring import ImageScores, by_category, score_images

SIDE = 8


def made_run(folder: Path, *overrides: str) -> RunDir:
    """A run with a checkpoint by name."""
    run = RunDir(folder)
    run.create()
    config_file.dump(compose_run(["cluster=local", *overrides]), run.config)
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / "latest").write_text("step_1")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs with a checkpoint by name, the second of which has a damaged configuration."""
    made = [made_run(tmp_path / name).root for name in ("good", "bad")]
    (made[1] / "config.yaml").write_text("[")
    return made


def scored_by_a_rule(*_: object) -> Scored:
    label = np.array([0, 1] * 3)
    mask = np.zeros((6, SIDE, SIDE), bool)
    mask[label == 1, 2:4, 2:5] = True
    maps = mask * 0.5 + np.linspace(0, 0.4, SIDE, dtype=np.float32)
    found = ImageScores(label + 0.1, label, maps, mask, np.array(["tile"] * 6, object))
    images = {1: np.zeros((3, SIDE, SIDE), np.float32)}
    return Scored(by_category(found), "stand-ins", "stand-ins", Shown(found, images))


def test_a_run_that_cannot_be_scored_costs_the_others_nothing(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "_score", scored_by_a_rule)
    assert command.main([*map(str, reversed(runs)), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert "not scored: bad: " in told.err
    assert "good" in (tmp_path / "out" / "scores.csv").read_text()
    assert command.main([str(runs[1]), "--out", str(tmp_path / "none")]) == 1
    assert "hpcmm.evaluate: bad: " in capsys.readouterr().err
    assert command.main([str(runs[0]), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("kind: tiny", "kind: folder", "model.language_model.path is not given"),
        ("architecture: llama", "architecture: bert", "model.language_model.architecture is 'bert', but must be"),
        ("    width: 64", "    width: -64", "model.language_model.tiny.width is -64"),
        ("heads: 4", "heads: 3", "model.language_model.tiny.heads is 3, but must be a multiple"),
        ("seed: 0", "seed: -5", "train.seed is -5"),
    ],
)
def test_values_that_no_launch_takes_are_named_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], was: str, becomes: str, said: str
):
    run = made_run(tmp_path / "edited", "task=omni")
    text = run.config.read_text()
    assert was in text
    run.config.chmod(0o600)
    run.config.write_text(text.replace(was, becomes, 1))
    assert command.main([str(run.root), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"{run.config} has values that no run can have: " in told
    assert said in told


def test_help_and_the_options_of_a_runs_workload_take_no_torch(runs: list[Path]):
    code = (
        "import sys\nfrom hpcmm.evaluate.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print([name for name in ('torch', 'sklearn', 'hydra') if name in sys.modules])"
    )
    for named in ([], [str(runs[0])], ["no_such_run"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *named, "--help"], capture_output=True, text=True, check=True
        )
        assert "--test-layout {mvtec,visa}" in done.stdout
        assert "image and pixel AUROC" in done.stdout
        assert done.stdout.endswith("[]\n")


class Losses(Evaluation):
    """Of another workload: one metric, one option, no picture."""

    metrics = ("exactness",)

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--split", default="test")

    def with_options(self, config: RunConfig, options: Namespace) -> RunConfig:
        return replace(config, name=options.split)

    def model_name(self, config: RunConfig) -> str:
        return f"tiny of {config.train.seed}"

    def build_model(self, config: RunConfig) -> torch.nn.Module:
        raise NotImplementedError

    def score(self, model: object, config: RunConfig, device: torch.device, progress: Progress) -> Scored:
        raise NotImplementedError


class OtherWorkload(Workload):
    def training_class(self) -> type:
        raise NotImplementedError

    def evaluation(self) -> Evaluation:
        return Losses()


def scored_on_its_split(run: RunDir, config: RunConfig, evaluation: Evaluation) -> Scored:
    return Scored(pd.DataFrame({"category": [config.name, MEAN], "exactness": [0.25, 0.25]}), "text", "text")


def test_a_workload_brings_its_own_metrics_and_options(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "_score", scored_on_its_split)
    monkeypatch.setattr(command, "workload_of", lambda _: OtherWorkload())
    out = tmp_path / "out"
    assert command.main([str(runs[0]), "--split", "held_out", "--out", str(out)]) == 0
    assert (out / "scores.csv").read_text().splitlines() == [
        "run,model,seed,trained_on,scored_on,category,exactness",
        "good,tiny of 0,0,text,text,held_out,0.25",
        "good,tiny of 0,0,text,text,mean,0.25",
    ]
    assert "## exactness by category" in (out / "comparison.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.md", "comparison.png", "comparison.tex", "scores.csv", "summary.csv"
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        command.main([str(runs[0]), "--test-root", "x"])
    assert "unrecognized arguments: --test-root" in capsys.readouterr().err


def test_runs_of_two_workloads_are_not_put_into_one_table(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config_file.dump(compose_run(["cluster=local", "name=other"]), runs[0].with_name("other.yaml"))
    runs[0].with_name("other.yaml").replace(runs[1] / "config.yaml")
    shipped = workload_of
    monkeypatch.setattr(command, "_score", scored_by_a_rule)
    monkeypatch.setattr(
        command, "workload_of", lambda config: OtherWorkload() if config.name == "other" else shipped(config)
    )
    assert command.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 1
    assert "not scored: bad: " in (told := capsys.readouterr().err)
    assert "in another way than the runs before it" in told


def test_a_run_of_a_users_script_has_no_scores(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "workload_of", lambda _: None)
    assert command.main([str(runs[0]), "--out", str(tmp_path / "out")]) == 1
    assert "has no scores" in capsys.readouterr().err


def test_a_threshold_needs_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(
        root=str(tmp_path), categories=["coins"], image_size=64, train_images_per_category=1, test_images_per_category=2
    )
    generate(tmp_path, data, seed=0)
    test: TestImages = build_datasets(tmp_path, data, 0)[1]
    model = build_model(ModelConfig(decoder_width=32, text_adapter_width=32, llm=LlmConfig(kind=LlmKind.tiny)))
    asked = SimpleNamespace(times=0)

    def answer(*_: object) -> list[str]:
        asked.times += 1
        return ["No."] * 2

    monkeypatch.setattr(LanguageHead, "answer", answer)
    cpu = torch.device("cpu")
    silent = score_images(model, test, 2, cpu, words=False)
    assert (asked.times, silent.said) == (0, None)
    speaking = score_images(model, test, 2, cpu)
    assert asked.times == 1
    np.testing.assert_allclose(silent.score, speaking.score)
