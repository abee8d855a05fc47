"""``report.html``: one self-contained page, no network; everything that a report says is escaped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hpcmm.analysis.phases import OTHER
from hpcmm.analysis.study import Study
from hpcmm.annotate.names import PHASES
from hpcmm.page.timeline import timeline
from hpcmm.page.verdict import clock_line, coverage_line, headline, number, percent, plain, seconds, steps_line

MAX_ROWS = 400
"""Rows of a table on the page; the CSV holds all."""
MAX_MATRIX = 64
"""Ranks of the wait matrix on the page."""


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table as the template draws it."""

    title: str
    note: str
    columns: list[tuple[str, bool]]
    """Name, and whether its cells are numbers."""
    rows: list[list[str]]
    left_out: int
    file: str
    open: bool = False


def page(study: Study) -> str:
    """The whole page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("hpcmm.page")
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=plain(study.name or "Analysis"),
        headline=headline(study),
        facts=[steps_line(study), coverage_line(study), clock_line(study)],
        budget=_budget(study),
        bottlenecks=_bottlenecks(study),
        timeline=_json(timeline(study)),
        step_times=_json(_step_times(study)),
        matrix=_matrix(study),
        tables=_tables(study),
        # These are this package's own files, not data.
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704
        viewer=Markup((folder / "viewer.js").read_text(encoding="utf-8")),  # noqa: S704
        charts=Markup((folder / "charts.js").read_text(encoding="utf-8")),  # noqa: S704
    )


def _json(data: Any) -> Markup:
    """JSON that cannot end its script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704


def _bottlenecks(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "order": row["rank_order"],
            "cause": plain(row["cause"]),
            "lost": seconds(float(row["lost_s_per_step"])),
            "share": percent(float(row["step_share"])),
            "width": round(100 * min(float(row["step_share"]), 1.0), 1),
            "rank": number(row["rank"]),
            "node": plain(row["node"]),
            "phase": plain(row["phase"]),
            "evidence": plain(row["evidence"]),
            "confidence": str(row["confidence"]),
            "suggestion": plain(row["suggestion"]),
        }
        for row in study.tables["bottlenecks"].to_dict("records")
    ]


def _budget(study: Study) -> list[dict[str, Any]]:
    """What a step consists of, as a mean over ranks: useful work, exposed transfer, exposed waiting."""
    phases = study.tables["phases"]
    inside = phases[phases["step"].isin(study.steps.numbers)]
    if inside.empty or not study.steps.mean_s:
        return []
    waits = study.tables["comm_wait"]
    ranks = inside["rank"].nunique()
    wait = float(waits["wait_s_per_step"].sum()) / ranks
    transfer = float(waits["transfer_s_per_step"].sum()) / ranks
    useful = inside.groupby("phase")["useful_s"].sum() / ranks / len(study.steps.numbers)
    order = [*PHASES, *sorted(set(useful.index) - {*PHASES, OTHER}), OTHER]
    parts = [(str(phase), float(useful[phase]), "work") for phase in order if phase in useful.index]
    parts += [("waiting for other ranks", wait, "wait"), ("communication transfer", transfer, "transfer")]
    return [
        {"name": plain(name), "kind": kind, "time": seconds(value), "share": round(100 * value / study.steps.mean_s, 1)}
        for name, value, kind in parts
        if value > 0.002 * study.steps.mean_s
    ]


def _step_times(study: Study) -> dict[str, Any]:
    """Median, least and largest duration over ranks by step."""
    table = study.tables["steps"]
    grouped = table.groupby("step")["duration_s"].agg(["min", "median", "max"]) if len(table) else pd.DataFrame()
    if grouped.empty:
        return {"step": [], "min": [], "median": [], "max": []}
    data: dict[str, Any] = {
        name: [round(float(value), 6) for value in grouped[name]] for name in ("min", "median", "max")
    }
    data["step"] = [int(step) for step in grouped.index]
    return data


def _matrix(study: Study) -> dict[str, Any] | None:
    """Who waited for whom, in milliseconds a step, with a shade from 0 to 1 for each cell."""
    values = study.wait_matrix * 1e3
    if values.size == 0 or len(values) > MAX_MATRIX or not np.any(values > 0):
        return None
    largest = float(values.max())
    ranks = [trace.rank for trace in study.traces]
    rows = [
        {
            "rank": rank,
            "cells": [
                {"text": f"{value:.1f}" if value >= 0.05 else "", "shade": round(value / largest, 3)} for value in row
            ],
        }
        for rank, row in zip(ranks, values.tolist(), strict=True)
    ]
    return {"ranks": ranks, "rows": rows}


def _tables(study: Study) -> list[PageTable]:
    tables = study.tables
    return [
        _table(
            "Coverage",
            "Every expected rank and every report, and what became of it.",
            tables["coverage"],
            "coverage",
            shown=True,
        ),
        _table(
            "Waiting for communication",
            "Seconds a step by rank and phase, warm-up left out.",
            tables["comm_wait"],
            "comm_wait",
        ),
        _table(
            "Waits for child processes",
            "Calls of the waitpid family, coalesced.",
            tables["waitpid_windows"],
            "waitpid_windows",
        ),
        _table("Clocks", "Each node's clock against the first node's.", tables["clock"], "clock"),
        _table(
            "OS runtime calls of the step threads",
            "Longest first; time within steps is what matters.",
            tables["osrt"][tables["osrt"]["thread_role"] == "step"].sort_values("in_step_s", ascending=False),
            "osrt",
        ),
    ]


def _table(title: str, note: str, frame: pd.DataFrame, name: str, *, shown: bool = False) -> PageTable:
    columns = [(str(column), pd.api.types.is_numeric_dtype(kind)) for column, kind in frame.dtypes.items()]
    cells = frame.head(MAX_ROWS).astype(object).itertuples(index=False)
    rows = [[number(value) for value in row] for row in cells]
    return PageTable(title, note, columns, rows, max(0, len(frame) - MAX_ROWS), f"{name}.csv", shown)
