"""Files as real archives hold them: odd names, kinds of pixels, damage; each is read, or named and skipped."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data import mvtec, visa
from hpcmm.workloads.anomaly.data.anomaly import build_datasets
from hpcmm.workloads.anomaly.data.images import read_image, read_mask
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.schema import DataConfig, Layout, OnError

RAMP = np.tile(np.linspace(0, 255, 32), (32, 1)).astype(np.uint8)
"""From dark on the left to bright on the right."""


@pytest.fixture
def as_mvtec(standins: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(standins, tmp_path / "mvtec"))


@pytest.fixture(scope="module")
def pristine_visa(tmp_path_factory: pytest.TempPathFactory, small: DataConfig) -> Path:
    root = tmp_path_factory.mktemp("visa") / "set"
    generate(root, replace(small, layout=Layout.visa), seed=0)
    return root


@pytest.fixture
def as_visa(pristine_visa: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_visa, tmp_path / "visa"))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grey.png", lambda: Image.fromarray(RAMP)),
        ("deep.png", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("deep.tif", lambda: Image.fromarray(RAMP.astype(">u2") * 257)),
        ("clear.png", lambda: Image.fromarray(RAMP).convert("RGBA")),
        ("print.jpg", lambda: Image.fromarray(RAMP).convert("RGB").convert("CMYK")),
        ("palette.png", lambda: Image.fromarray(RAMP).convert("P")),
        ("grey_clear.png", lambda: Image.fromarray(RAMP).convert("LA")),
    ],
)
def test_pixels_of_any_kind_are_the_same_picture(tmp_path: Path, name: str, make: Callable[[], Image.Image]):
    make().save(tmp_path / name)
    pixels = read_image(tmp_path / name, 32)
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_allclose(pixels.mean(axis=(0, 2)), RAMP[0] / 255, atol=0.04)


def test_values_of_unknown_range_are_refused(tmp_path: Path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(HpcmmError, match="has 32-bit values"):
        read_image(tmp_path / "float.tif", 32)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "RGBA", "LA", "I;16"])
def test_a_mask_of_any_kind_marks_the_same_place(tmp_path: Path, mode: str):
    values = np.zeros((16, 16), np.uint8)
    values[4:8, 4:8] = 255
    mask = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    if mode == "P":  # an index of a black colour is a kind of defect all the same
        mask = Image.fromarray(values // 255, mode="L")
        mask.putpalette([0] * 768)
    mask.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", 16), values > 0)


@pytest.mark.parametrize("cut", [0, 8, 20, 40, 100, 1000])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_a_file_cut_short_anywhere_is_named(tmp_path: Path, suffix: str, cut: int):
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(HpcmmError, match=f"The image .*whole.{suffix} cannot be read"):
        read_image(path, 32)


def test_damage_inside_a_png_is_named_or_read_but_nothing_else(tmp_path: Path):
    whole = tmp_path / "whole.png"
    Image.fromarray(RAMP).save(whole)
    content = bytearray(whole.read_bytes())
    for place in range(8, len(content), 3):
        damaged = content.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            assert read_image(tmp_path / "damaged.png", 32).shape == (32, 32, 3)
        except HpcmmError as error:
            assert "damaged.png" in str(error)


def test_upper_case_endings_hidden_files_and_links_in_mvtecs_layout(as_mvtec: Path, tmp_path: Path):
    good = as_mvtec / "brick" / "train" / "good"
    before = len(mvtec.train_samples(as_mvtec, "brick"))
    (good / "000.png").rename(good / "000.PNG")
    (good / "._001.png").write_bytes(b"resource fork")
    (good / "Thumbs.db").write_bytes(b"")
    (good / "sub.png").mkdir()
    os.mkfifo(good / "pipe.png")
    (good / "001.png").rename(tmp_path / "elsewhere.png")
    (good / "001.png").symlink_to(tmp_path / "elsewhere.png")
    (good / "loop.png").symlink_to(good / "loop.png")
    samples = mvtec.train_samples(as_mvtec, "brick")
    assert len(samples) == before
    assert all(read_image(sample.image, 32).any() for sample in samples)
    masks = as_mvtec / "brick" / "ground_truth" / "hole"
    (masks / "000_mask.png").rename(masks / "000_mask.PNG")
    assert any(sample.mask == masks / "000_mask.PNG" for sample in mvtec.test_samples(as_mvtec, "brick"))


def test_a_category_may_be_a_link(as_mvtec: Path, tmp_path: Path):
    (as_mvtec / "brick").rename(tmp_path / "brick")
    (as_mvtec / "brick").symlink_to(tmp_path / "brick", target_is_directory=True)
    assert "brick" in mvtec.list_categories(as_mvtec)
    assert mvtec.test_samples(as_mvtec, "brick")


def test_a_split_saved_by_a_spreadsheet_is_read(as_visa: Path):
    before = visa.test_samples(as_visa, "coins")
    split = as_visa / visa.SPLIT
    split.write_bytes(b"\xef\xbb\xbf" + split.read_bytes().replace(b"\n", b"\r\n"))
    assert visa.test_samples(as_visa, "coins") == before


def test_an_anomaly_without_a_mask_in_the_split_is_named_by_its_line(as_visa: Path):
    split = as_visa / visa.SPLIT
    lines = split.read_text().splitlines()
    number = next(index for index, line in enumerate(lines) if ",anomaly," in line)
    lines[number] = lines[number].rpartition(",")[0] + ","
    split.write_text("\n".join(lines) + "\n")
    with pytest.raises(HpcmmError, match=f"line {number + 1}, names no mask"):
        visa.list_categories(as_visa)


@pytest.mark.parametrize("layout", list(Layout))
def test_missing_files_are_refused_or_left_out_and_counted(
    as_mvtec: Path, as_visa: Path, small: DataConfig, layout: Layout, caplog
):
    root, reader = (as_mvtec, mvtec) if layout is Layout.mvtec else (as_visa, visa)
    whole = build_datasets(root, replace(small, layout=layout), seed=0)
    damaged = [sample for sample in reader.test_samples(root, "grass") if sample.mask]
    damaged[0].mask.unlink()
    damaged[1].image.write_bytes(b"")
    Image.new("L", (5, 9)).save(damaged[2].mask)
    with pytest.raises(HpcmmError, match="missing"):
        build_datasets(root, replace(small, layout=layout), seed=0)
    with caplog.at_level(logging.WARNING, logger="hpcmm.workloads.anomaly.data"):
        train, test = build_datasets(root, replace(small, layout=layout, on_error=OnError.skip), seed=0)
    assert (len(train), len(list(test))) == (len(whole[0]), len(whole[1]) - 3)
    said = caplog.text
    assert said.count("as data.on_error says") == 3
    assert "1 so far" in said
    assert "2 of 39 test images are left out of the scores" in said
    assert str(damaged[0].mask) in said
    assert "5 x 9" in said


def test_a_set_of_which_nothing_can_be_used_is_refused_even_so(as_visa: Path, small: DataConfig):
    for path in as_visa.glob("*/Data/Images/Normal/*"):
        path.unlink()
    with pytest.raises(HpcmmError, match=r"No training image of brick, .* can be used"):
        build_datasets(as_visa, replace(small, layout=Layout.visa, on_error=OnError.skip), seed=0)


def test_the_wrong_layout_is_named_whatever_on_error_says(as_mvtec: Path, as_visa: Path, small: DataConfig):
    skipping = replace(small, on_error=OnError.skip)
    with pytest.raises(HpcmmError, match=r"set data\.root to VisA's folder"):
        build_datasets(as_mvtec, replace(skipping, layout=Layout.visa), seed=0)
    with pytest.raises(HpcmmError, match="must be in MVTec-AD's layout"):
        build_datasets(as_visa, skipping, seed=0)


def test_a_file_of_another_kind_is_not_decoded_whatever_it_is_called(tmp_path, monkeypatch):
    """Pillow would start Ghostscript, which runs an EPS file."""
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(HpcmmError, match=r"The image .*image\.png cannot be read"):
        read_image(path, 16)
