"""Who waited for whom: a cell a pair of ranks, or of nodes where there are too many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import plain, seconds, trace_name

MAX_SIDE = 64
MAX_WITH_NUMBERS = 16
"""Up to this many rows a cell is large enough for its number."""
MIN_SHADE = 0.01, 0.03
"""Of the longest wait; a shorter one is not drawn. With numbers, without."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair; ``shade`` is 0 to 1 of the longest wait."""

    row: int
    column: int
    shade: float
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class WaitMatrix:
    """Cells of a square with ``labels`` on both sides; ``told`` says the same in a sentence."""

    labels: list[str]
    edge: int
    """Pixels that the longest label of a row takes."""
    of: str
    cells: list[Cell]
    numbers: bool
    told: str


def wait_matrix(study: Study) -> WaitMatrix | None:
    """The matrix in milliseconds a step; None where nobody waited, or where even the nodes are too many."""
    values = study.wait_matrix
    if values.size == 0 or not np.any(values > 0):
        return None
    of, labels = "rank", [trace_name(trace) for trace in study.traces]
    if len(values) > MAX_SIDE:
        nodes = [trace.node for trace in study.traces]
        of, labels, values = "node", [plain(node) for node in dict.fromkeys(nodes)], _by_node(values, nodes)
    if len(values) > MAX_SIDE:
        return None
    largest = float(values.max())
    numbers = len(values) <= MAX_WITH_NUMBERS
    cells = [
        Cell(
            int(row),
            int(column),
            round(float(values[row, column]) / largest, 3),
            f"{values[row, column] * 1e3:.3g}" if numbers else "",
            f"{labels[row]} waited {seconds(float(values[row, column]))} a step for {labels[column]}",
        )
        for row, column in np.argwhere(values >= MIN_SHADE[not numbers] * largest)
    ]
    short = [label.removeprefix("rank ") for label in labels]
    edge = 16 + 7 * min(max(map(len, short)), 24)
    return WaitMatrix(short, edge, of, cells, numbers, _most_waited_for(values, labels))


def _by_node(values: npt.NDArray[np.float64], nodes: Sequence[str]) -> npt.NDArray[np.float64]:
    """Mean over the ranks of the waiting node, sum over those of the node waited for."""
    index = {node: at for at, node in enumerate(dict.fromkeys(nodes))}
    member = np.zeros((len(index), len(nodes)))
    member[[index[node] for node in nodes], np.arange(len(nodes))] = 1.0
    return np.asarray(member @ values @ member.T / member.sum(axis=1, keepdims=True), dtype=np.float64)


def _most_waited_for(values: npt.NDArray[np.float64], labels: Sequence[str]) -> str:
    waited = values.sum(axis=0)
    most = int(waited.argmax())
    others = max(len(values) - 1, 1)
    return (
        f"{labels[most]} is waited for most: {seconds(float(waited[most]) / others)} a step by each of the others, "
        f"{waited[most] / waited.sum():.0%} of all waiting."
    )
