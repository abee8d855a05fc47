"""The stand-in generator: layout, determinism, held-out regions, races, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.defects import DEFECTS
from hpcmm.workloads.anomaly.data.standins import STAMP, default_root, generate
from hpcmm.workloads.anomaly.data.textures import TEXTURES, Region
from hpcmm.workloads.anomaly.schema import DataConfig

CATEGORIES = ["brick", "coins", "grass", "gravel", "tissue"]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout_is_mvtec_ad(standins: Path, small: DataConfig):
    assert sorted(path.name for path in standins.iterdir() if path.is_dir()) == CATEGORIES
    for category in CATEGORIES:
        folder = standins / category
        train = sorted(path.name for path in (folder / "train" / "good").iterdir())
        assert train == [f"{number:03d}.png" for number in range(small.train_images_per_category)]
        assert sorted(path.name for path in (folder / "test").iterdir()) == sorted([*DEFECTS, "good"])
        assert len(list((folder / "test" / "good").iterdir())) == small.test_images_per_category // 2
        for defect in DEFECTS:
            images = sorted(path.stem for path in (folder / "test" / defect).iterdir())
            masks = sorted(path.name for path in (folder / "ground_truth" / defect).iterdir())
            assert images[0] == "000"
            assert masks == [f"{stem}_mask.png" for stem in images]


def test_every_mask_covers_a_visible_part_of_its_image(standins: Path):
    for path in standins.glob("*/ground_truth/*/*_mask.png"):
        with Image.open(path) as mask:
            values = np.asarray(mask)
        assert set(np.unique(values)) == {0, 255}, path
        assert 0.0005 < (values > 0).mean() < 0.4, path


@pytest.mark.parametrize("texture", TEXTURES, ids=lambda texture: texture.category)
def test_regions_to_train_on_and_to_hold_out_share_no_pixel(texture):
    assert not texture.train.overlaps(texture.test)


def test_each_window_lies_in_its_splits_region(standins: Path):
    windows = json.loads((standins / STAMP).read_text())["windows"]
    regions = {
        (texture.category, split): getattr(texture, split) for texture in TEXTURES for split in ("train", "test")
    }
    images = {p.relative_to(standins).as_posix() for p in standins.rglob("*.png") if "ground_truth" not in p.parts}
    assert set(windows) == images
    for name, edges in windows.items():
        category, split = name.split("/")[:2]
        window, region = Region(**edges), regions[category, split]
        assert region.left <= window.left < window.right <= region.right, name
        assert region.top <= window.top < window.bottom <= region.bottom, name


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path, standins: Path, small: DataConfig):
    generate(tmp_path / "again", small, seed=0)
    generate(tmp_path / "other", small, seed=1)
    assert contents(tmp_path / "again") == contents(standins)
    assert contents(tmp_path / "other")["brick/train/good/000.png"] != contents(standins)["brick/train/good/000.png"]


def test_a_second_call_writes_nothing(standins: Path, small: DataConfig):
    before = {path: path.stat().st_mtime_ns for path in standins.rglob("*")}
    generate(standins, small, seed=0)
    assert {path: path.stat().st_mtime_ns for path in standins.rglob("*")} == before


def test_other_parameters_have_another_default_folder_and_are_refused_in_this_one(standins: Path, small: DataConfig):
    more = replace(small, train_images_per_category=7)
    cache = Path("cache")
    assert len({default_root(small, 0, cache), default_root(more, 0, cache), default_root(small, 1, cache)}) == 3
    assert default_root(replace(small, image_size=32), 0, cache) == default_root(small, 0, cache)
    with pytest.raises(HpcmmError, match="stand-ins of other parameters"):
        generate(standins, more, seed=0)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, small: DataConfig):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(HpcmmError, match="not made by this generator"):
        generate(tmp_path, small, seed=0)
    assert contents(tmp_path) == {"holiday.png": b"mine"}


def test_a_damaged_stamp_is_named(tmp_path: Path, small: DataConfig):
    (tmp_path / STAMP).write_text("{")
    with pytest.raises(HpcmmError, match=STAMP):
        generate(tmp_path, small, seed=0)


def test_too_few_images_are_refused(tmp_path: Path):
    with pytest.raises(HpcmmError, match="test_images_per_category at least 2"):
        generate(tmp_path / "x", DataConfig(test_images_per_category=1), seed=0)


def test_processes_that_race_leave_one_whole_set(tmp_path: Path, standins: Path, small: DataConfig):
    root = tmp_path / "raced"
    context = get_context("spawn")
    racers = [context.Process(target=generate, args=(root, small, 0)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert contents(root) == contents(standins)
    assert list(tmp_path.iterdir()) == [root]


def test_command_line(tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpcmm.workloads.anomaly.data.standins", str(tmp_path / "set"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    counts = ("--train-images-per-category=2", "--test-images-per-category=2")
    made = run(*counts)
    assert (made.returncode, made.stderr) == (0, "")
    assert str(tmp_path / "set") in made.stdout
    refused = run(*counts, "--seed=5")
    assert refused.returncode == 1
    assert "stand-ins of other parameters" in refused.stderr


def test_generating_imports_no_torch():
    module = "hpcmm.workloads.anomaly.data.standins"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'skimage' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
