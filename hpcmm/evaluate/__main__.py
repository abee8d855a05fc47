"""``python -m hpcmm.evaluate RUN...``: score trained runs on held-out images and put them side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hpcmm import config as run_config
from hpcmm.config import Layout, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.run_dir import RunDir

if TYPE_CHECKING:
    from hpcmm.data.anomaly import TestImages
    from hpcmm.evaluate.score import Scored

DESCRIPTION = """\
Load the newest checkpoint of each run, score the held-out images, and write to DIR:
  scores.csv     every run by category: image and pixel AUROC, PRO, F1, accuracy
  summary.csv    every model's mean over its seeds, with a 95% confidence interval
  maps.png       an image a category with its true defect and each model's heat map
A run's model is called by its decoder; a second run of one decoder and seed also by its name.
F1 is the largest over all thresholds, accuracy is the one at that threshold.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    runs: list[Path]
    out: Path
    test_root: str | None
    test_layout: Layout | None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        table, summary = evaluate(options)
    except (HpcmmError, OSError) as error:
        print(f"hpcmm.evaluate: {error}", file=sys.stderr)
        return 1
    _print(table, summary, options.out)
    return 0


def evaluate(options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every run and write the files. Returns the contents of ``scores.csv`` and ``summary.csv``.

    Raises HpcmmError when a run cannot be scored.
    """
    from hpcmm.evaluate import picture  # noqa: PLC0415 - torch takes seconds, --help does not need it
    from hpcmm.evaluate.score import by_category  # noqa: PLC0415
    from hpcmm.evaluate.table import over_seeds  # noqa: PLC0415

    options.out.mkdir(parents=True, exist_ok=True)
    frames: list[pd.DataFrame] = []
    shown: list[tuple[str, Scored]] = []
    images: dict[int, NDArray[np.float32]] = {}
    for path in options.runs:
        run = RunDir(path.resolve())
        config = _with_test_set(run_config.load(run.config), options)
        scored, test = _score(run, config)
        model = config.model.decoder
        if any((frame["model"].iloc[0], frame["seed"].iloc[0]) == (model, config.train.seed) for frame in frames):
            model = f"{model} ({run.root.name})"  # the same seed twice is no further sample of one model
        frames.append(by_category(scored).assign(run=run.root.name, model=model, seed=config.train.seed))
        if not shown:
            images = {index: test[index]["image"].numpy() for index in picture.chosen(scored)}
        if model not in dict(shown) and (not shown or np.array_equal(shown[0][1].mask, scored.mask)):
            shown.append((model, scored))
    table = pd.concat(frames, ignore_index=True)
    table = table[["run", "model", "seed", *(name for name in frames[0] if name not in {"run", "model", "seed"})]]
    summary = over_seeds(table)
    table.to_csv(options.out / "scores.csv", index=False)
    summary.to_csv(options.out / "summary.csv", index=False)
    picture.draw(options.out / "maps.png", images, shown)
    return table, summary


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m hpcmm.evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: ./evaluation")
    parser.add_argument("--test-root", metavar="FOLDER", help="score this data set instead of the run's own")
    parser.add_argument("--test-layout", choices=[layout.value for layout in Layout], help="its layout")
    options = parser.parse_args(arguments)
    layout = Layout(options.test_layout) if options.test_layout else None
    return Options(options.runs, options.out, options.test_root, layout)


def _with_test_set(config: RunConfig, options: Options) -> RunConfig:
    if options.test_root is None:
        return config
    data = replace(config.data, test_root=options.test_root, test_categories=[])
    return replace(config, data=replace(data, test_layout=options.test_layout or data.test_layout))


def _score(run: RunDir, config: RunConfig) -> tuple[Scored, TestImages]:
    import torch  # noqa: PLC0415

    from hpcmm.data.anomaly import build_datasets  # noqa: PLC0415
    from hpcmm.evaluate.checkpoint import load_model  # noqa: PLC0415
    from hpcmm.evaluate.score import score_images  # noqa: PLC0415
    from hpcmm.page.progress import progress_bar  # noqa: PLC0415
    from hpcmm.train.data_root import data_config, data_root  # noqa: PLC0415

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, test = build_datasets(data_root(config), data_config(config), config.train.seed)
    model = load_model(run, config).to(device)
    with progress_bar() as bar:
        scored = score_images(
            model,
            test,
            config.train.micro_batch_size,
            device,
            lambda done, of: bar(f"scoring {run.root.name}", done, of),
        )
    return scored, test


def _print(table: pd.DataFrame, summary: pd.DataFrame, out: Path) -> None:
    from hpcmm.evaluate.score import MEAN, METRICS  # noqa: PLC0415
    from hpcmm.evaluate.table import separated  # noqa: PLC0415

    models = list(dict.fromkeys(summary["model"]))
    view = Table("category", *(f"{model} {metric}" for metric in METRICS[:1] for model in models))
    for category in dict.fromkeys(summary["category"]):
        view.add_row(str(category), *(_cell(summary, model, str(category), METRICS[0]) for model in models))
    console = Console()
    console.print(view)
    rows = Table("mean over categories", *METRICS)
    for model in models:
        rows.add_row(model, *(_cell(summary, model, MEAN, metric) for metric in METRICS))
    console.print(rows)
    pairs = separated(summary, METRICS[0])
    if pairs:
        console.print("; ".join(f"{better} is better than {worse}" for better, worse in pairs) + " in image AUROC.")
    elif len(models) > 1:
        console.print("The intervals of image AUROC separate no two models: these runs rank none above another.")
    if _has_standins(table):
        console.print("Scores on stand-ins say that training works, and nothing about MVTec-AD or VisA.")
    console.print(f"Tables and picture: {out}", soft_wrap=True)


def _cell(summary: pd.DataFrame, model: str, category: str, metric: str) -> str:
    own = (summary["model"] == model) & (summary["category"] == category) & (summary["metric"] == metric)
    if not own.any():
        return "-"
    mean, low, high = (float(summary.loc[own, name].iloc[0]) for name in ("mean", "low", "high"))
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _has_standins(table: pd.DataFrame) -> bool:
    from hpcmm.data.textures import TEXTURES  # noqa: PLC0415

    return bool(set(table["category"]) & {texture.category for texture in TEXTURES})


if __name__ == "__main__":
    sys.exit(main())
