"""The small omni-modal model learns to see and hear: on held-out data it is right far more often than by chance."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

TIMEOUT_S = 3000

pytestmark = [pytest.mark.long, pytest.mark.timeout(2 * TIMEOUT_S)]


def run(module: str, *arguments: str, folder: Path) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, compiled_ops: None) -> pd.DataFrame:
    """What ``hpcmm.evaluate`` says of the trained model, by kind of question and by modality."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    folder = tmp_path_factory.mktemp("learns")
    run("hpcmm.launch", "experiment=omni_answers", "wait=true", folder=folder)
    run("hpcmm.evaluate", "runs/latest", "--out", "scores", folder=folder)
    return pd.read_csv(folder / "scores" / "scores.csv").set_index("category")


@pytest.mark.parametrize("modality", ["image", "sound"])
def test_held_out_answers_are_right_more_than_twice_as_often_as_by_chance(scores: pd.DataFrame, modality: str):
    row = scores.loc[modality]
    assert row["answers"] >= 300
    assert row["lower_95"] > 2 * row["chance"]
