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
from rich.markup import escape
from rich.table import Table

from hpcmm.cli import run_command
from hpcmm.config import config_file
from hpcmm.config.schema import Layout, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.evaluate.runs import find_runs
from hpcmm.runs.run_dir import RunDir

if TYPE_CHECKING:
    from hpcmm.workloads.anomaly.data.anomaly import TestImages
    from hpcmm.workloads.anomaly.scoring import Scored

DESCRIPTION = """\
Load the newest checkpoint of each run, score the held-out images, and write to DIR:
  scores.csv       every run by category: image and pixel AUROC, PRO, F1, accuracy,
                   and how right the words are, where there is a language model
  summary.csv      every model's mean over its seeds, with a 95% confidence interval
  comparison.md    the models side by side, with what may be concluded
  comparison.tex   the same tables for LaTeX (booktabs)
  comparison.png   the same as a chart
  maps.png         an image a category with its true defect and each model's heat map
A RUN is a run directory or a run's name in ./runs, or a sweep's folder or ledger for all of its points. A run's
model is called by its decoder and by what else a sweep set; a second run of one model and seed also by its name.
F1 is the largest over all thresholds, accuracy is the one at that threshold.
"""


_ANSWERED_AT_ONCE = 4
"""Micro-batches whose questions a language model answers together: many take it as long as few."""
_ABOUT = ["run", "model", "seed", "trained_on", "scored_on"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    runs: list[Path]
    out: Path
    test_root: str | None
    test_layout: Layout | None


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.evaluate") -> int:
    """The command line; returns the exit status."""
    return run_command(
        "hpcmm.evaluate", lambda given: _command(_parse(given, prog)), arguments, errors=(HpcmmError, OSError)
    )


def _command(options: Options) -> int:
    table, summary, unscored = evaluate(options)
    _print(table, summary, options.out)
    for problem in unscored:
        print(f"hpcmm.evaluate: not scored: {problem}", file=sys.stderr)
    return 1 if unscored else 0


def evaluate(options: Options) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Score every run and write the files. Returns the contents of ``scores.csv`` and ``summary.csv``.

    Also returns a sentence for each run that cannot be scored. Raises HpcmmError when none can be.
    """
    from hpcmm.evaluate import chart, side_by_side  # noqa: PLC0415 - torch takes seconds, --help needs none
    from hpcmm.evaluate.table import over_seeds  # noqa: PLC0415
    from hpcmm.workloads.anomaly import maps_picture  # noqa: PLC0415 - torch takes seconds, --help needs none
    from hpcmm.workloads.anomaly.scoring import by_category  # noqa: PLC0415

    candidates, unfinished = find_runs(options.runs)
    if unfinished:
        names = ", ".join(run.root.name for run in unfinished)
        print(f"Left out, for they have no finished checkpoint: {names}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    frames: list[pd.DataFrame] = []
    shown: list[tuple[str, Scored]] = []
    images: dict[int, NDArray[np.float32]] = {}
    unscored: list[str] = []
    for candidate in candidates:
        run = candidate.run
        try:
            config = _with_test_set(config_file.load(run.config), options)
            scored, test, (trained_on, scored_on) = _score(run, config)
        except HpcmmError as error:
            unscored.append(f"{run.root.name}: {error}")
            continue
        model = ", ".join([config.model.decoder, *candidate.settings])
        if any((frame["model"].iloc[0], frame["seed"].iloc[0]) == (model, config.train.seed) for frame in frames):
            model = f"{model} ({run.root.name})"  # the same seed twice is no further sample of one model
        frames.append(
            by_category(scored).assign(
                run=run.root.name, model=model, seed=config.train.seed, trained_on=trained_on, scored_on=scored_on
            )
        )
        if not shown:
            images = {index: test[index]["image"].numpy() for index in maps_picture.chosen(scored)}
        if model not in dict(shown) and (not shown or np.array_equal(shown[0][1].mask, scored.mask)):
            shown.append((model, scored))
    if not frames:
        raise HpcmmError(" ".join(unscored))
    table = pd.concat(frames, ignore_index=True)
    table = table[[*_ABOUT, *(name for name in frames[0] if name not in _ABOUT)]]
    summary = over_seeds(table)
    table.to_csv(options.out / "scores.csv", index=False)
    summary.to_csv(options.out / "summary.csv", index=False)
    (options.out / "comparison.md").write_text(side_by_side.markdown(table, summary), encoding="utf-8")
    (options.out / "comparison.tex").write_text(side_by_side.latex(table, summary), encoding="utf-8")
    chart.draw(options.out / "comparison.png", summary)
    maps_picture.draw(options.out / "maps.png", images, shown)
    return table, summary, unscored


def _parse(arguments: Sequence[str], prog: str) -> Options:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, sweeps")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: ./evaluation")
    parser.add_argument("--test-root", metavar="FOLDER", help="score this data set instead of the run's own")
    parser.add_argument("--test-layout", choices=[layout.value for layout in Layout], help="its layout")
    options = parser.parse_intermixed_args(arguments)
    layout = Layout(options.test_layout) if options.test_layout else None
    return Options(options.runs, options.out, options.test_root, layout)


def _with_test_set(config: RunConfig, options: Options) -> RunConfig:
    if options.test_root is None:
        return config
    data = replace(config.data, test_root=options.test_root, test_categories=[])
    return replace(config, data=replace(data, test_layout=options.test_layout or data.test_layout))


def _score(run: RunDir, config: RunConfig) -> tuple[Scored, TestImages, tuple[str, str]]:
    """The run's scores, the images that they are of, and what it was trained on and scored on."""
    import torch  # noqa: PLC0415

    from hpcmm.evaluate.checkpoint import load_model  # noqa: PLC0415
    from hpcmm.page.progress import progress_bar  # noqa: PLC0415
    from hpcmm.worker.accelerator import select_accelerator  # noqa: PLC0415
    from hpcmm.workloads.anomaly.data.anomaly import build_datasets  # noqa: PLC0415
    from hpcmm.workloads.anomaly.data_root import data_config, data_root  # noqa: PLC0415
    from hpcmm.workloads.anomaly.origin import origins  # noqa: PLC0415
    from hpcmm.workloads.anomaly.scoring import score_images  # noqa: PLC0415

    device = torch.device(select_accelerator())
    root, data = data_root(config), data_config(config)
    _, test = build_datasets(root, data, config.train.seed)
    model = load_model(run, config).to(device)
    with progress_bar("hpcmm.evaluate") as bar:
        scored = score_images(
            model,
            test,
            config.train.micro_batch_size * (1 if model.language is None else _ANSWERED_AT_ONCE),
            device,
            lambda done, of: bar(f"scoring {run.root.name}", done, of),
        )
    return scored, test, origins(root, data)


def _print(table: pd.DataFrame, summary: pd.DataFrame, out: Path) -> None:
    from hpcmm.evaluate import side_by_side  # noqa: PLC0415

    console = Console()
    first = side_by_side.metrics_of(summary)[0]
    console.print(_view(side_by_side.wide(summary, first), side_by_side.title(first)))
    console.print(_view(side_by_side.means(summary), "all metrics"))
    beside = side_by_side.published(table, summary)
    if beside is not None:
        console.print(_view(beside, "beside the published accuracies"))
    for remark in side_by_side.remarks(table, summary):
        console.print(escape(remark), soft_wrap=True)
    console.print(f"Tables and pictures: {escape(str(out))}", soft_wrap=True)


def _view(frame: pd.DataFrame, caption: str) -> Table:
    view = Table(*map(escape, frame.columns), title=caption)
    for row in frame.astype(str).to_numpy():
        view.add_row(*map(escape, row))
    return view


if __name__ == "__main__":
    sys.exit(main())
