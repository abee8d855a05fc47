"""``summary.md``: the verdict and the small tables, for a merge request or a notebook."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hpcmm.analysis.study import Study
from hpcmm.page.verdict import clock_line, coverage_line, headline, number, plain, steps_line


def summary(study: Study) -> str:
    """The whole document."""
    parts = [
        f"# {escape(study.name or 'Analysis')}",
        f"**{escape(headline(study))}**",
        f"- {escape(steps_line(study))}\n- {escape(coverage_line(study))}\n- {escape(clock_line(study))}",
        "## Bottlenecks",
        table(study.tables["bottlenecks"]),
        "## Coverage",
        table(study.tables["coverage"]),
        "## Waiting for communication",
        table(study.tables["comm_wait"]),
        "## Clocks",
        table(study.tables["clock"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(frame: pd.DataFrame) -> str:
    """A Markdown table, or a word where there are no rows."""
    if frame.empty:
        return "None."
    header = _line([str(column) for column in frame.columns])
    rule = _line(["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in frame.dtypes])
    body = [_line([escape(number(value)) for value in row]) for row in frame.astype(object).itertuples(index=False)]
    return "\n".join([header, rule, *body])


def escape(text: str) -> str:
    """``text`` as Markdown that renders as itself: no markup, no HTML, no table cell ends."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*[]|":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
