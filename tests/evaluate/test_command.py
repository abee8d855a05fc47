"""The command: what can be scored is, and what cannot is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.evaluate import __main__ as command
from hpcmm.runs.run_dir import RunDir
from hpcmm.workloads.anomaly.data.anomaly import TestImages, build_datasets
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.models.language import LanguageHead
from hpcmm.workloads.anomaly.schema import DataConfig, LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.anomaly.scoring import Scored, score_images

SIDE = 8


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs with a checkpoint by name, the second of which has a damaged configuration."""
    made = []
    for name in ("good", "bad"):
        run = RunDir(tmp_path / name)
        run.create()
        config_file.dump(compose_run(["cluster=local"]), run.config)
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / "latest").write_text("step_1")
        made.append(run.root)
    (made[1] / "config.yaml").write_text("[")
    return made


def scored_by_a_rule(*_: object) -> tuple[Scored, list[dict[str, torch.Tensor]], tuple[str, str]]:
    label = np.array([0, 1] * 3)
    mask = np.zeros((6, SIDE, SIDE), bool)
    mask[label == 1, 2:4, 2:5] = True
    maps = mask * 0.5 + np.linspace(0, 0.4, SIDE, dtype=np.float32)
    images = [{"image": torch.zeros(3, SIDE, SIDE)} for _ in label]
    return Scored(label + 0.1, label, maps, mask, np.array(["tile"] * 6, object)), images, ("stand-ins", "stand-ins")


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
