"""The VisA reader and writer: what they list, and what the reader says of a broken split."""

from __future__ import annotations

import csv
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data import visa
from hpcmm.workloads.anomaly.data.anomaly import build_datasets
from hpcmm.workloads.anomaly.data.images import read_mask, read_pair
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.schema import DataConfig, Layout, OnError


@pytest.fixture(scope="session")
def visa_config(small: DataConfig) -> DataConfig:
    return replace(small, layout=Layout.visa)


@pytest.fixture(scope="session")
def visa_root(tmp_path_factory: pytest.TempPathFactory, visa_config: DataConfig) -> Path:
    root = tmp_path_factory.mktemp("visa") / "set"
    generate(root, visa_config, seed=0)
    return root


@pytest.fixture
def broken(visa_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(visa_root, tmp_path / "visa")
    return tmp_path / "visa"


def edit_split(root: Path, row: int, **values: str) -> None:
    path = root / visa.SPLIT
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[row].update(values)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, visa.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_the_layout_is_visas(visa_root: Path, visa_config: DataConfig):
    assert (visa_root / "split_csv/1cls.csv").read_text().splitlines()[0] == "object,split,label,image,mask"
    brick = visa_root / "brick" / "Data"
    assert (brick / "Images/Normal/0000.JPG").is_file()
    assert (brick / "Images/Anomaly/000.JPG").is_file()
    with Image.open(brick / "Masks/Anomaly/000.png") as mask:
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2, 3, 4}
    train, test = visa.train_samples(visa_root, "brick"), visa.test_samples(visa_root, "brick")
    assert len(train) == visa_config.train_images_per_category
    assert {sample.label for sample in train} == {0}
    assert sum(sample.label for sample in test) == visa_config.test_images_per_category // 2
    assert all(read_pair(sample, 128)[1].any() for sample in test if sample.label)


def test_both_layouts_hold_the_same_images(visa_root: Path, standins: Path, visa_config: DataConfig, small: DataConfig):
    _, as_visa = build_datasets(visa_root, visa_config, seed=0)
    _, as_mvtec = build_datasets(standins, small, seed=0)
    by_area = [sorted((int(item["mask"].sum()), item["category"]) for item in items) for items in (as_visa, as_mvtec)]
    assert by_area[0] == by_area[1]


def test_training_on_visa_and_scoring_on_mvtec(visa_root: Path, standins: Path, visa_config: DataConfig):
    config = replace(visa_config, test_root=str(standins), test_layout=Layout.mvtec, test_categories=["coins", "grass"])
    train, test = build_datasets(visa_root, config, seed=0)
    assert {train[index]["category"] for index in range(len(train))} == set(visa.list_categories(visa_root))
    assert {item["category"] for item in test} == {"coins", "grass"}


def test_shots_are_drawn_by_the_seed(visa_root: Path, visa_config: DataConfig):
    def drawn(seed: int) -> list[Path]:
        train, _ = build_datasets(visa_root, replace(visa_config, shots=2), seed)
        return [sample.image for sample in train._samples]

    assert len(drawn(0)) == 2 * 5
    assert drawn(0) == drawn(0) != drawn(1)
    with pytest.raises(HpcmmError, match=r"data\.shots is 7, but category brick has 1 to 6"):
        build_datasets(visa_root, replace(visa_config, shots=7), seed=0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": "validation"}, "line 2, has split 'validation'"),
        ({"label": "bad"}, "label 'bad'"),
        ({"label": "anomaly"}, "line 2, trains on an anomaly"),
        ({"image": "../../etc/passwd"}, "leads out of the data folder"),
        ({"image": "/etc/passwd"}, "leads out of the data folder"),
        ({"image": "brick/none.JPG"}, r"lists .*none\.JPG, which is missing"),
    ],
)
def test_a_broken_split_is_named(broken: Path, values: dict[str, str], said: str):
    edit_split(broken, 0, **values)
    with pytest.raises(HpcmmError, match=said):
        visa.train_samples(broken, "brick")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "lists no images"), ("object,split\nbrick,train\n", "lacks label, image, mask"), (b"\xff\xfe", "not a CSV")],
)
def test_a_split_of_another_form_is_named(broken: Path, text: str | bytes, said: str):
    (broken / visa.SPLIT).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HpcmmError, match=said):
        visa.list_categories(broken)


def test_a_folder_without_split_is_named(tmp_path: Path):
    with pytest.raises(HpcmmError, match=r"1cls\.csv cannot be read .*set data\.root to VisA's folder"):
        visa.list_categories(tmp_path)


def test_a_mask_of_another_size_is_refused_or_left_out(broken: Path, visa_config: DataConfig, caplog):
    bad = next(sample for sample in visa.test_samples(broken, "coins") if sample.mask)
    Image.new("L", (9, 5), 1).save(bad.mask)
    _, test = build_datasets(broken, visa_config, seed=0)
    with pytest.raises(HpcmmError, match="must be of one size, not 128 x 128 and 9 x 5 pixels"):
        list(test)
    with caplog.at_level(logging.WARNING, logger="hpcmm.workloads.anomaly.data"):
        _, usable = build_datasets(broken, replace(visa_config, on_error=OnError.skip), seed=0)
    assert len(list(usable)) == len(test) - 1
    assert "9 x 5" in caplog.text
    assert f"1 of {len(test)} test images are left out" in caplog.text


def test_an_unreadable_training_image_is_refused_or_replaced(broken: Path, visa_config: DataConfig, caplog):
    first = visa.train_samples(broken, "brick")[0]
    first.image.write_bytes(b"not a picture")
    train, _ = build_datasets(broken, visa_config, seed=0)
    with pytest.raises(HpcmmError, match=r"0000\.JPG cannot be read"):
        train[0]
    train, _ = build_datasets(broken, replace(visa_config, on_error=OnError.skip), seed=0)
    with caplog.at_level(logging.WARNING, logger="hpcmm.workloads.anomaly.data"):
        items = [train[index] for index in range(3 * len(train))]
    assert len(items) == 3 * len(train)
    assert caplog.text.count("0000.JPG cannot be read") == 1


def test_mask_values_above_zero_are_defects(tmp_path: Path):
    values = np.zeros((8, 8), np.uint8)
    values[2:4, 2:4] = 3
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 8).sum() == 4
