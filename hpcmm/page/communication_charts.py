"""Who waited for whom, a cell a pair of ranks or nodes; and the bus bandwidth of the collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import number, plain, seconds, size, trace_name

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


MAX_ROWS = 24
"""Those with the most transfer time; the CSV holds all."""


@dataclass(frozen=True, slots=True)
class BandwidthRow:
    """One operation of one group and size; nine tenths of its calls lie in ``width`` percent from ``low`` on."""

    op: str
    group: str
    size: str
    count: str
    transfer: str
    median: str
    low: float
    width: float
    middle: float
    told: str


def bandwidth(study: Study) -> tuple[list[BandwidthRow], int]:
    """Rows by transfer time, and how many are left out."""
    table = study.tables["collectives"]
    rate = table["bus_bytes_per_s"].astype(float)
    table = table[np.isfinite(rate) & (rate > 0) & (table["bytes"] > 0)]
    if table.empty:
        return [], 0
    table = table.assign(scale=np.floor(np.log2(table["bytes"].astype(float))).astype(int))
    grouped = table.groupby(["op", "group", "scale"], observed=True)
    found = grouped.agg(
        bytes=("bytes", "median"), count=("bytes", "size"), ranks=("rank", "nunique"), transfer=("transfer_s", "sum")
    )
    rates = grouped["bus_bytes_per_s"]
    found = found.assign(low=rates.quantile(0.05), median=rates.quantile(0.5), high=rates.quantile(0.95))
    found = found.sort_values("transfer", ascending=False)
    most = float(found["high"].max())
    rows = []
    for row in found.head(MAX_ROWS).reset_index().to_dict("records"):
        low, middle, high = (100 * float(row[name]) / most for name in ("low", "median", "high"))
        told = f"5% to 95%: {size(row['low'])}/s to {size(row['high'])}/s"
        ranks = max(int(row["ranks"]), 1)
        rows.append(
            BandwidthRow(
                plain(row["op"]),
                plain(row["group"]),
                size(row["bytes"]),
                number(round(int(row["count"]) / ranks)),
                seconds(float(row["transfer"]) / ranks),
                f"{size(row['median'])}/s",
                round(low, 2),
                round(max(high - low, 0.4), 2),
                round(middle, 2),
                told,
            )
        )
    return rows, max(0, len(found) - MAX_ROWS)
