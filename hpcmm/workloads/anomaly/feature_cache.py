"""Fills a run's feature store before it trains: each rank computes its share of what is not there yet."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset

from hpcmm.config.schema import Precision
from hpcmm.errors import HpcmmError
from hpcmm.node.cache import cache_dir
from hpcmm.workloads.anomaly import data, question_answering
from hpcmm.workloads.anomaly.data.anomaly import Item, TestImages, TrainImages
from hpcmm.workloads.anomaly.data.features import FeatureStore, KeptItems
from hpcmm.workloads.anomaly.data_root import data_config
from hpcmm.workloads.anomaly.models import image_encoders
from hpcmm.workloads.anomaly.models.image_encoders import ImageEncoder
from hpcmm.workloads.anomaly.schema import AnomalyConfig

log = logging.getLogger("hpcmm.train")

_LOADING_ONLY = {
    "root",
    "test_root",
    "num_workers",
    "prefetch_batches",
    "feature_cache",
    "feature_variants",
    "slow_rank",
    "slow_s",
}
"""Keys of ``data`` that change no item; the files' contents count, not where they lie."""
_MODULES = (data, question_answering, image_encoders)
"""Whose code makes the items and the maps."""
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "scipy")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among those that share the work out."""

    rank: int
    world_size: int


def keep_features(
    config: AnomalyConfig, encoder: ImageEncoder, train: TrainImages, test: TestImages, ranks: Ranks
) -> tuple[KeptItems, KeptItems]:
    """Both data sets with the encoder's features in place of images. All ranks call this together.

    Of the training images those variants are computed that the run gets to see. Features are computed in float32, and
    kept in the run's number format. Raises HpcmmError if the encoder is not frozen or a file cannot be written.
    """
    if not encoder.frozen:
        raise HpcmmError("data.feature_cache needs a frozen image encoder: set model.freeze_image_encoder=true.")
    root = cache_dir(config.cluster) / "features"
    common = _encoder_digest(encoder, config)
    kept = []
    for images, variants in ((train, config.data.feature_variants), (test, 1)):
        store = FeatureStore(root / _items_digest(common, images, config, ranks))
        seen = min(variants, -(-config.train.steps * config.global_batch_size // len(images)))
        _fill(store, images, len(images) * seen, encoder, config, ranks)
        kept.append(KeptItems(store, len(images), variants))
    return kept[0], kept[1]


@torch.no_grad()
def _fill(
    store: FeatureStore, images: Dataset[Item], items: int, encoder: ImageEncoder, config: AnomalyConfig, ranks: Ranks
) -> None:
    own = range(ranks.rank, items, ranks.world_size)
    lacking = store.lacking(own)
    loader: DataLoader[Any] = DataLoader(
        Subset(images, lacking),
        batch_size=config.train.micro_batch_size,
        collate_fn=list,
        num_workers=config.data.num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    parameter = next(encoder.parameters())
    kept_as = torch.bfloat16 if config.parallel.precision is Precision.bf16 else torch.float32
    numbers = iter(lacking)
    for batch in loader:
        maps = encoder(torch.stack([item["image"] for item in batch]).to(parameter.device))
        for place, item in enumerate(batch):
            store.write(next(numbers), item, [level[place].to(kept_as) for level in maps])
    computed = sum(_gather(len(lacking), ranks))
    if ranks.rank == 0:
        log.info("features of %d items: %d computed, the others kept from before, in %s", items, computed, store.folder)


def _encoder_digest(encoder: ImageEncoder, config: AnomalyConfig) -> str:
    """Of everything that the maps depend on but the images: weights, settings, code, packages, number format."""
    digest = hashlib.sha256()
    settings = [encoder.name, encoder.channels, encoder.strides, list(encoder.mean), list(encoder.std)]
    taps = list(getattr(encoder, "taps", ()))
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    digest.update(json.dumps([settings, taps, versions, str(config.parallel.precision)]).encode())
    folders = [Path(inspect.getfile(module)).parent for module in _MODULES]
    for folder in folders:
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _items_digest(common: str, images: TrainImages | TestImages, config: AnomalyConfig, ranks: Ranks) -> str:
    """Of the encoder and of everything that the items depend on; the ranks share out reading the files."""
    files = images.files
    own = [_file_digest(path) for path in files[ranks.rank :: ranks.world_size]]
    shares = [iter(share) for share in _gather(own, ranks)]
    contents = [next(shares[place % ranks.world_size]) for place in range(len(files))]
    settings = {key: str(value) for key, value in asdict(data_config(config)).items() if key not in _LOADING_ONLY}
    whole = [common, type(images).__name__, contents, settings, config.train.seed, images.contents]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    """Empty for a file that cannot be read, which the data set refuses or skips by itself."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _gather(value: Any, ranks: Ranks) -> Sequence[Any]:
    """Each rank's value, on all ranks, once all have got here."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values
