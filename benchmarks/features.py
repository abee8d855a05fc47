"""What keeping a frozen encoder's features gains: steps on images beside steps on kept features, by turns, one process.

    python benchmarks/features.py [--steps 10] [--turns 5] [--models NAME ...] [--json FILE] [KEY=VALUE ...]

A step is a micro-batch from the data set, forward, loss, backward and an AdamW update. Prints a Markdown table: the
time to compute the features of all training and test images once, the medians of a step with and without them, its data
part alone, and how many steps win back the time that computing took.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import measuring
from measuring import Row, ratio, summary

from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from hpcmm.workloads.anomaly.data.anomaly import Batch, Item
    from hpcmm.workloads.anomaly.models import AnomalyModel
    from hpcmm.workloads.anomaly.models.anomaly import Encoded

VIT_BASE = "vit_base"
"""A ViT of the published base size with random weights: its cost does not depend on them."""
MODELS = ("efficientnet_lite0", "vit_tiny", VIT_BASE)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step, and of getting its batch."""

    whole_s: float
    data_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one model: seconds to compute the features once, and each turn's step on images and on kept features."""

    model: str
    computing_s: float
    images: list[Step]
    features: list[Step]


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=measuring.positive, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in conf/model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    rows = []
    print("| model | computed once | on images (data) | on kept features (data) | times as fast | won back after |")
    print("|---|---|---|---|---|---|")
    for model in options.models:
        measured = measure(model, options)
        print(line(measured), flush=True)
        rows.append(row(measured, options.steps))
    measuring.write(options.json, "features", rows)


def measure(model_name: str, options: argparse.Namespace) -> Measured:
    """Compute the features once, and run the steps of either kind by turns."""
    from hpcmm.workloads.anomaly.data.anomaly import build_datasets  # noqa: PLC0415
    from hpcmm.workloads.anomaly.data.standins import generate  # noqa: PLC0415
    from hpcmm.workloads.anomaly.feature_cache import Ranks, keep_features  # noqa: PLC0415
    from hpcmm.workloads.anomaly.models import build_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "cluster=local",
            "cluster.ranks_per_node=1",
            *choose(model_name, folder),
            "data.feature_cache=true",
        ]
        overrides += ["model.freeze_image_encoder=true", f"data.root={folder}/set", f"cluster.cache_dir={folder}/cache"]
        config = compose_run([*overrides, *options.overrides])
        root = Path(folder) / "set"
        generate(root, config.data, config.train.seed)
        model = build_model(config.model, config.train.seed)
        train, test = build_datasets(root, config.data, config.train.seed)
        began = time.perf_counter()
        kept, _ = keep_features(config, model.image_encoder, train, test, Ranks(0, 1))
        computing_s = time.perf_counter() - began
        sets: Sequence[Dataset[Item]] = (train, kept)
        times: dict[int, list[Step]] = {0: [], 1: []}
        for which in (0, 1):
            run(model, sets[which], len(train), config, 2)  # warm
        for turn in range(options.turns):
            for which in (turn % 2, 1 - turn % 2):
                times[which].append(run(model, sets[which], len(train), config, options.steps))
    return Measured(model_name, computing_s, times[0], times[1])


def line(measured: Measured) -> str:
    """The model's row of the Markdown table."""
    images, features, back_after = median(measured.images), median(measured.features), won_back_after(measured)
    back = "never" if back_after is None else f"{back_after:.0f} steps"
    return (
        f"| {measured.model} | {measured.computing_s:.1f} s "
        f"| {1000 * images.whole_s:.0f} ms ({1000 * images.data_s:.0f}) "
        f"| {1000 * features.whole_s:.0f} ms ({1000 * features.data_s:.0f}) "
        f"| {images.whole_s / features.whole_s:.2f} | {back} |"
    )


def row(measured: Measured, steps: int) -> Row:
    """The same as numbers, of turns that each are means over ``steps`` steps."""
    found: Row = {"model": measured.model, "turns": len(measured.images), "steps": steps}
    found["computing_s"] = measured.computing_s
    for kind, turns in (("images", measured.images), ("features", measured.features)):
        found |= summary([turn.whole_s for turn in turns], "s", f"{kind}_step")
        found |= summary([turn.data_s for turn in turns], "s", f"{kind}_data")
    times = ratio(median(measured.images).whole_s, median(measured.features).whole_s)
    return {**found, "times_as_fast": times, "won_back_after_steps": won_back_after(measured)}


def median(turns: Sequence[Step]) -> Step:
    return Step(statistics.median(turn.whole_s for turn in turns), statistics.median(turn.data_s for turn in turns))


def won_back_after(measured: Measured) -> float | None:
    """Steps; None if steps on kept features are no faster."""
    gain_s = median(measured.images).whole_s - median(measured.features).whole_s
    return measured.computing_s / gain_s if gain_s > 0 else None


def choose(model_name: str, folder: str) -> list[str]:
    """Overrides that choose the model."""
    if model_name != VIT_BASE:
        return [f"model={model_name}"]
    from transformers import ViTConfig, ViTModel  # noqa: PLC0415

    ViTModel(ViTConfig(), add_pooling_layer=False).save_pretrained(f"{folder}/{VIT_BASE}")
    return ["model=vit", f"model.image_weights={folder}/{VIT_BASE}"]


def run(model: AnomalyModel, items: Dataset[Item], length: int, config: RunConfig, steps: int) -> Step:
    """Means over ``steps`` steps."""
    import torch  # noqa: PLC0415
    from torch.utils.data import DataLoader  # noqa: PLC0415

    from hpcmm.train.sampling import EndlessSampler  # noqa: PLC0415
    from hpcmm.workloads.anomaly.data.anomaly import collate  # noqa: PLC0415
    from hpcmm.workloads.anomaly.models.losses import LossLearner  # noqa: PLC0415

    loss_of = LossLearner(config.train)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    sampler = EndlessSampler(length, config.train.micro_batch_size, 0, 1, 0)
    batches = iter(DataLoader(items, batch_sampler=sampler, collate_fn=collate, num_workers=config.data.num_workers))
    data_s = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        data_s += time.perf_counter() - asked
        optimizer.zero_grad()
        loss, _ = loss_of(model(inputs(batch), batch["caption"]), batch["mask"])
        loss.backward()
        optimizer.step()
    return Step((time.perf_counter() - began) / steps, data_s / steps)


def inputs(batch: Batch) -> torch.Tensor | Encoded:
    if "features" not in batch:
        return batch["image"]
    from hpcmm.workloads.anomaly.models.anomaly import Encoded  # noqa: PLC0415

    height, width = batch["mask"].shape[-2:]
    return Encoded(batch["features"], (height, width))


if __name__ == "__main__":
    main()
