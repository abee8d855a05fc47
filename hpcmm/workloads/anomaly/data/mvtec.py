"""Reads the folder layout of MVTec-AD, exactly; ``.PNG`` for ``.png`` is the one liberty, and links are followed.

Layout: ``<category>/train/good/*.png``, ``<category>/test/good/*.png``, ``<category>/test/<defect>/*.png`` and, for
each image with a defect, ``<category>/ground_truth/<defect>/<stem>_mask.png``.
Source: P. Bergmann et al., "MVTec AD - A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection",
CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.bad_samples import REFUSED, BadSamples
from hpcmm.workloads.anomaly.data.samples import GOOD, Sample

CATEGORIES = frozenset(
    {
        "bottle",
        "cable",
        "capsule",
        "carpet",
        "grid",
        "hazelnut",
        "leather",
        "metal_nut",
        "pill",
        "screw",
        "tile",
        "toothbrush",
        "transistor",
        "wood",
        "zipper",
    }
)
"""The fifteen of the published data set."""


def list_categories(root: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The categories to read from ``root``, sorted: the wanted ones, or all of them.

    Raises HpcmmError when ``root`` is no folder, holds no category, or lacks a wanted one.
    """
    if not root.is_dir():
        raise HpcmmError(f"The data folder {root} does not exist; set data.root to a folder in MVTec-AD's layout.")
    present = sorted(path.name for path in root.iterdir() if (path / "train" / GOOD).is_dir())
    if not present:
        raise HpcmmError(
            f"No folder <category>/train/{GOOD} lies under {root}; data.root must be in MVTec-AD's layout."
        )
    absent = sorted(set(wanted) - set(present))
    if absent:
        raise HpcmmError(f"data.categories names {', '.join(absent)}, but {root} holds {', '.join(present)}.")
    return sorted(set(wanted)) or present


def train_samples(root: Path, category: str, _flaws: BadSamples = REFUSED) -> list[Sample]:
    """The normal images to train on, sorted by name. Raises HpcmmError when there are none."""
    folder = root / category / "train" / GOOD
    return [Sample(image, category, GOOD, None) for image in _list_images(folder)]


def test_samples(root: Path, category: str, bad_samples: BadSamples = REFUSED) -> list[Sample]:
    """The images to score, sorted by defect and name; one without its mask is a flaw.

    Raises HpcmmError when the test folder is missing or empty.
    """
    folder = root / category / "test"
    defects = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not defects:
        raise HpcmmError(f"{folder} must hold one folder a defect and the folder {GOOD}, as in MVTec-AD; it has none.")
    samples = []
    for defect in defects:
        for image in _list_images(defect):
            try:
                samples.append(Sample(image, category, defect.name, _find_mask(root / category, defect.name, image)))
            except HpcmmError as error:
                bad_samples.note(image, error)
    return samples


def _list_images(folder: Path) -> list[Path]:
    """Hidden files, such as the ``._000.png`` of some archives, are none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [path for path in files if path.suffix.lower() == ".png" and path.name[0] != "." and path.is_file()]
    if not images:
        raise HpcmmError(f"{folder} must hold images named 000.png, 001.png, ..., as in MVTec-AD; it has none.")
    return images


def _find_mask(category: Path, defect: str, image: Path) -> Path | None:
    if defect == GOOD:
        return None
    mask = category / "ground_truth" / defect / f"{image.stem}_mask.png"
    for path in (mask, mask.with_suffix(".PNG")):
        if path.is_file():
            return path
    raise HpcmmError(f"The image {image} needs the mask {mask}, as in MVTec-AD; it is missing.")
