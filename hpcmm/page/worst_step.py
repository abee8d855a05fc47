"""The step in which a bottleneck shows best: where the page's timeline goes when its row is chosen."""

from __future__ import annotations

from typing import Any

import pandas as pd

from hpcmm.analysis.findings import CAUSES
from hpcmm.analysis.pipeline import Study


def worst_step(study: Study, row: dict[Any, Any]) -> int | None:
    """Of a row of ``bottlenecks``: its own column ``worst_step`` where it has one, else the step with the most of it.

    For a rank or node that is its excess over the median of the others in the row's phases; for transfer and waiting
    the largest sum over ranks; else the largest mean over ranks.
    """
    given = row.get("worst_step")
    if given is not None and not pd.isna(given):
        return int(given)
    phases = [name for name in str(row["phase"] or "").split(", ") if name]
    lost = _loss_by_step(study, row, phases)
    lost = lost[lost.index.isin(study.steps.numbers)].dropna()
    if lost.empty or float(lost.max()) <= 0:
        lost = _durations(study, []).mean(axis=1)
        lost = lost[lost.index.isin(study.steps.numbers)].dropna()
    return int(str(lost.idxmax())) if len(lost) else None


def culprits(study: Study, row: dict[Any, Any]) -> list[int]:
    """Ranks that a row of ``bottlenecks`` is about; none where it blames nobody."""
    if not pd.isna(row["rank"]):
        return [int(row["rank"])]
    return [trace.rank for trace in study.traces if row["node"] and trace.node == row["node"]]


def _loss_by_step(study: Study, row: dict[Any, Any], phases: list[str]) -> pd.Series[float]:
    own = culprits(study, row)
    if own:
        durations = _durations(study, phases)
        mine = durations[[rank for rank in own if rank in durations]].mean(axis=1)
        others = durations.drop(columns=own, errors="ignore").median(axis=1)
        return mine - others.fillna(0.0)
    column = {CAUSES["transfer"]: "exposed_transfer_s", CAUSES["imbalance"]: "exposed_wait_s"}.get(str(row["cause"]))
    if column is None and str(row["cause"]).startswith("communication"):
        column = "exposed_transfer_s"
    if column is None:
        return _durations(study, phases).mean(axis=1)
    table = study.tables["collectives"]
    chosen = table[table["phase"].isin(phases)] if phases else table
    return chosen.groupby("step")[column].sum()


def _durations(study: Study, phases: list[str]) -> pd.DataFrame:
    """Seconds by step (row) and rank (column): in ``phases``, or of the whole step where none of them is a phase."""
    table = study.tables["phases"]
    chosen = table[table["phase"].isin(phases) & table["step"].notna()]
    if chosen.empty:
        return study.tables["steps"].pivot_table(index="step", columns="rank", values="duration_s", aggfunc="sum")
    return chosen.pivot_table(index="step", columns="rank", values="duration_s", aggfunc="sum", fill_value=0.0)
