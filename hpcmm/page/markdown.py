"""``summary.md``: the verdict, short enough for a ticket."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hpcmm.analysis import report_inventory
from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import (
    clock_line,
    coverage_line,
    efficiency_line,
    gpu_line,
    headline,
    late_line,
    number,
    percent,
    phases_line,
    plain,
    seconds,
    steps_line,
)

MAX_GAPS = 10


def summary(study: Study) -> str:
    """The whole document."""
    rows = study.tables["bottlenecks"]
    facts = [steps_line(study), coverage_line(study), efficiency_line(study), clock_line(study)]
    facts += [phases_line(study), gpu_line(study), late_line(study)]
    parts = [f"# {escape(study.name or 'Analysis')}", f"**{escape(headline(study))}**"]
    if len(rows):
        first = rows.iloc[0]
        parts.append(f"Why: {escape(first['evidence'])}. Try: {code(first['suggestion'])}")
    parts.append("\n".join(f"- {escape(fact)}" for fact in facts if fact))
    if len(rows):
        parts.append(_bottlenecks(rows))
    gaps = study.tables["coverage"]
    gaps = gaps[gaps["status"] != report_inventory.FOUND]
    if len(gaps):
        parts += ["Reports that are not there, or not whole:", table(gaps[["rank", "status", "reason"]].head(MAX_GAPS))]
    parts.append("All tables and the timeline: report.html beside this file.")
    return "\n\n".join(parts) + "\n"


def _bottlenecks(rows: pd.DataFrame) -> str:
    lines = [
        _line(["#", "cause", "lost a step", "share", "rank", "node", "phase", "confidence", "try"]),
        _line(["---:", "---", "---:", "---:", "---:", "---", "---", "---", "---"]),
    ]
    for row in rows.to_dict("records"):
        lost, share = seconds(float(row["lost_s_per_step"])), percent(float(row["step_share"]))
        names = [escape(number(row[key])) for key in ("rank", "node", "phase", "confidence")]
        order, cause = str(row["rank_order"]), escape(row["cause"])
        lines.append(_line([order, cause, lost, share, *names, code(row["suggestion"])]))
    return "\n".join(lines)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table, or a word where there are no rows."""
    if frame.empty:
        return "None."
    header = _line([escape(column) for column in frame.columns])
    rule = _line(["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in frame.dtypes])
    body = [_line([escape(number(value)) for value in row]) for row in frame.astype(object).itertuples(index=False)]
    return "\n".join([header, rule, *body])


def escape(text: object) -> str:
    """``text`` as Markdown that renders as itself: no markup, no HTML, no table cell ends."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*[]|_~#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def code(text: object) -> str:
    """``text`` as inline code, or escaped where it holds what code or a table cell cannot."""
    shown = plain(text)
    return escape(shown) if set(shown) & set("`|<>&\\") else f"`{shown}`"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
