"""The model as the server asks it: the same answers in a batch as alone, and words only for those who asked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcmm.config.schema import RunConfig
from hpcmm.runs.run_dir import RunDir
from hpcmm.workloads.anomaly.data.anomaly import build_datasets
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.data_root import ensure_data
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.models.scores import best_decision
from hpcmm.workloads.anomaly.page.held_out import UNKNOWN, choose_threshold, examples_of, held_out_images
from hpcmm.workloads.anomaly.page.predictor import Predictor, Request
from hpcmm.workloads.anomaly.schema import DataConfig, LlmConfig, LlmKind, ModelConfig, Standins
from hpcmm.workloads.anomaly.scoring import score_images

SIDE = 64
SMALL = ModelConfig(decoder_width=32, text_adapter_width=64)


def requests(count, question=None):
    rng = np.random.default_rng(0)
    images = rng.random((count, SIDE, SIDE, 3), np.float32)
    return [Request(image, f"thing {place % 2}", question) for place, image in enumerate(images)]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(build_model(SMALL).eval(), SIDE)


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    made.create()
    (made.checkpoints / "latest").write_text("step_1")
    return made


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    root = tmp_path_factory.mktemp("standins") / "data"
    data = DataConfig(image_size=SIDE, train_images_per_category=1, test_images_per_category=4, generate=True)
    generate(root, data, 0)
    return build_datasets(root, data, 0)[1]


def test_a_batch_gives_each_what_it_would_get_alone(predictor):
    asked = requests(5)
    together = predictor(asked)
    for request, found in zip(asked, together, strict=True):
        (alone,) = predictor([request])
        assert found.score == pytest.approx(alone.score, abs=1e-4)
        np.testing.assert_allclose(found.map, alone.map, atol=1e-3)
        assert found.map.shape == (SIDE, SIDE)
        assert 0 <= found.score <= 1


def test_without_a_language_model_there_are_no_words(predictor):
    assert not predictor.speaks
    assert [found.words for found in predictor(requests(2, "Is it broken?"))] == [None, None]


def test_with_one_those_who_asked_get_words():
    config = replace(SMALL, llm=LlmConfig(kind=LlmKind.tiny, max_answer_tokens=4))
    predictor = Predictor(build_model(config).eval(), SIDE)
    assert predictor.speaks
    asked = [*requests(2, "Is it broken?"), requests(1)[0]]
    found = predictor(asked)
    assert [isinstance(each.words, str) for each in found] == [True, True, False]
    assert found[0].words == predictor(asked[:1])[0].words


def test_the_threshold_is_that_of_the_largest_f1_and_is_kept_for_its_checkpoint(predictor, run, held_out):
    chosen = choose_threshold(run, predictor, held_out, None)
    scored = score_images(predictor.model, held_out, 8, torch.device("cpu"))
    assert chosen.value == pytest.approx(best_decision(scored.score, scored.label).threshold, abs=1e-4)
    assert f"over {len(held_out)} held-out images" in chosen.origin
    kept = json.loads(run.threshold.read_text())
    run.threshold.write_text(json.dumps(kept | {"value": 0.125}))
    assert choose_threshold(run, predictor, held_out, None).value == 0.125
    (run.checkpoints / "latest").write_text("step_2")
    assert choose_threshold(run, predictor, held_out, None).value == pytest.approx(chosen.value, abs=1e-4)


@pytest.mark.parametrize("content", ["{", "[]", '{"value": 0.5}', '{"checkpoint": "step_1", "value": "x"}'])
def test_a_damaged_threshold_file_is_chosen_anew(content, predictor, run, held_out):
    run.threshold.parent.mkdir()
    run.threshold.write_text(content)
    assert "largest F1" in choose_threshold(run, predictor, held_out, None).origin


def test_where_it_cannot_be_chosen_that_is_said(predictor, run, held_out):
    assert choose_threshold(run, predictor, held_out, 0.3).value == 0.3
    without = choose_threshold(run, predictor, None, None)
    assert (without.value, "not at hand" in without.origin) == (UNKNOWN, True)
    normal = held_out.part([place for place in range(len(held_out)) if not held_out[place]["label"]])
    assert "all of one kind" in choose_threshold(run, predictor, normal, None).origin


def test_examples_are_a_defect_of_each_category_first(held_out):
    examples, captions = examples_of(held_out)
    labels = [example.sample.label for example in examples]
    assert labels == sorted(labels, reverse=True)
    assert labels.count(1) == len({example.sample.category for example in examples if example.sample.label})
    assert len(captions) == len(set(captions)) > 1
    assert examples_of(None) == ([], [])


def test_examples_of_a_run_that_is_scored_on_other_stand_ins_are_those(tmp_path):
    config = RunConfig(name="x")
    config.cluster.cache_dir = str(tmp_path)
    config.data = DataConfig(
        generate=True, standins=Standins.scenes, test_standins=Standins.surfaces, image_size=SIDE,
        train_images_per_category=1, test_images_per_category=2,
    )  # fmt: skip
    ensure_data(config)
    found = held_out_images(config)
    assert found is not None
    assert "brick" in {found.described(index)[0].category for index in range(len(found))}
