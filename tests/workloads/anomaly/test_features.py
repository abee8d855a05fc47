"""Kept features: what the encoder gives, computed once, safe against whatever changes and whoever disturbs."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_ranks import run_ranks
from torch import nn

from hpcmm.config.schema import ClusterConfig, ParallelConfig, Precision
from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.anomaly import TestImages, TrainImages, build_datasets, collate
from hpcmm.workloads.anomaly.data.features import FeatureStore, KeptItems
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.feature_cache import Ranks, keep_features
from hpcmm.workloads.anomaly.models.image_encoders import ImageEncoder, build_image_encoder
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig, DataConfig, ModelConfig

ALONE = Ranks(0, 1)


@pytest.fixture
def config(tmp_path: Path) -> AnomalyConfig:
    data = DataConfig(
        root=str(tmp_path / "set"),
        categories=["brick", "coins"],
        image_size=64,
        train_images_per_category=4,
        test_images_per_category=2,
        anomaly_probability=0.5,
        feature_cache=True,
        feature_variants=2,
    )
    generate(tmp_path / "set", replace(data, categories=[]), seed=0)
    return AnomalyConfig(
        cluster=ClusterConfig(cache_dir=str(tmp_path / "cache")),
        data=data,
        model=ModelConfig(image_encoder="vit_tiny"),
        train=AnomalyTrainConfig(steps=10, micro_batch_size=4),
    )


class Counting(nn.Module):
    """Counts the images that an encoder sees."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.seen = 0
        encoder.register_forward_hook(lambda _module, inputs, _output: self._count(len(inputs[0])))

    def _count(self, images: int) -> None:
        self.seen += images


def encoder_of(config: AnomalyConfig, seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    return build_image_encoder(config.model)


def sets_of(config: AnomalyConfig) -> tuple[TrainImages, TestImages]:
    assert config.data.root is not None
    return build_datasets(Path(config.data.root), config.data, config.train.seed)


def keep(config: AnomalyConfig, encoder: ImageEncoder | None = None) -> tuple[KeptItems, KeptItems, int]:
    """The kept sets, and how many images the encoder saw for them."""
    encoder = encoder or encoder_of(config)
    counting = Counting(encoder)
    train, test = keep_features(config, encoder, *sets_of(config), ALONE)
    return train, test, counting.seen


def folders(config: AnomalyConfig) -> set[Path]:
    assert config.cluster.cache_dir is not None
    return set((Path(config.cluster.cache_dir) / "features").iterdir())


def test_an_item_holds_what_the_encoder_gives_of_it(config: AnomalyConfig):
    encoder = encoder_of(config)
    kept_train, kept_test, _ = keep(config, encoder)
    train, test = sets_of(config)
    pairs = [(kept_train, train, index) for index in (0, 5, 8 + 3)] + [(kept_test, test, 2)]
    for kept, images, index in pairs:
        ours, theirs = kept[index], images[index]
        maps = encoder(theirs["image"][None])
        for level, expected in zip(ours["features"], maps, strict=True):
            torch.testing.assert_close(level, expected[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(ours["mask"], theirs["mask"])
        for name in ("label", "caption", "category", "index", "dialogue"):
            assert ours[name] == theirs[name]
    batch = collate([kept_train[0], kept_train[5]])
    assert "image" not in batch
    assert batch["features"][0].shape == (2, 96, 8, 8)


def test_epochs_go_round_the_variants(config: AnomalyConfig):
    train, _, _ = keep(config)
    first, second, third = (train[epoch * len(train) + 3]["features"][0] for epoch in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_only_what_training_gets_to_see_is_computed(config: AnomalyConfig):
    _, _, seen = keep(replace(config, train=replace(config.train, steps=1)))
    assert seen == 8 + 4  # one epoch's variant, and the test images


def test_nothing_is_computed_twice(config: AnomalyConfig, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "hpcmm.train")
    assert keep(config)[2] == 2 * 8 + 4
    assert keep(config)[2] == 0
    assert "features of 16 items: 16 computed" in caplog.text
    assert "features of 16 items: 0 computed" in caplog.text
    longer = replace(config, data=replace(config.data, feature_variants=3))
    assert keep(longer)[2] == 8  # the third variant


@pytest.mark.parametrize(
    "change",
    [
        "weights",
        "taps",
        "image_size",
        "precision",
        "seed",
        "anomaly_kinds",
        "one image",
        "one mask",
        "a caption",
    ],
)
def test_what_changes_the_features_is_noticed(config: AnomalyConfig, change: str):
    keep(config)
    before = folders(config)
    encoder = None
    root = Path(config.data.root or "")
    if change == "weights":
        encoder = encoder_of(config)
        with torch.no_grad():
            encoder.network.layers[0].mlp.fc1.bias[0] += 1e-3
    elif change == "taps":
        config = replace(config, model=replace(config.model, image_taps=[0, 1, 2, 3][:4], image_encoder="clip_tiny"))
    elif change == "image_size":
        config = replace(config, data=replace(config.data, image_size=72))
    elif change == "precision":
        config = replace(config, parallel=ParallelConfig(precision=Precision.bf16))
    elif change == "seed":
        config = replace(config, train=replace(config.train, seed=1))
    elif change == "anomaly_kinds":
        config = replace(config, data=replace(config.data, anomaly_kinds=config.data.anomaly_kinds[:1]))
    elif change == "a caption":
        (root / "captions.json").write_text('{"brick": ["a wall"], "coins": ["coins"]}')
    else:
        path = sorted(root.rglob("*_mask.png" if change == "one mask" else "train/good/*.png"))[0]
        pixels = np.asarray(Image.open(path)).copy()
        pixels.flat[0] ^= 1
        Image.fromarray(pixels).save(path)
    keep(config, encoder)
    assert folders(config) > before


def test_where_the_data_lie_and_how_they_are_loaded_does_not_matter(config: AnomalyConfig, tmp_path: Path):
    keep(config)
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = replace(config.data, root=str(tmp_path / "moved"), num_workers=1, prefetch_batches=1)
    assert keep(replace(config, data=moved))[2] == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle"])
def test_a_damaged_file_is_computed_anew_and_never_used(config: AnomalyConfig, damage: str):
    train, _, _ = keep(config)
    number = 3
    path = next(train._store.folder.rglob(f"{number:07d}.safetensors"))
    whole, item = path.read_bytes(), train[number]
    damaged = {"cut": whole[:-100], "empty": b"", "pickle": b"\x80\x04cos\nsystem\n"}
    flipped = bytearray(whole)
    flipped[-50] ^= 1
    path.write_bytes(damaged.get(damage, bytes(flipped)))
    with pytest.raises(HpcmmError, match=rf"{path.name} is missing or damaged .*start the run again"):
        train[number]
    assert keep(config)[2] == 1
    for level, before in zip(train[number]["features"], item["features"], strict=True):
        torch.testing.assert_close(level, before, atol=1e-5, rtol=1e-4)


def test_ranks_that_write_the_same_file_at_once_leave_it_whole(config: AnomalyConfig, tmp_path: Path):
    train, _ = sets_of(config)
    store = FeatureStore(tmp_path / "store")
    item = train[0]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(store, item)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while not (tmp_path / "store" / "00" / "0000000.safetensors").exists():
        assert any(writer.is_alive() for writer in writers)
    for _ in range(50):
        assert store.read(0)["features"][0].shape == (4, 16, 16)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["0000000.safetensors"]


def _write_often(store: FeatureStore, item: object) -> None:
    for _ in range(50):
        store.write(0, item, [torch.rand(4, 16, 16)])  # type: ignore[arg-type]


def test_the_ranks_share_the_work_out(config: AnomalyConfig, tmp_path: Path, compiled_ops: None):
    """Two processes that meet over gloo."""
    alone = keep(config)[0]
    two = replace(config, cluster=ClusterConfig(cache_dir=str(tmp_path / "shared")))
    assert run_ranks(2, _seen_by_a_rank, two) == [8 + 2] * 2
    kept, _, seen = keep(two)
    assert seen == 0
    assert kept._store.folder.name == alone._store.folder.name
    for index in range(16):
        torch.testing.assert_close(kept[index]["features"][0], alone[index]["features"][0], atol=1e-5, rtol=1e-4)


def _seen_by_a_rank(rank: int, config: AnomalyConfig) -> int:
    counting = Counting(encoder := encoder_of(config))
    keep_features(config, encoder, *sets_of(config), Ranks(rank, 2))
    return counting.seen


def test_an_encoder_that_trains_is_refused(config: AnomalyConfig):
    config = replace(config, model=replace(config.model, freeze_image_encoder=False))
    with pytest.raises(HpcmmError, match=r"needs a frozen image encoder"):
        keep(config)


def test_a_full_disk_is_named(config: AnomalyConfig, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").write_text("a file if the folder should be")
    with pytest.raises(HpcmmError, match=r"cannot be written: .*cluster\.cache_dir"):
        keep(config)
