"""``report.html``: its charts, the tables that it folds away, and which reports were read."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hpcmm.analysis import report_inventory
from hpcmm.analysis.study import Study
from hpcmm.page.gpu_tables import gpu_tables
from hpcmm.page.headlines import (
    alone_line,
    clock_line,
    coverage_line,
    efficiency_line,
    exchanged_line,
    failed_line,
    gaps,
    gpu_line,
    headline,
    late_line,
    lost_heading,
    mesh_line,
    number,
    percent,
    phases_line,
    plain,
    ranges_line,
    rank_name,
    seconds,
    steps_line,
    throughput_line,
)
from hpcmm.page.step_charts import (
    TRANSFER,
    TRANSFER_NAME,
    WAIT,
    WAIT_NAME,
    device_bars,
    efficiency,
    rank_bars,
    step_budget,
    step_plot,
)
from hpcmm.page.timeline import culprits, timeline, worst_step
from hpcmm.page.wait_charts import bandwidth, child_waits, wait_matrix
from hpcmm.text import visible

MAX_ROWS = 300
"""Rows of a table on the page; the CSV holds all."""


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


def clock(study: Study) -> PageTable:
    """Offset, drift and error of each node."""
    return _table("Clocks", "Each node's clock against the first node's.", study.tables["clock"], "clock")


def folded(study: Study) -> list[PageTable]:
    """The tables at the page's end."""
    tables = study.tables
    osrt = tables["osrt"]
    made = [
        _table("Coverage", "Every expected rank and every report.", tables["coverage"], "coverage"),
        _table("Waiting for communication", "Seconds a step by rank and phase.", tables["comm_wait"], "comm_wait"),
        _table("Start", "From the job's start to its first step, by part.", tables["startup"], "startup"),
        _table("Waits for child processes", "Coalesced into windows.", tables["waitpid_windows"], "waitpid_windows"),
        _table(
            "OS calls of the step threads",
            "Those with the most time within steps first.",
            osrt[osrt["thread_role"] == "step"].sort_values("in_step_s", ascending=False),
            "osrt",
        ),
    ]
    made += [_table(each.title, each.note, each.frame, each.name) for each in gpu_tables(study)]
    return [table for table in made if table.rows]


def _table(title: str, note: str, frame: pd.DataFrame, name: str) -> PageTable:
    columns = [(plain(column), pd.api.types.is_numeric_dtype(kind)) for column, kind in frame.dtypes.items()]
    cells = frame.head(MAX_ROWS).astype(object).itertuples(index=False)
    rows = [[number(value) for value in row] for row in cells]
    return PageTable(title, note, columns, rows, max(0, len(frame) - MAX_ROWS), f"{name}.csv")


_FACTS = (
    steps_line,
    ranges_line,
    mesh_line,
    throughput_line,
    exchanged_line,
    coverage_line,
    efficiency_line,
    failed_line,
    alone_line,
    phases_line,
)
_SCRIPTS = (
    "format", "palette", "unpack", "bitmap", "row", "lanes", "describe", "timeline", "gestures", "step_plot", "start",
)  # fmt: skip
"""Modules of the page's script, each after those that it uses."""


def page(study: Study) -> str:
    """The whole page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = _asset("report.css")
    script = '"use strict";\n' + "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    data = timeline(study)
    bottlenecks = _bottlenecks(study)
    steps = step_plot(study)
    rates, rates_left_out = bandwidth(study)
    drawn: dict[str, Any] = {
        "budget": step_budget(study),
        "bottlenecks": bottlenecks,
        "timeline_lanes": len(data["lanes"]),
        "timeline_legend": _timeline_legend(data),
        "left_out": _left_out(data["left_out"]),
        "steps": steps,
        "matrix": wait_matrix(study),
        "ranks": rank_bars(study),
        "efficiency": efficiency(study),
        "devices": device_bars(study),
        "bandwidth": rates,
        "bandwidth_left_out": rates_left_out,
        "children": child_waits(study),
    }
    text: str = environment.from_string(_asset("report.html.j2")).render(
        title=plain(study.name or "Analysis"),
        headline=headline(study),
        lost_heading=lost_heading(study),
        first=bottlenecks[0] if bottlenecks else None,
        facts=[fact for line in _FACTS if (fact := line(study))],
        gpu_facts=[_capital(fact) for fact in (gpu_line(study), late_line(study)) if fact],
        clock=_capital(clock_line(study)),
        parts=_parts(drawn),
        coverage=coverage_grid(study),
        trust_tables=[clock(study)],
        tables=folded(study),
        timeline=_json(data),
        step_data=_json(steps.points if steps else {}),
        policy=_policy(style, script),
        # These are this package's own files, not data.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        **drawn,
    )
    return text.lstrip()


def _asset(name: str) -> str:
    return (files("hpcmm.page") / "assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing is loaded, and nothing runs but the page's own style and script."""

    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _json(data: Any) -> Markup:
    """JSON that cannot end its script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _parts(drawn: dict[str, Any]) -> list[tuple[str, str]]:
    """(anchor, name) of the page's parts that are there."""
    parts = [
        ("bottlenecks", "Bottlenecks", True),
        ("timeline-section", "Timeline", drawn["timeline_lanes"]),
        ("steps", "Step times", drawn["steps"]),
        ("waiting", "Who waited for whom", drawn["matrix"]),
        ("ranks", "Ranks", drawn["ranks"]),
        ("efficiency", "Efficiency", drawn["efficiency"]),
        ("gpus", "GPUs", drawn["devices"]),
        ("collectives", "Collectives", drawn["bandwidth"]),
        ("children", "Child processes", drawn["children"]),
        ("trust", "Coverage and clocks", True),
        ("tables", "Tables", True),
    ]
    return [(anchor, name) for anchor, name, there in parts if there]


def _bottlenecks(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "order": row["rank_order"],
            "cause": plain(row["cause"]),
            "lost": seconds(float(row["lost_s_per_step"])),
            "share": percent(float(row["step_share"])),
            "width": round(100 * min(float(row["step_share"]), 1.0), 1),
            "who": _who(study, row),
            "phase": plain(row["phase"]),
            "evidence": visible(str(row["evidence"])),
            "confidence": str(row["confidence"]),
            "rows": plain(row.get("evidence_rows") or ""),
            **_suggestion(visible(str(row["suggestion"]))),
            "step": worst_step(study, row),
            "ranks": ",".join(str(rank) for rank in culprits(study, row)),
        }
        for row in study.tables["bottlenecks"].to_dict("records")
    ]


def _suggestion(text: str) -> dict[str, str]:
    """A suggestion is an override or a command, or advice in words, with such after a colon or without."""
    advice, colon, code = text.partition(": ")
    if colon and " " in advice:
        return {"advice": advice + ":", "code": code}
    in_words = " " in text and not set(text) & set("=|/$")
    return {"advice": text, "code": ""} if in_words else {"advice": "", "code": text}


def _who(study: Study, row: dict[Any, Any]) -> str:
    named = culprits(study, row)
    if len(named) == 1:
        return rank_name(named[0], str(row["node"] or ""), study.names)
    return plain(row["node"]) if row["node"] else ""


def _timeline_legend(data: dict[str, Any]) -> list[tuple[str, str]]:
    entries = list(zip(data["phases"], data["kinds"], strict=True))
    return [*entries, (WAIT_NAME, WAIT), (TRANSFER_NAME, TRANSFER)] if data["collectives"] else entries


def _left_out(counts: dict[str, int]) -> list[str]:
    return [f"The {count:,} shortest {what} are not drawn." for what, count in counts.items() if count]


MAX_TILES = 2048
MAX_TROUBLES = 50
_GRADES = {
    report_inventory.FOUND: "good",
    report_inventory.NOT_PROFILED: "none",
    report_inventory.TRUNCATED: "fair",
    report_inventory.NEWER_NSYS: "fair",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the coverage table: ``grade`` is its colour, ``mark`` the same in a character."""

    grade: str
    mark: str
    title: str


@dataclass(frozen=True, slots=True)
class CoverageGrid:
    """A tile a row, the rows that something is wrong with as (who, status, reason), and how many more there are."""

    tiles: list[Tile]
    troubles: list[tuple[str, str, str]]
    more_troubles: int
    statuses: list[tuple[str, str, str]]
    """(grade, status, count)."""


def coverage_grid(study: Study) -> CoverageGrid:
    """The inventory of reports as tiles and sentences."""
    table = study.tables["coverage"]
    records = table.to_dict("records")
    troubles = gaps(table)
    counts = table["status"].value_counts()
    return CoverageGrid(
        tiles=[_tile(row) for row in records[:MAX_TILES]],
        troubles=troubles[:MAX_TROUBLES],
        more_troubles=max(0, len(troubles) - MAX_TROUBLES),
        statuses=[
            (_grade(str(status)), str(status).replace("_", " "), number(int(count))) for status, count in counts.items()
        ],
    )


def _grade(status: str) -> str:
    return _GRADES.get(status, "poor")


def _tile(row: dict[object, object]) -> Tile:
    grade = _grade(str(row["status"]))
    mark = {"good": "", "none": "-", "fair": "~", "poor": "x"}[grade]
    reason = f": {plain(row['reason'])}" if row["reason"] else ""
    return Tile(grade, mark, f"{_whose(row)}: {_status(row)}{reason}")


def _whose(row: dict[object, object]) -> str:
    rank = row["rank"]
    if isinstance(rank, int) and rank >= 0 and not pd.isna(rank):
        return rank_name(rank, str(row["node"] or ""))
    return plain(row["report"])


def _status(row: dict[object, object]) -> str:
    return plain(row["status"]).replace("_", " ")
