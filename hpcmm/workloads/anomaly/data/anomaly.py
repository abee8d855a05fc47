"""Torch data sets for anomaly detection: normal images with simulated anomalies to train on, real defects to score."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.bad_samples import BadSamples, SkippedImages
from hpcmm.workloads.anomaly.data.captions import read_captions
from hpcmm.workloads.anomaly.data.images import normalise, read_image, read_pair
from hpcmm.workloads.anomaly.data.layouts import READERS
from hpcmm.workloads.anomaly.data.samples import Sample
from hpcmm.workloads.anomaly.data.simulate import simulate_anomaly
from hpcmm.workloads.anomaly.question_answering.conversations import TEMPLATES, Dialogue, converse
from hpcmm.workloads.anomaly.schema import DataConfig, OnError

Floats = NDArray[np.float32]


class Item(TypedDict):
    """One image. ``caption`` says what it shows and never whether it has a defect; ``label`` is 1 with a defect.

    ``dialogue`` is a question on defects, with the answer that label and mask give.
    """

    image: NotRequired[Tensor]
    """(3, side, side), float32, normalised for the image encoder."""
    mask: Tensor
    """(1, side, side), float32, zeros and ones."""
    label: int
    caption: str
    dialogue: Dialogue
    category: str
    index: int
    """The item's place in its data set."""
    features: NotRequired[list[Tensor]]
    """The frozen image encoder's maps (channels, h, w), which then stand in for ``image``."""


class Batch(TypedDict):
    """Several items: ``image`` (B, 3, side, side), ``mask`` (B, 1, side, side), ``label`` and ``index`` (B,) int64.

    Of items with ``features`` it has these, each (B, channels, h, w), and no ``image``.
    """

    image: NotRequired[Tensor]
    mask: Tensor
    label: Tensor
    index: Tensor
    caption: list[str]
    dialogue: list[Dialogue]
    category: list[str]
    features: NotRequired[list[Tensor]]


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
        self._anomaly_kinds = tuple(config.anomaly_kinds)
        self._seed = seed
        self.skipped = SkippedImages(len(self._samples), config.on_error)
        self._donors = {
            category: [index for index, sample in enumerate(self._samples) if sample.category != category]
            or list(range(len(self._samples)))
            for category in {sample.category for sample in self._samples}
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        """``index`` may run on past the end: item ``epoch * len + i`` is image i with the changes of that epoch."""
        epoch, index = divmod(index, len(self._samples))
        sample, pixels = self._read(index)
        rng = np.random.default_rng([self._seed, epoch, index])
        image = _augment(pixels, rng)
        mask = np.zeros(image.shape[:2], np.float32)
        if rng.random() < self._anomaly_probability:
            image, mask = simulate_anomaly(
                image, self._read_donor(sample.category, image, rng), rng, self._anomaly_kinds
            )
        phrases = self._captions[sample.category]
        item = _item(image, mask, phrases[int(rng.integers(len(phrases)))], sample.category, index)
        item["dialogue"] = converse(item["label"], mask, int(rng.integers(len(TEMPLATES))))
        return item

    @property
    def files(self) -> list[Path]:
        """Every file that items are made of."""
        return [sample.image for sample in self._samples]

    @property
    def contents(self) -> list[object]:
        """What else items are made of: each image's category and label, and each category's captions."""
        return [[(sample.category, sample.label) for sample in self._samples], self._captions]

    def __iter__(self) -> Iterator[Item]:
        """One epoch, the first; without it, going on past the end would make a ``for`` loop endless."""
        return (self[index] for index in range(len(self)))

    def _read(self, index: int) -> tuple[Sample, Floats]:
        """The sample at ``index`` and its pixels; with ``data.on_error=skip`` the next one that can be read."""
        for step in range(len(self._samples)):
            place = (index + step) % len(self._samples)
            pixels = self._try_to_read(place)
            if pixels is not None:
                return self._samples[place], pixels
        raise HpcmmError(f"None of the {len(self._samples)} training images can be read; see the warnings before.")

    def _try_to_read(self, index: int) -> Floats | None:
        """Raises HpcmmError with ``data.on_error=refuse``; None for an image that is to be skipped."""
        try:
            return read_image(self._samples[index].image, self._side)
        except HpcmmError as error:
            self.skipped.note(index, error)
            return None

    def _read_donor(self, category: str, image: Floats, rng: np.random.Generator) -> Floats:
        """An image of another category if there is one: a piece of the same texture could not be told apart."""
        donors = self._donors[category]
        pixels = self._try_to_read(donors[int(rng.integers(len(donors)))])
        return image if pixels is None else pixels


class TestImages(Dataset[Item]):
    """Held-out images with their true masks, unchanged.

    With ``data.on_error=skip`` every image is opened once when the set is built, and those that cannot be used are left
    out, so that all ranks agree on what is scored.
    """

    __test__ = False  # for pytest, which takes the name for a test's

    def __init__(self, samples: Sequence[Sample], captions: dict[str, tuple[str, ...]], config: DataConfig) -> None:
        self._captions = captions
        self._side = config.image_size
        self._samples = list(samples) if config.on_error is OnError.refuse else self._usable(samples, config.on_error)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        """Raises IndexError past the end, HpcmmError for an image that cannot be used."""
        sample = self._samples[index]
        image, mask = read_pair(sample, self._side)
        item = _item(image, mask, self._captions[sample.category][0], sample.category, index)
        item["label"] = sample.label  # a thin defect's mask may vanish when it is made smaller
        item["dialogue"] = converse(sample.label, mask, index)
        return item

    def described(self, index: int) -> tuple[Sample, str]:
        """The files of item ``index``, and the phrase that says what it shows."""
        sample = self._samples[index]
        return sample, self._captions[sample.category][0]

    def part(self, places: Sequence[int]) -> TestImages:
        """The items at these places alone, in this order."""
        chosen = copy.copy(self)
        chosen._samples = [self._samples[place] for place in places]
        return chosen

    @property
    def files(self) -> list[Path]:
        """Every file that items are made of."""
        return [path for sample in self._samples for path in (sample.image, sample.mask) if path is not None]

    @property
    def contents(self) -> list[object]:
        """What else items are made of: each image's category and label, and each category's captions."""
        return [[(sample.category, sample.label) for sample in self._samples], self._captions]

    def _usable(self, samples: Sequence[Sample], on_error: OnError) -> list[Sample]:
        bad_samples, usable = BadSamples(on_error, "left out of the scores"), []
        for sample in samples:
            try:
                read_pair(sample, self._side)
                usable.append(sample)
            except HpcmmError as error:
                bad_samples.note(sample.image, error)
        bad_samples.sum_up(len(samples), "test images")
        return usable


def build_datasets(root: Path, data: DataConfig, seed: int) -> tuple[TrainImages, TestImages]:
    """The data sets of the chosen categories: training images of ``root``, test images of it or of ``data.test_root``.

    Raises HpcmmError when a layout is not as ``data`` says, or a value of ``data`` cannot be used.
    """
    if data.image_size < 32:
        raise HpcmmError(f"data.image_size must be at least 32 pixels, not {data.image_size}.")
    if not 0 <= data.anomaly_probability <= 1:
        raise HpcmmError(f"data.anomaly_probability must lie in 0 to 1, not {data.anomaly_probability}.")
    if not data.anomaly_kinds:
        raise HpcmmError("data.anomaly_kinds is empty: name kinds, or set data.anomaly_probability=0.")
    reader, bad_samples = READERS[data.layout], BadSamples(data.on_error, "left out")
    categories = reader.categories(root, data.categories)
    train = [
        sample
        for category in categories
        for sample in draw_shots(
            reader.train(root, category, bad_samples), category, data.shots, [seed, zlib.crc32(category.encode())]
        )
    ]
    if not train:
        raise HpcmmError(
            f"No training image of {', '.join(categories)} in {root} can be used; see the warnings before."
        )
    train_images = TrainImages(train, read_captions(root, categories), data, seed)
    assert data.test_root is not None or data.test_standins is None, "see hpcmm.workloads.anomaly.data_root.data_config"
    test_root, test_reader, test_categories = root, reader, categories
    if data.test_root is not None:
        test_root = Path(data.test_root).expanduser()
        test_reader = READERS[data.test_layout or data.layout]
        test_categories = test_reader.categories(test_root, data.test_categories)
    test = [sample for category in test_categories for sample in test_reader.test(test_root, category, bad_samples)]
    bad_samples.sum_up(len(train) + len(test) + len(bad_samples), "images")
    test_images = TestImages(test, read_captions(test_root, test_categories), data)
    if not len(test_images):
        raise HpcmmError(f"No image to score in {test_root} can be used; see the warnings before.")
    return train_images, test_images


def draw_shots(samples: list[Sample], category: str, shots: int | None, seed: Sequence[int]) -> list[Sample]:
    """``shots`` of the samples in their order, the same ones for the same seed; all for None.

    Raises HpcmmError when there are fewer.
    """
    if shots is None:
        return samples
    if not 1 <= shots <= len(samples):
        raise HpcmmError(
            f"data.shots is {shots}, but category {category} has 1 to {len(samples)} normal images to draw."
        )
    chosen = np.random.default_rng(list(seed)).choice(len(samples), shots, replace=False)
    return [samples[index] for index in sorted(chosen)]


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch, in their order."""
    batch = Batch(
        mask=torch.stack([item["mask"] for item in items]),
        label=torch.tensor([item["label"] for item in items], dtype=torch.int64),
        index=torch.tensor([item["index"] for item in items], dtype=torch.int64),
        caption=[item["caption"] for item in items],
        dialogue=[item["dialogue"] for item in items],
        category=[item["category"] for item in items],
    )
    if "features" in items[0]:
        batch["features"] = [torch.stack(level) for level in zip(*(item["features"] for item in items), strict=True)]
    else:
        batch["image"] = torch.stack([item["image"] for item in items])
    return batch


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
        dialogue=converse(int(mask.any()), mask, 0),
        category=category,
        index=index,
    )
