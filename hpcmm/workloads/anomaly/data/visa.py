"""Reads the folder layout of VisA, exactly, with the split that its authors publish.

Layout: ``split_csv/1cls.csv`` with the columns object, split (train or test), label (normal or anomaly), image and
mask; the paths in it are relative to the root: ``<object>/Data/Images/Normal/0000.JPG``,
``<object>/Data/Images/Anomaly/000.JPG`` and ``<object>/Data/Masks/Anomaly/000.png``.
Source: Y. Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation",
ECCV 2022, and its published archive. Links within the folder are followed.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.bad_samples import REFUSED, BadSamples
from hpcmm.workloads.anomaly.data.samples import GOOD, Sample

CATEGORIES = frozenset(
    {
        "candle",
        "capsules",
        "cashew",
        "chewinggum",
        "fryum",
        "macaroni1",
        "macaroni2",
        "pcb1",
        "pcb2",
        "pcb3",
        "pcb4",
        "pipe_fryum",
    }
)
"""The twelve of the published data set."""
SPLIT = Path("split_csv") / "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
DEFECT = "anomaly"
"""VisA does not tell kinds of defects apart in its split."""


def list_categories(root: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The objects to read, sorted: the wanted ones, or all of the split.

    Raises HpcmmError when ``root`` is not VisA's folder or lacks a wanted object.
    """
    present = sorted({row["object"] for row in _split(root)})
    absent = sorted(set(wanted) - set(present))
    if absent:
        raise HpcmmError(f"data.categories names {', '.join(absent)}, but {root} holds {', '.join(present)}.")
    return sorted(set(wanted)) or present


def train_samples(root: Path, category: str, bad_samples: BadSamples = REFUSED) -> list[Sample]:
    """The normal images to train on, in the split's order; a missing one is a flaw.

    Raises HpcmmError when the split lists none.
    """
    return _samples(root, category, "train", bad_samples)


def test_samples(root: Path, category: str, bad_samples: BadSamples = REFUSED) -> list[Sample]:
    """The images to score, in the split's order; one that is missing, or whose mask is, is a flaw.

    Raises HpcmmError when the split lists none.
    """
    return _samples(root, category, "test", bad_samples)


def _samples(root: Path, category: str, split: str, bad_samples: BadSamples) -> list[Sample]:
    rows = [row for row in _split(root) if row["object"] == category and row["split"] == split]
    if not rows:
        raise HpcmmError(f"{root / SPLIT} lists no {split} image of {category}.")
    samples = []
    for row in rows:
        try:
            samples.append(_sample(root, row))
        except HpcmmError as error:
            bad_samples.note(root / row["image"], error)
    return samples


def _sample(root: Path, row: dict[str, str]) -> Sample:
    image, mask = root / row["image"], root / row["mask"] if row["label"] == DEFECT else None
    for path in (image, mask):
        if path is not None and not path.is_file():
            raise HpcmmError(f"{root / SPLIT} lists {path}, which is missing.")
    return Sample(image, row["object"], GOOD if mask is None else DEFECT, mask)


def _split(root: Path) -> Sequence[dict[str, str]]:
    path = root / SPLIT
    try:
        return _read_split(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise HpcmmError(
            f"{path} cannot be read ({error.strerror}); set data.root to VisA's folder, which holds {SPLIT}."
        ) from error


@lru_cache(maxsize=8)
def _read_split(path: Path, _mtime_ns: int) -> Sequence[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet's byte order mark
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise HpcmmError(f"{path} is not a CSV file: {error}.") from error
    if not rows:
        raise HpcmmError(f"{path} lists no images.")
    for number, row in enumerate(rows, start=2):
        _check(row, path, number)
    return rows


def _check(row: dict[str, str], path: Path, number: int) -> None:
    lacking = [name for name in COLUMNS if row.get(name) is None]
    if lacking:
        raise HpcmmError(
            f"{path}, line {number}, lacks {', '.join(lacking)}; its columns must be {', '.join(COLUMNS)}."
        )
    if row["split"] not in {"train", "test"} or row["label"] not in {"normal", DEFECT}:
        raise HpcmmError(
            f"{path}, line {number}, has split {row['split']!r} and label {row['label']!r}; "
            f"they must be train or test, and normal or {DEFECT}."
        )
    if row["split"] == "train" and row["label"] == DEFECT:
        raise HpcmmError(f"{path}, line {number}, trains on an anomaly; the training images must be normal.")
    if not row["image"] or (row["label"] == DEFECT and not row["mask"]):
        raise HpcmmError(f"{path}, line {number}, names no {'mask' if row['image'] else 'image'}.")
    for name in ("image", "mask"):
        part = Path(row[name])
        if part.is_absolute() or ".." in part.parts:
            raise HpcmmError(f"{path}, line {number}, leads out of the data folder: {row[name]}.")
