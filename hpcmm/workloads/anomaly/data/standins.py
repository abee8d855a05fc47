"""Writes stand-ins in MVTec-AD's or VisA's layout, cut from real photographs, with defects on held-out images.

It lets everything run where MVTec-AD itself cannot be had. It is a stand-in: scores on it say that training works, and
nothing about MVTec-AD or VisA. ``python -m hpcmm.workloads.anomaly.data.standins ROOT`` writes one by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.captions import write_captions
from hpcmm.workloads.anomaly.data.defects import DEFECTS
from hpcmm.workloads.anomaly.data.layout_writers import MvtecWriter, VisaWriter
from hpcmm.workloads.anomaly.data.textures import COLLECTIONS, Region, read_photograph
from hpcmm.workloads.anomaly.schema import DataConfig, Layout, Standins

STAMP = "standins.json"
_FORMAT = 3
"""Raise it whenever other images come out of the same parameters."""
_SIDE = 128
"""Side of the written images in pixels; the reader resizes them to ``data.image_size``."""
_MASK_OPACITY = 0.4


def parameters_hash(config: DataConfig, seed: int) -> str:
    """Twelve hexadecimal digits that change with whatever changes the images."""
    text = json.dumps(_parameters(config, seed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def default_root(config: DataConfig, seed: int, cache_dir: Path) -> Path:
    """Where the stand-ins of these parameters belong; other parameters get another folder."""
    return cache_dir / f"standins-{parameters_hash(config, seed)}"


def generate(root: Path, config: DataConfig, seed: int) -> None:
    """Make sure that ``root`` holds the stand-ins of these parameters, all categories of them.

    The set is built beside ``root`` and renamed into place, so no reader ever sees half of it, and of several processes
    that race one wins and the others find its work. Raises HpcmmError when ``root`` holds anything else.
    """
    if config.train_images_per_category < 1 or config.test_images_per_category < 2:
        raise HpcmmError(
            "data.train_images_per_category must be at least 1 and data.test_images_per_category at least 2, "
            f"not {config.train_images_per_category} and {config.test_images_per_category}."
        )
    if _is_there(root, config, seed):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    building = root.parent / f".{root.name}.{uuid.uuid4().hex}"
    building.mkdir()
    try:
        _write(building, config, seed)
        try:
            building.rename(root)
        except OSError:
            if not _is_there(root, config, seed):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _parameters(config: DataConfig, seed: int) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "collection": config.standins.value,
        "layout": config.layout.value,
        "seed": seed,
        "train_images_per_category": config.train_images_per_category,
        "test_images_per_category": config.test_images_per_category,
    }


def _is_there(root: Path, config: DataConfig, seed: int) -> bool:
    """Whether ``root`` holds these very stand-ins; False when it is absent or empty, HpcmmError for all else."""
    stamp = root / STAMP
    if stamp.is_file():
        if _read_hash(stamp) == parameters_hash(config, seed):
            return True
        raise HpcmmError(f"{root} holds stand-ins of other parameters (see {STAMP} there); remove it or name another.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise HpcmmError(f"{root} is there already and was not made by this generator; name another folder.")
    return False


def _read_hash(stamp: Path) -> str:
    try:
        return str(json.loads(stamp.read_text(encoding="utf-8"))["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise HpcmmError(f"{stamp} is damaged; remove its folder, and the stand-ins are made anew.") from error


def _write(root: Path, config: DataConfig, seed: int) -> None:
    windows: dict[str, dict[str, int]] = {}
    writer = MvtecWriter(root) if config.layout is Layout.mvtec else VisaWriter(root)
    textures = COLLECTIONS[config.standins]
    for texture in textures:
        photograph = read_photograph(texture)
        for split, region, count in (
            ("train", texture.train, config.train_images_per_category),
            ("test", texture.test, config.test_images_per_category),
        ):
            for index in range(count):
                rng = np.random.default_rng([seed, zlib.crc32(f"{texture.category}/{split}".encode()), index])
                window = _choose_window(region, texture.window, rng)
                defect = _choose_defect(split, index, count)
                values, mask = _damage(_cut(photograph, window, rng), defect, rng)
                path = writer.add(texture.category, split, defect, np.round(values * 255).astype(np.uint8), mask)
                windows[path.relative_to(root).as_posix()] = asdict(window)
    writer.finish()
    write_captions(root, {texture.category: texture.phrases for texture in textures})
    stamp = {
        "note": "Stand-ins cut from scikit-image's photographs, with drawn defects. Neither MVTec-AD nor VisA.",
        "hash": parameters_hash(config, seed),
        "parameters": _parameters(config, seed),
        "photographs": {texture.category: texture.file for texture in textures},
        "windows": windows,
    }
    (root / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def _choose_window(region: Region, side: int, rng: np.random.Generator) -> Region:
    left = int(rng.integers(region.left, region.right - side + 1))
    top = int(rng.integers(region.top, region.bottom - side + 1))
    return Region(left, top, left + side, top + side)


def _choose_defect(split: str, index: int, count: int) -> str | None:
    """None for a normal image: all of ``train`` and the first half of ``test``; then the defects in turn."""
    if split == "train" or index < count - count // 2:
        return None
    return sorted(DEFECTS)[index % len(DEFECTS)]


def _cut(photograph: NDArray[np.uint8], window: Region, rng: np.random.Generator) -> NDArray[np.float32]:
    """The window as (128, 128, 3) from 0 to 1, as if taken again in slightly other light, at times mirrored."""
    patch = photograph[window.top : window.bottom, window.left : window.right]
    image = Image.fromarray(patch).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(image, np.float32) / 255
    if rng.random() < 0.5:
        values = values[:, ::-1]
    values = (values - 0.5) * rng.uniform(0.92, 1.08) + 0.5 + rng.uniform(-0.03, 0.03)
    return np.clip(values, 0, 1).astype(np.float32)


def _damage(
    values: NDArray[np.float32], defect: str | None, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """The image with its defect drawn on it, and where that is; None for a normal image."""
    if defect is None:
        return values, None
    damaged, opacity = DEFECTS[defect](values, rng)
    return damaged, opacity > _MASK_OPACITY


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the stand-ins and say where they are."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="python -m hpcmm.workloads.anomaly.data.standins", description=__doc__)
    parser.add_argument("root", type=Path, help="folder to write, absent or empty")
    parser.add_argument("--train-images-per-category", type=int, default=defaults.train_images_per_category)
    parser.add_argument("--test-images-per-category", type=int, default=defaults.test_images_per_category)
    parser.add_argument("--layout", choices=[layout.value for layout in Layout], default=defaults.layout.value)
    parser.add_argument("--collection", choices=[each.value for each in Standins], default=defaults.standins.value)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = DataConfig(
        layout=Layout(options.layout),
        standins=Standins(options.collection),
        train_images_per_category=options.train_images_per_category,
        test_images_per_category=options.test_images_per_category,
    )
    try:
        generate(options.root, config, options.seed)
    except HpcmmError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.root}: {', '.join(texture.category for texture in COLLECTIONS[config.standins])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
