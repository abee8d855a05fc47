"""The MVTec-AD reader: what it lists, and what it says of a wrong layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data import mvtec
from hpcmm.workloads.anomaly.data.captions import read_captions
from hpcmm.workloads.anomaly.data.images import read_image, read_mask


@pytest.fixture
def broken(standins: Path, tmp_path: Path) -> Path:
    """A copy of two categories, free to be damaged."""
    for category in ("brick", "grass"):
        shutil.copytree(standins / category, tmp_path / category)
    return tmp_path


def test_lists_samples_with_their_masks(standins: Path):
    assert mvtec.list_categories(standins) == ["brick", "coins", "grass", "gravel", "tissue"]
    assert mvtec.list_categories(standins, ["grass", "brick"]) == ["brick", "grass"]
    train, test = mvtec.train_samples(standins, "brick"), mvtec.test_samples(standins, "brick")
    assert {(sample.label, sample.mask, sample.defect) for sample in train} == {(0, None, "good")}
    assert [sample.defect for sample in test] == sorted(sample.defect for sample in test)
    assert {sample.label for sample in test if sample.defect != "good"} == {1}
    hole = next(sample for sample in test if sample.defect == "hole")
    assert hole.mask == standins / "brick" / "ground_truth" / "hole" / f"{hole.image.stem}_mask.png"


def test_files_beside_the_categories_are_no_category(broken: Path):
    (broken / "readme.txt").write_text("")
    (broken / "extra").mkdir()
    assert mvtec.list_categories(broken) == ["brick", "grass"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("brick/train/good", r"brick/train/good.*000\.png"),
        ("brick/test", r"brick/test must hold"),
        ("brick/test/hole", r"test/hole must hold images"),
        ("brick/ground_truth/hole", r"hole/000\.png needs the mask .*hole/000_mask\.png"),
    ],
)
def test_a_wrong_layout_is_named(broken: Path, damage: str, said: str):
    shutil.rmtree(broken / damage)
    if damage.endswith(("good", "hole")):
        (broken / damage).mkdir()
    with pytest.raises(HpcmmError, match=said):
        mvtec.train_samples(broken, "brick")
        mvtec.test_samples(broken, "brick")


def test_a_missing_root_or_category_is_named(broken: Path):
    with pytest.raises(HpcmmError, match="nowhere does not exist"):
        mvtec.list_categories(broken / "nowhere")
    with pytest.raises(HpcmmError, match="No folder <category>/train/good"):
        mvtec.list_categories(broken / "brick")
    with pytest.raises(HpcmmError, match=r"names screw, but .* holds brick, grass"):
        mvtec.list_categories(broken, ["brick", "screw"])


def test_captions_come_from_the_file_or_the_folders_name(standins: Path, tmp_path: Path):
    assert read_captions(standins, ["brick"])["brick"][0] == "a brick wall"
    assert read_captions(tmp_path, ["metal_nut", "apple"]) == {"metal_nut": ("a metal nut",), "apple": ("an apple",)}


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"brick": "a wall"}', '{"brick": []}', '{"brick": [3]}', '{"brick": [""]}']
)
def test_malformed_captions_are_refused(tmp_path: Path, text: str):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(HpcmmError, match=r"captions\.json"):
        read_captions(tmp_path, ["brick"])


def test_images_of_any_kind_become_three_channels_of_one_size(tmp_path: Path):
    Image.new("L", (50, 30), 51).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png", 16)
    assert (image.shape, image.dtype) == ((16, 16, 3), np.float32)
    np.testing.assert_allclose(image, 0.2)


def test_masks_stay_zeros_and_ones_when_resized(tmp_path: Path):
    values = np.zeros((40, 40), np.uint8)
    values[10:30, 10:30] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", 16)
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert mask.mean() == pytest.approx(0.25, abs=0.02)


def test_an_unreadable_image_is_named(tmp_path: Path):
    (tmp_path / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(HpcmmError, match=r"000\.png cannot be read"):
        read_image(tmp_path / "000.png", 16)
    with pytest.raises(HpcmmError, match=r"001\.png cannot be read"):
        read_mask(tmp_path / "001.png", 16)
