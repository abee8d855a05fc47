"""Scores by category, intervals over seeds, the picture; and a whole run scored from its checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.evaluate.evaluation import MEAN
from hpcmm.evaluate.side_by_side import over_seeds, separated
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import load_model
from hpcmm.workloads.anomaly import maps_picture
from hpcmm.workloads.anomaly.evaluation import METRICS, POOLED, AnomalyEvaluation
from hpcmm.workloads.anomaly.models import AnomalyModel
from hpcmm.workloads.anomaly.models.scores import image_auroc
from hpcmm.workloads.anomaly.question_answering.conversations import ParsedAnswer
from hpcmm.workloads.anomaly.question_answering.scores import METRICS as WORDS
from hpcmm.workloads.anomaly.question_answering.scores import statements
from hpcmm.workloads.anomaly.scoring import ImageScores, by_category


def untrained() -> AnomalyModel:
    return AnomalyEvaluation().build_model(RunConfig())


@pytest.fixture
def scored() -> ImageScores:
    """Two categories of ten images; ``tile`` has no defect."""
    rng = np.random.default_rng(0)
    label = np.array([0, 1] * 5 + [0] * 10)
    mask = np.zeros((20, 8, 8), dtype=bool)
    mask[label == 1, 2:4, 2:5] = True
    maps = (0.3 * rng.random((20, 8, 8)) + 0.5 * mask).astype(np.float32)
    category = np.array(["screw"] * 10 + ["tile"] * 10, dtype=object)
    return ImageScores(
        maps.max(axis=(1, 2)) * rng.uniform(0.7, 1.3, 20).astype(np.float32), label, maps, mask, category
    )


def test_each_category_is_scored_by_itself_and_counts_the_same_in_the_mean(scored: ImageScores):
    table = by_category(scored).set_index("category")
    assert list(table.index) == ["screw", "tile", POOLED, MEAN]
    assert table.loc["screw", "image_auroc"] == image_auroc(scored.score[:10], scored.label[:10]).value
    maps = [metric for metric in METRICS if metric not in WORDS]
    assert table.loc["tile", maps].isna().all()
    pd.testing.assert_series_equal(table.loc[MEAN, maps], table.loc["screw", maps], check_names=False)
    assert table.loc[MEAN, "images"] == 20
    assert table.loc[POOLED, "image_auroc"] == image_auroc(scored.score, scored.label).value


def seeds(values: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"model": model, "seed": seed, "category": MEAN, **dict.fromkeys(METRICS, value)}
            for model, of_model in values.items()
            for seed, value in enumerate(of_model)
        ]
    )


def test_intervals_are_students_t(scored: ImageScores):
    values = [0.8, 0.84, 0.91]
    row = over_seeds(seeds({"fcn": values}), METRICS).iloc[0]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (row["seeds"], row["mean"]) == (3, pytest.approx(0.85))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(min(high, 1)))


def test_only_models_whose_intervals_do_not_touch_are_ranked():
    table = over_seeds(
        seeds({"good": [0.95, 0.951, 0.952], "bad": [0.6, 0.61, 0.62], "wide": [0.5, 0.9, 0.99]}), METRICS
    )
    assert separated(table, "image_auroc") == [("good", "bad")]
    assert separated(over_seeds(seeds({"good": [0.9], "bad": [0.1]}), METRICS), "image_auroc") == []


def test_the_picture_shows_an_image_a_category_and_a_map_a_model(scored: ImageScores, tmp_path):
    indices = maps_picture.chosen(scored)
    assert [scored.category[index] for index in indices] == ["screw", "tile"]
    assert scored.label[indices[0]] == 1
    images = {index: np.zeros((3, 8, 8), np.float32) for index in indices}
    maps_picture.draw(tmp_path / "maps.png", images, [("fcn", scored), ("mlp", scored)])
    with Image.open(tmp_path / "maps.png") as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape[1] > 4 * 128
    # The defect's place is brighter than the rest, in the mask as in both maps.
    for place in (1, 2, 3):
        cell = pixels[18:146, 96 + place * 132 : 96 + place * 132 + 128].mean(axis=2)
        assert cell[40:60, 40:70].mean() > cell[80:, 80:].mean() + 30


def test_heat_goes_from_dark_to_bright():
    colours = maps_picture.heat(np.linspace(0, 1, 11, dtype=np.float32)[None])[0]
    assert (np.diff(colours.sum(axis=1)) > 0).all()
    assert np.isfinite(colours).all()


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    with pytest.raises(HpcmmError, match="holds no finished checkpoint"):
        load_model(run, untrained)
    (run.checkpoints / "latest").write_text("step_000010")
    with pytest.raises(HpcmmError, match="names 'step_000010', but there is no such checkpoint"):
        load_model(run, untrained)


def test_a_checkpoint_that_is_gone_or_closed_is_told(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    with pytest.raises(HpcmmError, match="run is not there, or closed to you"):
        load_model(run, untrained)
    run.create()
    (run.checkpoints / "latest").write_text("step_1")
    (run.checkpoints / "step_1").mkdir()

    def removed_meanwhile(*paths):
        raise FileNotFoundError(2, "No such file or directory", str(paths[-1]))

    monkeypatch.setattr("hpcmm.train.checkpoint.other_writer", removed_meanwhile)
    with pytest.raises(HpcmmError, match=r"run cannot be read: No such file or directory: .*step_1"):
        load_model(run, untrained)


def test_a_checkpoint_that_others_can_write_is_not_read(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    (run.checkpoints / "latest").write_text("step_1")
    (run.checkpoints / "step_1").mkdir()
    (run.checkpoints / "step_1").chmod(0o777)
    with pytest.raises(HpcmmError, match="step_1 can be written by another user"):
        load_model(run, untrained)
    (run.checkpoints / "step_1").chmod(0o755)
    (run.checkpoints / "step_1" / "states.pt").touch()
    (run.checkpoints / "step_1" / "states.pt").chmod(0o664)
    with pytest.raises(HpcmmError, match=r"states\.pt can be written by another user"):
        load_model(run, untrained)


def test_words_are_scored_by_category_where_there_are_any(scored: ImageScores):
    truth = statements([ParsedAnswer(bool(label), frozenset({0} if label else ())) for label in scored.label])
    said = truth.copy()
    said[1] = statements([ParsedAnswer(True, frozenset({8}))])[0]  # the wrong place, in the first category
    table = by_category(replace(scored, said=said, truth=truth)).set_index("category")
    assert table.loc["screw", list(WORDS)].tolist() == [1.0, 0.8, 0.8]
    assert table.loc["tile", "words_detection"] == 1
    assert np.isnan(table.loc["tile", "words_grid"])
    assert table.loc[MEAN, "words_grid"] == 0.8
    assert table.loc[POOLED, "words_detection_constant"] == 0.75
    assert not set(WORDS) & set(by_category(scored).columns)
    both = pd.concat([by_category(replace(scored, said=said, truth=truth)).assign(model="words", seed=0),
                      by_category(scored).assign(model="maps", seed=0)])  # fmt: skip
    summary = over_seeds(both, METRICS).set_index(["model", "metric"])
    assert ("words", "words_grid") in summary.index
    assert ("maps", "words_grid") not in summary.index


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"weight": torch.zeros(3, 2)},
            r"size mismatch for weight: copying a param with shape torch\.Size\(\[3, 2\]\)",
        ),
        ({"weight": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "step_1 cannot be loaded: "),
    ],
)
def test_weights_that_the_model_cannot_take_are_told(weights, said, tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    (run.checkpoints / "latest").write_text("step_1")
    (run.checkpoints / "step_1").mkdir()
    save_file(weights, run.checkpoints / "step_1" / "weights.safetensors")
    with pytest.raises(HpcmmError, match=rf"^[^\n]*{said}[^\n]*$"):
        load_model(run, lambda: torch.nn.Linear(2, 2, bias=False))
