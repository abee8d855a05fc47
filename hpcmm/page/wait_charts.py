"""What ranks wait for: each other, the bytes of a collective, and child processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import process_groups
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.study import Study
from hpcmm.analysis.trace import LOADING, OP_BUILD, OTHER_WAIT, SUPERVISION, WITHIN_STEP, WORKER
from hpcmm.page.headlines import number, plain, rank_list, rank_name, seconds, size, trace_name
from hpcmm.page.step_charts import Bar, Part

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
    """The matrix in milliseconds a step; None if nobody waited, or where even the nodes are too many."""
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
    table = table.assign(group=process_groups.labels(table).str.removeprefix("group "))
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


MAX_BANDS = 64
MIN_WIDTH = 0.15
"""Percent of the drawing; a shorter wait is drawn this wide, so that it is seen."""

MEANING = {
    SUPERVISION: "a launcher waits for the process it started: it costs nothing",
    OP_BUILD: "before the first step, compiled operators are probed or built: it delays the start only",
    LOADING: "a loader process, or the thread that minds it: harmless while the data phase is short",
    WITHIN_STEP: "the thread that trains stands still within a step: this costs time",
    OTHER_WAIT: "a background thread, or between steps",
}
_COLOURS = {
    SUPERVISION: "other",
    OP_BUILD: "forward",
    LOADING: "data",
    WITHIN_STEP: "wait",
    OTHER_WAIT: "transfer",
}


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One verdict over all ranks."""

    verdict: str
    kind: str
    meaning: str
    ranks: str
    calls: str
    union: str
    window: str


@dataclass(frozen=True, slots=True)
class ChildWaits:
    """Bands by rank, and by what runs beside it, over ``span``, the step part of the run in percent of it, and the
    verdicts."""

    bands: list[Bar]
    steps: tuple[float, float] | None
    span: str
    verdicts: list[VerdictRow]
    left_out: int


def child_waits(study: Study) -> ChildWaits | None:
    """The bands; None if no wait for a child was recorded."""
    windows = study.tables["waitpid_windows"]
    if windows.empty:
        return None
    first_s, last_s = _step_span(study)
    span = max(float(windows["end_s"].max()), last_s, 1e-9)
    # A launcher's calls are in the table of a rank whose report has them, and are none of that rank's.
    by_process = {(int(str(rank)), str(role)): group for (rank, role), group in windows.groupby(["rank", "role"])}
    within = windows[windows["verdict"] == WITHIN_STEP].groupby("rank")["union_s"].sum()
    order = sorted(by_process, key=lambda of: (-float(within.get(of[0], 0.0)), of[0], of[1] != WORKER, of[1]))
    chosen = sorted(order[:MAX_BANDS], key=lambda of: (of[0], of[1] != WORKER, of[1]))
    bands = [
        _band(_whose([role], rank_name(rank, names=study.names)), by_process[rank, role], span) for rank, role in chosen
    ]
    steps = (round(100 * first_s / span, 3), round(100 * (last_s - first_s) / span, 3)) if last_s > first_s else None
    return ChildWaits(bands, steps, seconds(span), _verdicts(windows, study.names), len(order) - len(chosen))


def _whose(roles: Iterable[str], ranks: str) -> str:
    """A rank's own process by its rank, other ones by what they are."""
    others = sorted({plain(role) for role in roles} - {WORKER})
    return f"{', '.join(others)} beside {ranks}" if others else ranks


def _step_span(study: Study) -> tuple[float, float]:
    """Start of the first step and end of the last, in seconds of the run."""
    closed = [trace.steps for trace in study.traces if len(trace.steps)]
    if not closed:
        return 0.0, 0.0
    return (
        min(int(steps["start_ns"].min()) for steps in closed) / NS_PER_S,
        max(int(steps["end_ns"].max()) for steps in closed) / NS_PER_S,
    )


def _band(name: str, windows: pd.DataFrame, span: float) -> Bar:
    parts, told = [], []
    # The longest first: others that lie within are drawn over it, and each is seen.
    lengths = windows.assign(length=windows["end_s"] - windows["start_s"]).sort_values("length", ascending=False)
    for row in lengths.to_dict("records"):
        start, end = float(row["start_s"]), float(row["end_s"])
        width = max(100 * (end - start) / span, MIN_WIDTH)
        verdict = plain(row["verdict"])
        text = f"{verdict}: {plain(row['role'])}, {_window(start, end)}, {number(int(row['calls']))} calls"
        told.append(text)
        kind = _COLOURS.get(str(row["verdict"]), "transfer")
        at = min(100 * start / span, 100 - width)
        parts.append(Part(text, kind, seconds(float(row["union_s"])), "", round(at, 3), round(width, 3)))
    return Bar(name, parts, seconds(float(windows["union_s"].sum())), "; ".join(told[:8]))


def _verdicts(windows: pd.DataFrame, names: Mapping[int, str]) -> list[VerdictRow]:
    """Those that cost time first."""
    order = {verdict: at for at, verdict in enumerate(dict.fromkeys([WITHIN_STEP, *MEANING]))}
    rows = []
    for verdict, group in sorted(
        ((str(name), group) for name, group in windows.groupby("verdict")), key=lambda item: order.get(item[0], 99)
    ):
        by_rank = group.groupby("rank")["union_s"].sum()
        rows.append(
            VerdictRow(
                plain(verdict),
                _COLOURS.get(str(verdict), "transfer"),
                MEANING.get(str(verdict), ""),
                _whose(group["role"], rank_list(group["rank"], names)),
                number(int(group["calls"].sum())),
                seconds(float(by_rank.max())),
                _window(float(group["start_s"].min()), float(group["end_s"].max())),
            )
        )
    return rows


def _window(start_s: float, end_s: float) -> str:
    digits = 0 if end_s - start_s >= 10 else 2
    return f"{start_s:.{digits}f} s to {end_s:.{digits}f} s"
