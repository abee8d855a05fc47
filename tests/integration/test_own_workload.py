"""A user's own workload, from the examples: launched, profiled, analysed, evaluated; and a decoder from outside."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_workload"
TIMEOUT_S = 280

OWN_DECODER = '''\
"""The finest map alone."""

from torch import nn

from hpcmm.workloads.anomaly.models.decoders import Decoder


class NarrowDecoder(Decoder):
    def __init__(self, channels, width: int, kernel: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels[0], width, kernel, padding=kernel // 2)

    def forward(self, features):
        return self.layer(features[0])
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a user has it: a folder of its own, of which hpcmm knows nothing."""
    folder = tmp_path_factory.mktemp("user") / "my project"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("runs", "evaluation", "__pycache__"))
    return folder


def run(module: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def launched(folder: Path, *overrides: str) -> Path:
    """A run that has trained to its end, of two ranks on this machine."""
    local = ("cluster=local", "cluster.ranks_per_node=2", "launch.config_dir=conf", "wait=true")
    done = run("hpcmm.launch", *local, *overrides, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "runs" / "latest").resolve()


@pytest.fixture(scope="module")
def trained(project: Path, compiled_ops: None, nsys: str) -> Path:
    return launched(project, "task=signals", "profile=nsys")


@pytest.mark.nsys
def test_it_trains_from_its_copy_and_its_scores_are_kept(trained: Path):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["task"]["_target_"] == "signals.workload.SignalsWorkload"
    assert config["net"] == {"name": "convolution", "_target_": "signals.nets.ConvolutionNet", "channels": 16}
    assert list((trained / "code" / "project").rglob("signals/training.py"))
    scores = json.loads((trained / "metrics" / "evaluation.json").read_text())
    assert 0 <= scores["accuracy_before"] <= 1
    assert scores["accuracy_after"] > 0.4  # chance is a third


@pytest.mark.nsys
def test_its_steps_are_analysed(project: Path, trained: Path):
    done = run("hpcmm.analyze", str(trained), folder=project)
    assert done.returncode == 0, done.stderr
    steps = pd.read_csv(trained / "analysis" / "steps.csv")
    assert set(steps["rank"]) == {0, 1}
    assert set(steps["step"]) == set(range(60))
    phases = set(pd.read_csv(trained / "analysis" / "phases_summary.csv")["phase"])
    assert {"data", "forward", "backward", "optimizer"} <= phases


@pytest.mark.long
@pytest.mark.nsys
def test_it_is_evaluated_beside_a_run_with_another_net(project: Path, trained: Path):
    other = launched(project, "task=signals", "net=perceptron")
    done = run("hpcmm.evaluate", str(trained), str(other), "--out", "scores", folder=project)
    assert done.returncode == 0, done.stderr
    summary = pd.read_csv(project / "scores" / "summary.csv")
    assert set(summary["model"]) == {"convolution", "perceptron"}
    assert set(summary["category"]) == {"sine", "square", "sawtooth", "mean"}
    kept = json.loads((trained / "metrics" / "evaluation.json").read_text())["accuracy_after"]
    rows = pd.read_csv(project / "scores" / "scores.csv").query("model == 'convolution' and category != 'mean'")
    assert rows["accuracy"].min() <= kept <= rows["accuracy"].max()


@pytest.mark.nsys
def test_elsewhere_its_classes_are_missed_by_name(trained: Path, tmp_path: Path):
    done = run("hpcmm.evaluate", str(trained), folder=tmp_path)
    assert done.returncode == 1
    assert "signals.workload.SignalsWorkload cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nsys
def test_its_classes_are_not_followed_if_another_user_could_have_named_them(project: Path, trained: Path):
    (project / "signals" / "planted.py").write_text("open('planted', 'w').close()\n")
    config = trained / "config.yaml"
    kept = config.read_text()
    try:
        config.chmod(0o666)
        config.write_text(kept.replace("signals.workload.SignalsWorkload", "signals.planted.Workload"))
        done = run("hpcmm.evaluate", str(trained), folder=project)
        assert done.returncode == 1
        assert "can be written by another user" in done.stderr
        assert not (project / "planted").exists()
    finally:
        config.write_text(kept)
        config.chmod(0o444)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=signals", "net.channels=many"], "net.channels is 'many', but ConvolutionNet takes int."),
        (
            ["task=signals", "net=lstm"],
            "net=lstm is not an option of the group net: choose one of convolution, perceptron",
        ),
        (["task=signals", "data.noise=-1"], "data.noise is -1.0, but must be a finite number, 0 or above."),
        (["task=signals", "data.examples=3"], "data.examples is 3, less than one step's 64"),
        (["task=signals", "data.lenght=3"], "data.lenght is not a configuration key: did you mean data.length?"),
        (["task=signals", "model.decoder=fcn"], "model is a config group, but the chosen task has no such key"),
        (["task=signal"], "choose one of anomaly, function, omni, script, signals"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(project: Path, overrides: list[str], said: str):
    done = run("hpcmm.launch", "cluster=local", "launch.config_dir=conf", "dry_run=true", *overrides, folder=project)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_decoder_from_outside_trains_the_detector_and_is_scored(tmp_path: Path, compiled_ops: None):
    package, options = tmp_path / "mine", tmp_path / "conf" / "model" / "decoder"
    package.mkdir()
    options.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "decoders.py").write_text(OWN_DECODER)
    (options / "narrow.yaml").write_text("_target_: mine.decoders.NarrowDecoder\nkernel: 3\n")
    small = ["data.image_size=64", "data.train_images_per_category=4", "data.test_images_per_category=4"]
    small += ["data.categories=[grass]", "model.decoder_width=32", "model.text_adapter_width=32"]
    trained = launched(tmp_path, "model/decoder=narrow", "train.steps=2", *small)
    done = run("hpcmm.evaluate", str(trained), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(pd.read_csv(tmp_path / "evaluation" / "summary.csv")["model"]) == {"narrow"}
