"""What a workload tells ``hpcmm.evaluate``: its metrics, how a model is scored, and what its scores mean.

Subclass :class:`Evaluation` in the workload, and give it from ``Workload.evaluation()``. The command keeps the rest:
which runs, their checkpoints and the fence against other users' ones, means over seeds, the tables, the chart.
This module imports no torch, and neither may that of the subclass when it is imported: ``--help`` asks it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch

MEAN = "mean"
"""The category of the row that sums up a run: by it models are ranked. Every table of scores has it, last."""

Progress = Callable[[int, int], None]
"""Is called with how many samples are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one run."""

    table: pd.DataFrame
    """One row a category, the last with the category :data:`MEAN`. Columns: ``category``, then in any order what is
    worth a column in ``scores.csv``, such as counts, and those of ``Evaluation.metrics`` that the run has, as numbers
    from 0 to 1. A metric that a category cannot have is nan."""
    trained_on: str
    """The data set in a word, such as ``VisA``."""
    scored_on: str
    shown: Any = None
    """What :meth:`Evaluation.draw` wants of this run. It stays in memory until all runs are scored."""


@dataclass(frozen=True, slots=True)
class Published:
    """Values that others published for models of these names, to stand beside the measured ones."""

    metric: str
    """One of ``Evaluation.metrics``; it is compared in the mean over categories."""
    plural: str
    """The metric's name in a heading, in the plural: ``accuracies``."""
    values: Mapping[str, float]
    """By model, from 0 to 1."""


class Evaluation(ABC):
    """How the runs of one workload are scored and compared.

    To be given: ``metrics``, :meth:`model_name`, :meth:`build_model` and :meth:`score`. All else may stay as it is.
    ``config`` is an object of the workload's schema everywhere.
    """

    metrics: Sequence[str]
    """Columns that are averaged over seeds and compared, in the order of the tables; larger is better. The first is
    the one whose table by category goes to the terminal."""
    titles: Mapping[str, str] = MappingProxyType({})
    """Headings of metrics whose name, with blanks for ``_``, is not good enough."""
    charted: Sequence[str] = ()
    """Metrics that the chart shows by category, beside the means of all."""
    pooled: str | None = None
    """The category of a row over all samples together, if the tables have one. It is set apart from the categories."""
    named_by: Sequence[str] = ()
    """Beginnings of overrides, such as ``model.decoder=``, that :meth:`model_name` tells already. What else a sweep
    sets is added to the name of a model."""
    samples: str = "the held-out samples"
    """For ``--help``: what is scored."""
    columns: str = "its metrics"
    """For ``--help``: the columns of ``scores.csv``, as the end of "every run by category: "."""
    files: str = ""
    """For ``--help``: the files that :meth:`draw` writes, each a line ``  NAME  what it holds``."""
    notes: str = ""
    """For ``--help``: sentences at the end."""

    def add_options(self, parser: ArgumentParser) -> None:
        """Add options of this workload alone to the command line, such as another data set to score."""
        del parser

    def with_options(self, config: Any, options: Namespace) -> Any:
        """``config`` as these options change it. Raises HpcmmError for a value that cannot be used."""
        del options
        return config

    @abstractmethod
    def model_name(self, config: Any) -> str:
        """What the run's model is called in the tables; the same for runs that differ by their seed alone."""

    @abstractmethod
    def build_model(self, config: Any) -> torch.nn.Module:
        """The run's model as it was before training, float32 on the CPU. The command gives it the checkpoint's weights.

        Makes what the model needs and is not there. Raises HpcmmError if it cannot be built.
        """

    @abstractmethod
    def score(self, model: Any, config: Any, device: torch.device, progress: Progress) -> Scored:
        """Score the held-out samples of ``config`` with the trained ``model``, in evaluation mode and on ``device``.

        Raises HpcmmError if the run cannot be scored, such as for missing data: the other runs still are.
        """

    def is_comparable(self, first: Scored, other: Scored) -> bool:
        """Whether the two runs can be drawn side by side: whether they were scored on the same samples."""
        del first, other
        return True

    def draw(self, out: Path, results: Sequence[tuple[str, Scored]]) -> None:
        """Write pictures, as files, into the folder ``out``, which is empty; what is there then is copied from there.

        ``results``: one run of each model, by the model's name. All are comparable with the first.
        """
        del out, results

    def remarks(self, table: pd.DataFrame) -> list[str]:
        """Sentences on what the scores of all runs do not say. ``table`` is that of ``scores.csv``."""
        del table
        return []

    def published(self, table: pd.DataFrame) -> Published | None:
        """What others published for the very experiment of these runs; None if the runs are of another."""
        del table
        return None
