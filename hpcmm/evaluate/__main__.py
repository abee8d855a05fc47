"""``python -m hpcmm.evaluate RUN...``: score trained runs on held-out samples and put them side by side."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpcmm.cli import run_command
from hpcmm.config import config_file
from hpcmm.config.schema import RunConfig
from hpcmm.config.validate import check_model
from hpcmm.config.workload import shipped_workloads, workload_of
from hpcmm.errors import HpcmmError
from hpcmm.evaluate.evaluation import Evaluation, Scored
from hpcmm.files import is_regular, names_in, open_regular, resolved, write_together, write_whole
from hpcmm.jobs.find_run import find_folder
from hpcmm.node.cache import private_folder
from hpcmm.runs.ledger import LedgerPoint, read_ledger
from hpcmm.runs.ownership import own_output_folder
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.text import printable

if TYPE_CHECKING:
    from hpcmm.evaluate.side_by_side import Comparison

DESCRIPTION = """\
Load the newest checkpoint of each run, score {samples}, and write to DIR:
  scores.csv       every run by category: {columns}
  summary.csv      every model's mean over its seeds, with a 95% confidence interval
  comparison.md    the models side by side, with what may be concluded
  comparison.tex   the same tables for LaTeX (booktabs)
  comparison.png   the same as a chart
{files}A RUN is a run directory or a run's name in ./runs, a point of a sweep as SWEEP/0003, a job's number, or a
sweep's folder or ledger for all of its points. {notes}
"""
_ABOUT = ["run", "model", "seed", "trained_on", "scored_on"]
_SEED = "train.seed="
"""It has a column of its own."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. ``own`` holds the options of the runs' workload."""

    runs: list[Path]
    out: Path
    own: argparse.Namespace


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.evaluate") -> int:
    """The command line; returns the exit status."""
    return run_command("hpcmm.evaluate", lambda given: _command(given, prog), arguments, errors=(HpcmmError, OSError))


def _command(given: list[str], prog: str) -> int:
    evaluation = _evaluation_of(given)
    options = _parse(given, evaluation, prog)
    comparison, unscored = evaluate(options, evaluation)
    _print(comparison, options.out)
    for problem in unscored:
        print(f"hpcmm.evaluate: not scored: {printable(problem)}", file=sys.stderr)
    return 1 if unscored else 0


def evaluate(options: Options, evaluation: Evaluation) -> tuple[Comparison, list[str]]:
    """Score every run and write the files. Returns what ``scores.csv`` and ``summary.csv`` hold.

    Also returns a sentence for each run that cannot be scored. Raises HpcmmError when none can be.
    """
    from hpcmm.evaluate.side_by_side import Comparison  # noqa: PLC0415 - not needed by --help

    candidates, unfinished = find_runs(options.runs, evaluation.named_by)
    if unfinished:
        names = ", ".join(run.root.name for run in unfinished)
        print(f"Left out, for they have no finished checkpoint: {printable(names)}", file=sys.stderr)
    out = own_output_folder(options.out)
    frames: list[pd.DataFrame] = []
    shown: list[tuple[str, Scored]] = []
    unscored: list[str] = []
    for candidate in candidates:
        run = candidate.run
        try:
            config = evaluation.with_options(_config_for(evaluation, run), options.own)
            scored = _score(run, config, evaluation)
        except HpcmmError as error:
            unscored.append(f"{run.root.name}: {error}")
            continue
        model = _name(candidate, config, evaluation, frames)
        frames.append(
            scored.table.assign(
                run=run.root.name,
                model=model,
                seed=config.train.seed,
                trained_on=scored.trained_on,
                scored_on=scored.scored_on,
            )
        )
        if model not in dict(shown) and (not shown or evaluation.is_comparable(shown[0][1], scored)):
            shown.append((model, scored))
    if not frames:
        raise HpcmmError(" ".join(unscored))
    table = pd.concat(frames, ignore_index=True)
    table = table[[*_ABOUT, *(name for name in frames[0] if name not in _ABOUT)]]
    comparison = Comparison.of(evaluation, table)
    _write(comparison, out)
    _draw(evaluation, shown, out)
    return comparison, unscored


def _evaluation_of(arguments: Sequence[str]) -> Evaluation:
    """How the named runs are scored, by the first whose configuration says it; before their options can be known.

    Where none does, such as for ``--help``, as the workload that hpcmm ships.
    """
    for run in _named_runs(arguments):
        with suppress(HpcmmError):  # it is named later, as one that cannot be scored
            evaluation = _evaluation(config_file.load(run.config))
            if evaluation is not None:
                return evaluation
    for workload in shipped_workloads():
        evaluation = workload.evaluation()
        if evaluation is not None:
            return evaluation
    raise HpcmmError("No run is named whose task has scores: name runs of a workload that has.")


def _named_runs(arguments: Sequence[str]) -> Iterator[RunDir]:
    for word in arguments:
        if not word.startswith("-"):
            with suppress(HpcmmError, OSError):  # the value of an option, or a run that is refused later
                yield from (candidate.run for candidate in find_runs([Path(word)])[0])


def _evaluation(config: RunConfig) -> Evaluation | None:
    workload = workload_of(config)
    return None if workload is None else workload.evaluation()


def _config_for(evaluation: Evaluation, run: RunDir) -> RunConfig:
    """The run's configuration. Raises HpcmmError if the run is not scored by ``evaluation``."""
    config = config_file.load(run.config)
    own = _evaluation(config)
    if own is None:
        raise HpcmmError(f"The task {config.task.name} of {run.root} has no scores: name runs of a workload that has.")
    if type(own) is not type(evaluation):
        raise HpcmmError(f"{run.root} is scored in another way than the runs before it: evaluate it by itself.")
    check_model(config, run.config)
    return config


def _parse(arguments: Sequence[str], evaluation: Evaluation, prog: str) -> Options:
    described = DESCRIPTION.format(
        samples=evaluation.samples, columns=evaluation.columns, files=evaluation.files, notes=evaluation.notes
    )
    parser = argparse.ArgumentParser(
        prog=prog,
        description=described,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, sweeps")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: ./evaluation")
    evaluation.add_options(parser)
    given = parser.parse_intermixed_args(arguments)
    return Options(given.runs, given.out, given)


def _name(candidate: Candidate, config: RunConfig, evaluation: Evaluation, before: Sequence[pd.DataFrame]) -> str:
    """The model's name, with what a sweep set; with the run's where a run before has the same model and seed."""
    model = ", ".join([evaluation.model_name(config), *candidate.settings])
    if any((frame["model"].iloc[0], frame["seed"].iloc[0]) == (model, config.train.seed) for frame in before):
        return f"{model} ({candidate.run.root.name})"  # the same seed twice is no further sample of one model
    return model


def _score(run: RunDir, config: RunConfig, evaluation: Evaluation) -> Scored:
    import torch  # noqa: PLC0415 - torch takes seconds, --help needs none

    from hpcmm.cli import progress_bar  # noqa: PLC0415
    from hpcmm.train.checkpoint import load_model  # noqa: PLC0415
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415

    device = torch.device(select_accelerator())
    model = load_model(run, lambda: evaluation.build_model(config)).to(device)
    with progress_bar("hpcmm.evaluate") as bar:
        return evaluation.score(model, config, device, lambda done, of: bar(f"scoring {run.root.name}", done, of))


def _write(comparison: Comparison, out: Path) -> None:
    texts = {
        "scores.csv": comparison.table.to_csv(index=False),
        "summary.csv": comparison.summary.to_csv(index=False),
        "comparison.md": comparison.markdown(),
        "comparison.tex": comparison.latex(),
    }
    write_together(out, texts)
    comparison.draw_chart(out / "comparison.png")


def _draw(evaluation: Evaluation, shown: Sequence[tuple[str, Scored]], out: Path) -> None:
    """The workload draws in a folder that nobody else can come to: in ``out`` others may have left links."""
    with private_folder("hpcmm-") as private:
        evaluation.draw(private, shown)
        for name in sorted(names_in(private, within=private)):
            with open_regular(private / name, within=private) as picture:
                write_whole(out / name, partial(shutil.copyfileobj, picture))


def _print(comparison: Comparison, out: Path) -> None:
    console = Console()
    first = comparison.metrics[0]
    console.print(_view(comparison.wide(first), comparison.title(first)))
    console.print(_view(comparison.means(), "all metrics"))
    beside = comparison.published()
    if beside is not None:
        console.print(_view(beside[1], f"beside the published {_plain(beside[0])}"))
    for remark in comparison.remarks():
        console.print(_plain(remark), soft_wrap=True)
    console.print(f"Tables and pictures: {_plain(str(out))}", soft_wrap=True)


def _view(frame: pd.DataFrame, caption: str) -> Table:
    view = Table(*map(_plain, frame.columns), title=caption)
    for row in frame.astype(str).to_numpy():
        view.add_row(*map(_plain, row))
    return view


def _plain(text: str) -> str:
    """Text that neither rich nor a terminal obeys; names of runs may hold anything."""
    return escape(printable(text))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run to score. ``settings`` are a sweep's overrides that set its model apart."""

    run: RunDir
    settings: tuple[str, ...] = ()


def find_runs(paths: Sequence[Path], named_by: Sequence[str] = ()) -> tuple[list[Candidate], list[RunDir]]:
    """Run directories, runs' names, sweep folders, ledgers: to runs with a checkpoint, and the points without one.

    ``named_by`` are beginnings of overrides that a model's own name tells: they are no further settings. Raises
    HpcmmError where a path is none of these, or no run is left.
    """
    found: list[Candidate] = []
    unfinished: list[RunDir] = []
    for path in map(find_folder, paths):
        if not _is_sweep(path):
            found.append(Candidate(RunDir(resolved(path))))
            continue
        for candidate in _points(path, (_SEED, *named_by)):
            if candidate.run.has_checkpoint():
                found.append(candidate)
            else:
                unfinished.append(candidate.run)
    if not found:
        raise HpcmmError(f"No point of {', '.join(map(str, paths))} has a finished checkpoint: has it trained?")
    return found, unfinished


def _is_sweep(path: Path) -> bool:
    return path.is_file() or is_regular(SweepDir(path).ledger)


def _points(path: Path, named_otherwise: tuple[str, ...]) -> Iterator[Candidate]:
    ledger = read_ledger(resolved(path))
    for point in ledger.points:
        yield Candidate(ledger.run(point), _settings(point, named_otherwise))


def _settings(point: LedgerPoint, named_otherwise: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(override for override in point.overrides if not override.startswith(named_otherwise))


if __name__ == "__main__":
    sys.exit(main())
