"""Write images and masks in the folder layouts that the modules ``mvtec`` and ``visa`` read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.workloads.anomaly.data import visa
from hpcmm.workloads.anomaly.data.samples import GOOD

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_JPEG_QUALITY = 95


class MvtecWriter:
    """MVTec-AD: PNG images by split and defect, masks of 0 and 255."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, category: str, split: str, defect: str | None, pixels: Pixels, mask: Mask | None) -> Path:
        """Save one image (h, w, 3), and its mask (h, w) if it has a defect; give the image's path."""
        folder = self._root / category / split / (defect or GOOD)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{sum(1 for _ in folder.iterdir()):03d}"
        if mask is not None and defect is not None:
            masks = self._root / category / "ground_truth" / defect
            masks.mkdir(parents=True, exist_ok=True)
            _save_png(mask.astype(np.uint8) * 255, masks / f"{stem}_mask.png")
        path = folder / f"{stem}.png"
        _save_png(pixels, path)
        return path

    def finish(self) -> None:
        """Nothing is left to write: the folders say it all."""


class VisaWriter:
    """VisA: JPEG images by label, masks that number the kinds of defect, and the split as a CSV file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rows: list[tuple[str, str, str, str, str]] = []
        self._kinds: dict[str, int] = {}

    def add(self, category: str, split: str, defect: str | None, pixels: Pixels, mask: Mask | None) -> Path:
        """As :meth:`MvtecWriter.add`."""
        label = "Normal" if defect is None else "Anomaly"
        images = self._root / category / "Data" / "Images" / label
        images.mkdir(parents=True, exist_ok=True)
        stem = f"{sum(1 for _ in images.iterdir()):0{4 if defect is None else 3}d}"
        path = images / f"{stem}.JPG"
        Image.fromarray(pixels).save(path, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        drawn = ""
        if mask is not None and defect is not None:
            kind = self._kinds.setdefault(defect, len(self._kinds) + 1)
            target = self._root / category / "Data" / "Masks" / "Anomaly" / f"{stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _save_png(mask.astype(np.uint8) * np.uint8(kind), target)
            drawn = target.relative_to(self._root).as_posix()
        said = "normal" if defect is None else visa.DEFECT
        self._rows.append((category, split, said, path.relative_to(self._root).as_posix(), drawn))
        return path

    def finish(self) -> None:
        """Write the split."""
        split = self._root / visa.SPLIT
        split.parent.mkdir(parents=True, exist_ok=True)
        with split.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(visa.COLUMNS)
            writer.writerows(self._rows)


def _save_png(pixels: Pixels, path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)
