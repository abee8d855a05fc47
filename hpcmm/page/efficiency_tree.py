"""The POP efficiencies of the run as a tree, and of each phase as a row; from table ``efficiency``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import percent, plain
from hpcmm.page.palette import ordered

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
    """None where there is no table, or no row of the whole run."""
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
