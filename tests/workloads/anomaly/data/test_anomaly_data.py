"""The torch data sets: items, reproducible augmentation, held-out images as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.anomaly import build_datasets, collate
from hpcmm.workloads.anomaly.data.images import normalise, read_image
from hpcmm.workloads.anomaly.data.mvtec import test_samples as held_out_samples
from hpcmm.workloads.anomaly.question_answering.conversations import parse_answer
from hpcmm.workloads.anomaly.question_answering.grid import defect_cells
from hpcmm.workloads.anomaly.schema import DataConfig


def test_items_have_the_promised_types(standins: Path, small: DataConfig):
    for dataset in build_datasets(standins, small, seed=0):
        item = dataset[3]
        assert (item["image"].shape, item["image"].dtype) == ((3, 64, 64), torch.float32)
        assert (item["mask"].shape, item["mask"].dtype) == ((1, 64, 64), torch.float32)
        assert set(item["mask"].unique().tolist()) <= {0.0, 1.0}
        assert item["label"] in {0, 1}
        assert item["category"] == "brick"
        assert item["index"] == 3


def test_counts_follow_the_folders_and_the_chosen_categories(standins: Path, small: DataConfig):
    train, test = build_datasets(standins, small, seed=0)
    assert (len(train), len(test)) == (5 * 6, 5 * 8)
    train, test = build_datasets(standins, replace(small, categories=["grass", "coins"]), seed=0)
    assert (len(train), len(test)) == (2 * 6, 2 * 8)
    assert {item["category"] for item in test} == {"coins", "grass"}


def test_an_item_depends_on_seed_epoch_and_index_alone(standins: Path, small: DataConfig):
    (first, _), (again, _), (reseeded, _) = (build_datasets(standins, small, seed) for seed in (0, 0, 1))
    later = 3 * len(first) + 2
    for index in (later, 2):  # in an order other than that of `first`
        again[index]
    assert torch.equal(first[2]["image"], again[2]["image"])
    assert first[2]["caption"] == again[2]["caption"]
    assert not torch.equal(first[2]["image"], reseeded[2]["image"])
    assert not torch.equal(first[2]["image"], first[later]["image"])
    assert first[later]["index"] == 2


def test_loader_workers_give_what_the_own_process_gives(standins: Path, small: DataConfig):
    train, _ = build_datasets(standins, small, seed=0)
    batches = [[0, 7, 9], [31, 33, 44]]
    alone, spread = (
        list(DataLoader(train, batch_sampler=batches, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    for mine, theirs in zip(alone, spread, strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        assert torch.equal(mine["mask"], theirs["mask"])
        assert mine["caption"] == theirs["caption"]


def test_a_pass_over_the_training_set_ends(standins: Path, small: DataConfig):
    train, _ = build_datasets(standins, small, seed=0)
    assert [item["index"] for item in train] == list(range(len(train)))


@pytest.mark.parametrize(("probability", "share"), [(0.0, (0, 0)), (0.5, (0.35, 0.65)), (1.0, (0.9, 1))])
def test_the_share_of_anomalies_follows_the_probability(
    standins, small, probability: float, share: tuple[float, float]
):
    train, _ = build_datasets(standins, replace(small, anomaly_probability=probability), seed=0)
    items = [train[index] for index in range(150)]
    assert share[0] <= np.mean([item["label"] for item in items]) <= share[1]
    assert all(item["label"] == int(item["mask"].any()) for item in items)


def test_held_out_images_are_the_files_unchanged(standins: Path, small: DataConfig):
    _, test = build_datasets(standins, replace(small, categories=["gravel"]), seed=0)
    for item, sample in zip(test, held_out_samples(standins, "gravel"), strict=True):
        np.testing.assert_array_equal(item["image"].numpy(), normalise(read_image(sample.image, 64)))
        assert item["label"] == sample.label == int(item["mask"].any())


def test_captions_do_not_tell_the_label(standins: Path, small: DataConfig):
    train, test = build_datasets(standins, replace(small, anomaly_probability=0.5), seed=0)
    telling = re.compile(r"good|normal|damag|defect|scratch|hole|blur|contamin|broken|flaw", re.IGNORECASE)
    items = [*(train[index] for index in range(120)), *test]
    assert not [item["caption"] for item in items if telling.search(item["caption"])]
    by_label = [{item["caption"] for item in test if item["label"] == label} for label in (0, 1)]
    assert by_label[0] == by_label[1]


def test_collate_stacks_in_order(standins: Path, small: DataConfig):
    train, _ = build_datasets(standins, small, seed=0)
    batch = collate([train[5], train[1], train[29]])
    assert batch["image"].shape == (3, 3, 64, 64)
    assert batch["mask"].shape == (3, 1, 64, 64)
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == [5, 1, 29]
    assert batch["category"] == ["brick", "brick", "tissue"]
    assert len(batch["caption"]) == 3


@pytest.mark.parametrize("change", [{"image_size": 16}, {"anomaly_probability": 1.5}, {"categories": ["screw"]}])
def test_values_that_cannot_be_used_are_named(standins: Path, small: DataConfig, change: dict[str, object]):
    with pytest.raises(HpcmmError, match=f"data.{next(iter(change))}"):
        build_datasets(standins, replace(small, **change), seed=0)


def test_dialogues_say_what_the_masks_say_and_not_what_is_shown(standins: Path, small: DataConfig):
    for items in build_datasets(standins, small, seed=0):
        asked = set()
        for item in (items[index] for index in range(len(items))):
            question, answer = item["dialogue"]
            said = parse_answer(answer)
            assert said.anomalous == bool(item["label"])
            assert said.cells == set(defect_cells(item["mask"][0].numpy()))
            assert item["category"] not in question + answer
            asked.add(question)
        assert len(asked) > 1
