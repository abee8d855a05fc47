"""How right answers are, beside what answers without a look at the image would get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcmm.workloads.anomaly.question_answering.conversations import ParsedAnswer
from hpcmm.workloads.anomaly.question_answering.grid import SIDE

CELLS = SIDE * SIDE
METRICS = ("words_detection", "words_grid", "words_overlap")
"""Detection: the share of images whose answer is right about whether. Grid: of the damaged images, the share whose
answer names exactly the right cells. Overlap: their mean of (cells both have) / (cells one of them has)."""

Statements = NDArray[np.int8]
"""Of N images (N, 1 + CELLS): 1 for an anomaly, 0 for none, -1 if the answer says neither; then 1 for each cell."""


def statements(said: Sequence[ParsedAnswer]) -> Statements:
    """Answers as numbers, which processes can send to one another."""
    table = np.zeros((len(said), 1 + CELLS), np.int8)
    for row, each in zip(table, said, strict=True):
        row[0] = -1 if each.anomalous is None else each.anomalous
        row[[1 + cell for cell in sorted(each.cells)]] = 1
    return table


def answer_scores(said: Statements, truth: Statements) -> dict[str, float]:
    """METRICS of the answers ``said``; and the same of a constant and of shuffled answers, as ``<metric>_constant``...

    ``constant`` is the one answer that would get the most over these very images. ``shuffled`` is what the answers get
    on the mean when they are dealt out to the images anew: they keep their mix and know nothing of the image. If no
    damaged image has a place, grid and overlap are nan.
    """
    placed = (truth[:, 0] == 1) & truth[:, 1:].any(axis=1)
    tables = {"words_detection": said[:, :1] == truth[:, 0]}  # said x truth: what each answer gets for each image
    where_said, where_true = said[placed], truth[placed][:, 1:]
    tables["words_grid"] = _matches(where_said, where_true)
    tables["words_overlap"] = _overlaps(where_said, where_true)
    candidates = np.unique(where_true, axis=0)
    candidates = np.concatenate([np.ones((len(candidates), 1), np.int8), candidates], axis=1)
    constants = {
        "words_detection": np.array([[1], [0]]) == truth[:, 0],
        "words_grid": _matches(candidates, where_true),
        "words_overlap": _overlaps(candidates, where_true),
    }
    scores: dict[str, float] = {}
    for metric in METRICS:
        table = tables[metric]
        scores[metric] = _mean(np.diagonal(table))
        scores[f"{metric}_constant"] = max((_mean(row) for row in constants[metric]), default=float("nan"))
        scores[f"{metric}_shuffled"] = _mean(table)
    return scores


def _matches(said: Statements, cells: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Statements (M, 1 + CELLS) and true cells (N, CELLS) to whether each names exactly those (M, N)."""
    same = (said[:, None, 1:] == cells[None]).all(axis=2)
    return np.asarray((said[:, :1] == 1) & same)


def _overlaps(said: Statements, cells: NDArray[np.int8]) -> NDArray[np.float64]:
    """Statements (M, 1 + CELLS) and true cells (N, CELLS) to their Jaccard indices (M, N)."""
    both = said[:, 1:].astype(np.float64) @ cells.T.astype(np.float64)
    either = said[:, 1:].sum(axis=1, dtype=np.int64)[:, None] + cells.sum(axis=1, dtype=np.int64)[None] - both
    return np.asarray(np.divide(both, either, out=np.zeros_like(both), where=either > 0), np.float64)


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else float("nan")
