"""Which colour each kind of time has. The colours themselves are variables of ``assets/report.css``, light and dark."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.study import Study
from hpcmm.analysis.trace import OTHER
from hpcmm.annotate.schema import PHASES
from hpcmm.page.headlines import percent, plain, rank_name, seconds

EXTRA = 6
"""Colours for phases that are none of the usual; with more phases than that they repeat."""
WAIT, TRANSFER = "wait", "transfer"


def ordered(phases: Iterable[str]) -> list[str]:
    """The usual phases in their order, then any other by name, then what no phase covers."""
    seen = set(phases)
    usual = [name for name in PHASES if name in seen]
    return [*usual, *sorted(seen - {*PHASES, OTHER}), *([OTHER] if OTHER in seen else [])]


_GPU_COLOURS = {
    "computation": "forward",
    "communication": "backward",
    "copies": "data",
    "memory sets": "data",
    "idle": OTHER,
}
"""What a GPU does has the colours of its bar."""


def kinds(phases: Sequence[str]) -> list[str]:
    """The colour of each of ``phases``, as :func:`ordered` gives them: ``data``, ``extra-0``, ``other`` ..."""
    found = []
    extra = 0
    for name in phases:
        if name in (*PHASES, OTHER):
            found.append(name)
        elif (colour := _GPU_COLOURS.get(name.partition(":")[0])) is not None:
            found.append(colour)
        else:
            found.append(f"extra-{extra % EXTRA}")
            extra += 1
    return found


MAX_BARS = 64
"""Ranks or devices that are drawn."""
MIN_SHARE = 0.002
"""Parts below this share of the whole are not drawn."""
WAIT_NAME, TRANSFER_NAME = "waiting for other ranks", "communication transfer"

_DEVICE_PARTS = [
    ("computation", "forward"),
    ("computation and communication", "backward"),
    ("exposed communication", TRANSFER),
    ("copies", "data"),
    ("memory sets", "data"),
    ("used by other processes", OTHER),
    ("no records", OTHER),
    ("idle: the host launched too late", WAIT),
    ("idle: other", "other"),
]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar, in percent of the drawing's width; ``kind`` is its colour."""

    name: str
    kind: str
    time: str
    share: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A stacked bar with its text alternative."""

    label: str
    parts: list[Part]
    total: str
    told: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars on one scale; ``legend`` is (name, kind) of all parts, ``left_out`` how many are not drawn: the ``rest``."""

    bars: list[Bar]
    legend: list[tuple[str, str]]
    left_out: int
    rest: str


def step_budget(study: Study) -> Bar | None:
    """What a step consists of, as a mean over ranks: useful work by phase, exposed waiting, exposed transfer."""
    split = _split_by_rank(study)
    return _bar("", list(split.mean().items()), study.steps.mean_s) if len(split) else None


def rank_bars(study: Study) -> BarChart | None:
    """The same for each rank."""
    split = _split_by_rank(study)
    if split.empty:
        return None
    by_wait = split.sort_values(WAIT_NAME, kind="stable")
    # Those that wait least are those that the others wait for.
    drawn = by_wait if len(split) <= MAX_BARS else pd.concat([by_wait.head(MAX_BARS // 2), by_wait.tail(MAX_BARS // 2)])
    drawn = drawn.sort_index()
    whole = float(split.sum(axis=1).max())
    nodes = {trace.rank: trace.node for trace in study.traces}
    bars = [
        _bar(rank_name(int(str(rank)), nodes.get(int(str(rank)), ""), study.names), list(row.items()), whole)
        for rank, row in drawn.iterrows()
    ]
    return BarChart(bars, _legend(bars), len(split) - len(drawn), "they wait neither least nor most")


def device_bars(study: Study) -> BarChart | None:
    """Each GPU's time in its steps (all of it if there are no steps), from table ``gpu``."""
    table = study.tables.get("gpu")
    if table is None or table.empty:
        return None
    steady = table[table["step"].isin(study.steps.numbers)]
    table = steady if len(steady) else table
    keys = ["rank", "node", "pid", "device"]
    sums = table.groupby(keys, dropna=False)[_DEVICE_COLUMNS].sum()
    count = max(table["step"].nunique(), 1)
    sums = sums / count
    drawn = sums.sort_values("idle_s", ascending=False, kind="stable").head(MAX_BARS).sort_index()
    whole = float(sums["span_s"].max())
    bars = []
    for row in drawn.reset_index().to_dict("records"):
        rank, node = int(row["rank"]), plain(row["node"])
        who = rank_name(rank, names={rank: f"process {row['pid']}"} | study.names if rank < 0 else {})
        label = f"{who} · {node}" if who.startswith("GPU ") else f"GPU {plain(row['device'])} of {who} · {node}"
        values = zip((name for name, _ in _DEVICE_PARTS), _device_split(row), strict=True)
        bars.append(_bar(label, list(values), whole))
    return BarChart(bars, _legend(bars), len(sums) - len(drawn), "they idle less")


_DEVICE_COLUMNS = [
    "span_s", "compute_s", "overlap_s", "exposed_comm_s", "idle_s", "idle_host_s", "set_s", "shared_s", "untraced_s",
]  # fmt: skip


def _device_split(row: dict[Hashable, Any]) -> list[float]:
    """Seconds of each of ``_DEVICE_PARTS``, which add up to the span: copies count if nothing else runs."""
    others = [row[name] for name in ("set_s", "shared_s", "untraced_s")]
    copies = row["span_s"] - row["idle_s"] - row["compute_s"] - row["exposed_comm_s"] - sum(others)
    idle = row["idle_s"] - row["idle_host_s"]
    return [
        max(float(value), 0.0)
        for value in (
            row["compute_s"] - row["overlap_s"],
            row["overlap_s"],
            row["exposed_comm_s"],
            copies,
            *others,
            row["idle_host_s"],
            idle,
        )
    ]


def _split_by_rank(study: Study) -> pd.DataFrame:
    """Seconds a step: a row a rank, a column a phase's useful work, then waiting and transfer."""
    phases = study.tables["phases"]
    inside = phases[phases["step"].isin(study.steps.numbers)]
    if inside.empty:
        return pd.DataFrame()
    work = inside.groupby(["rank", "phase"], observed=True)["useful_s"].sum().unstack().fillna(0.0)
    work = work[ordered(work.columns)] / len(study.steps.numbers)
    waits = study.tables["comm_wait"].groupby("rank")[["wait_s_per_step", "transfer_s_per_step"]].sum()
    waits = waits.reindex(work.index, fill_value=0.0).astype(float)
    return work.assign(**{WAIT_NAME: waits["wait_s_per_step"], TRANSFER_NAME: waits["transfer_s_per_step"]})


def _kinds(names: Sequence[str]) -> dict[str, str]:
    phases = [name for name in names if name not in (WAIT_NAME, TRANSFER_NAME)]
    return dict(zip(phases, kinds(phases), strict=True)) | {WAIT_NAME: WAIT, TRANSFER_NAME: TRANSFER}


def _bar(label: str, values: Sequence[tuple[object, float]], whole: float) -> Bar:
    named = [(str(name), float(value)) for name, value in values]
    colours = _kinds([name for name, _ in named]) | dict(_DEVICE_PARTS)
    parts, at = [], 0.0
    for name, value in named:
        width = 100 * value / whole if whole > 0 else 0.0
        if width >= 100 * MIN_SHARE:
            share = percent(value / whole)
            parts.append(Part(plain(name), colours[name], seconds(value), share, round(at, 3), round(width, 3)))
        at += width
    total = seconds(sum(value for _, value in named))
    return Bar(label, parts, total, ", ".join(f"{part.name} {part.time} ({part.share})" for part in parts))


def _legend(bars: Sequence[Bar]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((part.name, part.kind) for bar in bars for part in bar.parts))


WIDTH, HEIGHT = 1000.0, 200.0
"""Units of the drawing, which is stretched to the page."""
MAX_POINTS = 1500
"""More steps than this are drawn as bins: their least, median and largest."""
MAX_LABELS = 10

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepPlot:
    """Paths in units of WIDTH x HEIGHT, tick positions in percent, and the numbers for the viewer."""

    band: str
    line: str
    mean: float | None
    """Percent from the top of the mean without warm-up."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: dict[str, Any]
    told: str


def step_plot(study: Study) -> StepPlot | None:
    """The plot; None without closed steps."""
    table = study.tables["steps"]
    if table.empty:
        return None
    grouped = table.groupby("step")["duration_s"]
    numbers = np.array([int(str(step)) for step in grouped.groups], dtype=np.int64)
    low, middle, high = (grouped.agg(name).to_numpy(np.float64) for name in ("min", "median", "max"))
    numbers, low, middle, high = _binned(numbers, low, middle, high)
    first, last = int(numbers[0]), max(int(numbers[-1]), int(numbers[0]) + 1)
    ticks = _ticks(float(high.max()))
    top = ticks[-1]
    x = (numbers - first) / (last - first) * WIDTH
    mean = study.steps.mean_s
    slowest = int(middle.argmax())
    return StepPlot(
        band=_path(np.append(x, x[::-1]), _y(np.append(high, low[::-1]), top)) + "Z",
        line=_path(x, _y(middle, top)),
        mean=round(100 * (1 - mean / top), 2) if 0 < mean <= top else None,
        x_ticks=[(round(100 * (tick - first) / (last - first), 2), str(tick)) for tick in _whole_ticks(first, last)],
        y_ticks=[(round(100 * (1 - tick / top), 2), seconds(tick)) for tick in ticks],
        points={
            "step": numbers.tolist(),
            "min": _rounded(low),
            "median": _rounded(middle),
            "max": _rounded(high),
            "top": top,
        },
        told=(
            f"Steps {first} to {int(numbers[-1])}: median {seconds(float(np.median(middle)))}, "
            f"slowest {seconds(float(middle[slowest]))} at step {int(numbers[slowest])}."
        ),
    )


def _binned(numbers: npt.NDArray[np.int64], *series: Floats) -> tuple[npt.NDArray[np.int64], Floats, Floats, Floats]:
    low, middle, high = series
    if len(numbers) <= MAX_POINTS:
        return numbers, low, middle, high
    edges = np.linspace(0, len(numbers), MAX_POINTS + 1).astype(np.intp)[:-1]
    medians = np.array([np.median(part) for part in np.split(middle, edges[1:])])
    return numbers[edges], np.minimum.reduceat(low, edges), medians, np.maximum.reduceat(high, edges)


def _y(values: Floats, top: float) -> Floats:
    return HEIGHT * (1 - values / top)


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _rounded(values: Floats) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def _ticks(most: float) -> list[float]:
    """Round values from 0 to at least ``most``."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.9999)
    return [step * index for index in range(math.ceil(most / step * 0.9999) + 1)]


def _whole_ticks(first: int, last: int) -> list[int]:
    raw = max(1.0, (last - first) / MAX_LABELS)
    power = 10 ** math.floor(math.log10(raw))
    step = next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= raw)
    return list(range(-(-first // step) * step, last + 1, step))


GOOD, FAIR = 0.9, 0.8
"""POP calls what is below 0.8 worth a look."""

_TREE: tuple[Any, ...] = (
    ("global_efficiency", "Global efficiency", "parallel efficiency times computation scaling"),
    (
        ("parallel_efficiency", "Parallel efficiency", "useful time of the mean rank over the run time"),
        (
            ("load_balance", "Load balance", "mean over largest useful time"),
            (("load_balance_in_node", "within nodes", "busiest node over busiest rank"),),
            (("load_balance_between_nodes", "between nodes", "mean over busiest node"),),
        ),
        (
            ("communication_efficiency", "Communication efficiency", "largest useful time over the run time"),
            (("serialisation_efficiency", "serialisation", "what waiting for one another leaves"),),
            (("transfer_efficiency", "transfer", "what moving the bytes leaves"),),
        ),
    ),
    (("computation_scaling", "Computation scaling", "useful time of the reference run over this run's"),),
)
PHASE_COLUMNS = ("parallel_efficiency", "load_balance", "communication_efficiency", "transfer_efficiency")


@dataclass(frozen=True, slots=True)
class Node:
    """One efficiency with those it is the product of."""

    name: str
    meaning: str
    text: str
    width: float
    grade: str
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The tree of the run, and a row a phase of (text, grade)."""

    tree: Node
    columns: list[str]
    phases: list[tuple[str, list[tuple[str, str]]]]


def efficiency(study: Study) -> Efficiency | None:
    """None if there is no table, or no row of the whole run."""
    table = study.tables.get("efficiency")
    if table is None or table.empty:
        return None
    run = table[table["scope"] == "run"]
    if run.empty:
        return None
    tree = _node(_TREE, run.iloc[0].to_dict())
    if tree is None:
        return None
    by_phase = {str(row["phase"]): row for row in table[table["scope"] == "phase"].to_dict("records")}
    phases = [
        (plain(name), [_graded(by_phase[name].get(column)) for column in PHASE_COLUMNS]) for name in ordered(by_phase)
    ]
    return Efficiency(tree, [column.replace("_", " ") for column in PHASE_COLUMNS], phases)


def _node(spec: tuple[Any, ...], row: dict[Any, Any]) -> Node | None:
    """The tree below ``spec``; a value that is missing gives way to its first child (no reference run: no scaling)."""
    (column, name, meaning), *below = spec
    children = [node for child in below if (node := _node(child, row)) is not None]
    value = row.get(column)
    if value is None or not _known(value):
        return children[0] if children else None
    text, grade = _graded(value)
    return Node(name, meaning, text, round(min(100 * float(value), 100.0), 2), grade, children)


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _graded(value: Any) -> tuple[str, str]:
    if not _known(value):
        return "", "none"
    return percent(float(value)), "good" if value >= GOOD else "fair" if value >= FAIR else "poor"
