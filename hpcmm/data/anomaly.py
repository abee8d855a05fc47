"""Torch data sets for anomaly detection: normal images with simulated anomalies to train on, real defects to score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hpcmm.config import DataConfig
from hpcmm.data.captions import read_captions
from hpcmm.data.images import normalise, read_image, read_mask
from hpcmm.data.mvtec import Sample, list_categories, test_samples, train_samples
from hpcmm.data.simulate import simulate_anomaly
from hpcmm.errors import HpcmmError

Floats = NDArray[np.float32]


class Item(TypedDict):
    """One image. ``caption`` says what it shows and never whether it has a defect; ``label`` is 1 with a defect."""

    image: Tensor
    """(3, side, side), float32, normalised for the image encoder."""
    mask: Tensor
    """(1, side, side), float32, zeros and ones."""
    label: int
    caption: str
    category: str
    index: int
    """The item's place in its data set."""


class Batch(TypedDict):
    """Several items: ``image`` (B, 3, side, side), ``mask`` (B, 1, side, side), ``label`` and ``index`` (B,) int64."""

    image: Tensor
    mask: Tensor
    label: Tensor
    index: Tensor
    caption: list[str]
    category: list[str]


class TrainImages(Dataset[Item]):
    """Normal images, each a little changed, and some of them with a simulated anomaly.

    What happens to an image is a function of (seed, epoch, index) alone: it is the same in any loader worker and in any
    process, and other in each epoch.
    """

    def __init__(
        self, samples: Sequence[Sample], captions: dict[str, tuple[str, ...]], config: DataConfig, seed: int
    ) -> None:
        self._samples = list(samples)
        self._captions = captions
        self._side = config.image_size
        self._anomaly_probability = config.anomaly_probability
        self._seed = seed
        self._donors = {
            category: [sample for sample in self._samples if sample.category != category] or self._samples
            for category in {sample.category for sample in self._samples}
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        """``index`` may run on past the end: item ``epoch * len + i`` is image i with the changes of that epoch."""
        epoch, index = divmod(index, len(self._samples))
        sample = self._samples[index]
        rng = np.random.default_rng([self._seed, epoch, index])
        image = _augment(read_image(sample.image, self._side), rng)
        mask = np.zeros(image.shape[:2], np.float32)
        if rng.random() < self._anomaly_probability:
            image, mask = simulate_anomaly(image, self._read_donor(sample.category, rng), rng)
        phrases = self._captions[sample.category]
        return _item(image, mask, phrases[int(rng.integers(len(phrases)))], sample.category, index)

    def __iter__(self) -> Iterator[Item]:
        """One epoch, the first; without it, going on past the end would make a ``for`` loop endless."""
        return (self[index] for index in range(len(self)))

    def _read_donor(self, category: str, rng: np.random.Generator) -> Floats:
        """An image of another category where there is one: a piece of the same texture could not be told apart."""
        donors = self._donors[category]
        return read_image(donors[int(rng.integers(len(donors)))].image, self._side)


class TestImages(Dataset[Item]):
    """Held-out images with their true masks, unchanged."""

    __test__ = False  # for pytest, which takes the name for a test's

    def __init__(self, samples: Sequence[Sample], captions: dict[str, tuple[str, ...]], config: DataConfig) -> None:
        self._samples = list(samples)
        self._captions = captions
        self._side = config.image_size

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        """Raises IndexError past the end."""
        sample = self._samples[index]
        image = read_image(sample.image, self._side)
        mask = np.zeros(image.shape[:2], np.float32) if sample.mask is None else read_mask(sample.mask, self._side)
        item = _item(image, mask, self._captions[sample.category][0], sample.category, index)
        item["label"] = sample.label  # a thin defect's mask may vanish when it is made smaller
        return item


def build_datasets(root: Path, data: DataConfig, seed: int) -> tuple[TrainImages, TestImages]:
    """The data sets of the chosen categories of an MVTec-AD folder.

    Raises HpcmmError when the layout is not MVTec-AD's, or a value of ``data`` cannot be used.
    """
    if data.image_size < 32:
        raise HpcmmError(f"data.image_size must be at least 32 pixels, not {data.image_size}.")
    if not 0 <= data.anomaly_probability <= 1:
        raise HpcmmError(f"data.anomaly_probability must lie in 0 to 1, not {data.anomaly_probability}.")
    categories = list_categories(root, data.categories)
    captions = read_captions(root, categories)
    train = [sample for category in categories for sample in train_samples(root, category)]
    test = [sample for category in categories for sample in test_samples(root, category)]
    return TrainImages(train, captions, data, seed), TestImages(test, captions, data)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch, in their order."""
    return Batch(
        image=torch.stack([item["image"] for item in items]),
        mask=torch.stack([item["mask"] for item in items]),
        label=torch.tensor([item["label"] for item in items], dtype=torch.int64),
        index=torch.tensor([item["index"] for item in items], dtype=torch.int64),
        caption=[item["caption"] for item in items],
        category=[item["category"] for item in items],
    )


def _augment(image: Floats, rng: np.random.Generator) -> Floats:
    """A crop of at least 85% of each side, made full size again, at times mirrored, in slightly other light."""
    side = image.shape[0]
    kept = side * rng.uniform(0.85, 1.0)
    left, top = rng.uniform(0, side - kept, size=2)
    picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
    box = (left, top, left + kept, top + kept)
    cropped = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box=box), np.float32) / 255
    if rng.random() < 0.5:
        cropped = cropped[:, ::-1]
    lit = (cropped - 0.5) * rng.uniform(0.9, 1.1) + 0.5 + rng.uniform(-0.05, 0.05)
    return np.clip(lit, 0, 1).astype(np.float32)


def _item(image: Floats, mask: Floats, caption: str, category: str, index: int) -> Item:
    return Item(
        image=torch.from_numpy(normalise(image)),
        mask=torch.from_numpy(mask[None]),
        label=int(mask.any()),
        caption=caption,
        category=category,
        index=index,
    )
