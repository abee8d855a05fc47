"""What ``python -m hpcmm.analyze`` prints: rich on a terminal, one plain line a row elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hpcmm.analysis.compare import BETTER, MIN_CHANGE, NO_DIFFERENCE, SECONDS, TOO_FEW, WORSE, Comparison
from hpcmm.analysis.statistics import LEVEL
from hpcmm.analysis.study import Study
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
    percent,
    phases_line,
    plain,
    ranges_line,
    rank_name,
    seconds,
    startup_line,
    steps_line,
    throughput_line,
)
from hpcmm.text import printable, visible

TABLE_WIDTH = 100
"""A narrower terminal gets a few lines for each bottleneck instead of a table."""
MAX_GAPS = 20
_STYLES = {"high": "bold red", "medium": "yellow", "low": "dim"}


def print_study(study: Study, out: Path, console: Console | None = None) -> None:
    """Verdict, bottlenecks, and what is missing; the page's path last."""
    console = console or _standard_output()
    rich = console.is_terminal and not console.is_dumb_terminal
    rows = study.tables["bottlenecks"].to_dict("records")
    _line(console, headline(study), "bold", rich=rich)
    if rows:
        _line(console, f"Evidence: {visible(rows[0]['evidence'])}.", "dim", rich=rich)
        _line(console, f"Try: {visible(rows[0]['suggestion'])}", "bold green", rich=rich)
        console.print()
        heading = lost_heading(study)
        if not rich:
            _print_plain(console, rows, study.names, heading)
        elif console.width < TABLE_WIDTH:
            _print_stacked(console, rows, study.names, heading)
        else:
            console.print(_table(rows, study.names, heading))
        console.print()
    facts = [steps_line(study), mesh_line(study), coverage_line(study), efficiency_line(study)]
    _line(console, "; ".join(fact for fact in facts if fact) + ".", "", rich=rich)
    if len(study.tables["clock"]) > 1:
        _line(console, f"{clock_line(study)[:1].upper()}{clock_line(study)[1:]}.", "", rich=rich)
    lines = (
        ranges_line,
        throughput_line,
        exchanged_line,
        failed_line,
        alone_line,
        phases_line,
        gpu_line,
        late_line,
        startup_line,
    )
    for told in filter(None, (line(study) for line in lines)):
        _line(console, f"{told[:1].upper()}{told[1:]}.", "", rich=rich)
    for gap in _gaps(study.tables["coverage"]):
        _line(console, f"  {gap}", "yellow", rich=rich)
    console.print(Text(f"Report: {printable(str(out / 'report.html'))}"), soft_wrap=True)


def _standard_output() -> Console:
    """Standard output, where a locale without Unicode must cost a character, not the result."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def _line(console: Console, text: str, style: str, *, rich: bool) -> None:
    """A sentence; if nobody looks at the width, it stays one line."""
    console.print(Text(text, style=style if rich else ""), soft_wrap=not rich)


def _who(row: dict[Any, Any], names: Mapping[int, str]) -> str:
    if pd.isna(row["rank"]):
        return plain(row["node"]) or "-"
    on = f" on {plain(row['node'])}" if row["node"] else ""
    return f"{rank_name(int(row['rank']), names=names)}{on}"


MAX_PHASE = 40
"""Characters of a phase's name in a table; the files have all of them."""


def _phase(row: dict[Any, Any]) -> str:
    """The phase, or phases, of a row, shortened in the middle."""
    names = plain(row["phase"]).split(", ")
    short = [f"{each[:24]}...{each[-13:]}" if len(each) > MAX_PHASE else each for each in names]
    return ", ".join(short) or "-"


def _table(rows: list[dict[Any, Any]], names: Mapping[int, str], lost_heading: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("cause", overflow="fold")
    table.add_column(lost_heading, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("who", overflow="fold")
    table.add_column("phase", overflow="fold")
    table.add_column("sure", no_wrap=True)
    table.add_column("try", overflow="fold")
    for row in rows:
        table.add_row(
            str(row["rank_order"]),
            Text(plain(row["cause"]), style=_STYLES.get(str(row["confidence"]), "")),
            seconds(float(row["lost_s_per_step"])),
            percent(float(row["step_share"])),
            Text(_who(row, names)),
            Text(_phase(row)),
            plain(row["confidence"]),
            Text(plain(row["suggestion"]), style="green"),
        )
    return table


def _print_stacked(console: Console, rows: list[dict[Any, Any]], names: Mapping[int, str], lost_heading: str) -> None:
    each = lost_heading.removeprefix("lost")
    for row in rows:
        where = ", ".join(part for part in (_who(row, names), _phase(row)) if part and part != "-")
        style = _STYLES.get(str(row["confidence"]), "")
        cause = Text.assemble(f"{row['rank_order']}. ", (plain(row["cause"]), style), f" ({where})" if where else "")
        lost = f"{seconds(float(row['lost_s_per_step']))}{each}, {percent(float(row['step_share']))}"
        console.print(cause)
        console.print(Padding(Text(f"{lost}, confidence {plain(row['confidence'])}"), (0, 0, 0, 3)))
        console.print(Padding(Text.assemble("try ", (plain(row["suggestion"]), "green")), (0, 0, 0, 3)))


def _print_plain(console: Console, rows: list[dict[Any, Any]], names: Mapping[int, str], lost_heading: str) -> None:
    """Columns of words and spaces, one line a row whatever its width: for files, pipes and grep."""
    lines = [("#", lost_heading, "share", "cause", "who", "phase", "sure", "try")]
    lines += [
        (
            str(row["rank_order"]),
            seconds(float(row["lost_s_per_step"])),
            percent(float(row["step_share"])),
            plain(row["cause"]),
            _who(row, names),
            _phase(row),
            plain(row["confidence"]),
            plain(row["suggestion"]),
        )
        for row in rows
    ]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=False)]
        console.print(Text("  ".join([*cells, line[-1]])), soft_wrap=True)


def _gaps(coverage: pd.DataFrame) -> list[str]:
    """One line for each report, or ranks without one, that something is wrong with."""
    troubles = gaps(coverage)
    told = [": ".join(parts) for parts in troubles[:MAX_GAPS]]
    if len(troubles) > MAX_GAPS:
        told.append(f"and {len(troubles) - MAX_GAPS} more: see coverage.csv")
    return told


_VERDICT_STYLES = {BETTER: "bold green", WORSE: "bold red", NO_DIFFERENCE: "dim", TOO_FEW: "yellow"}
HEADER = ("what", "A", "B", "change", "interval", "verdict")
MAX_NOTES = 30


def comparison_headline(comparison: Comparison) -> str:
    """The verdict on the step time, in one sentence."""
    step = comparison.table.iloc[0]
    verdict = str(step["verdict"])
    times = f"{_milliseconds(step['run_a'])} in A, {_milliseconds(step['run_b'])} in B"
    if verdict == TOO_FEW:
        return f"Too few steps to tell a difference from noise: a step takes {times}."
    if verdict == NO_DIFFERENCE:
        changed = comparison.table["verdict"].isin([BETTER, WORSE]).sum()
        rest = f"; {changed} of its parts did change" if changed else ""
        return f"No difference seen in {step['metric']}: {times}{rest}."
    interval = f"{percent(_share(step, 'low'))} to {percent(_share(step, 'high'))}"
    return f"Steps are {'shorter' if verdict == BETTER else 'longer'} in B: {times} ({interval})."


def print_comparison(comparison: Comparison, out: Path, console: Console | None = None) -> None:
    """Verdict, table, and how the runs themselves differ; the table's path last."""
    console = console or Console(highlight=False)
    rich = console.is_terminal and not console.is_dumb_terminal

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style if rich else ""), soft_wrap=not rich)

    say(comparison_headline(comparison), "bold")
    say(f"A is {plain(comparison.name_a)}, B is {plain(comparison.name_b)}.", "dim")
    console.print()
    lines = [_cells(row) for row in comparison.table.to_dict("records")]
    if rich:
        console.print(_comparison_table(lines))
    else:
        for line in _aligned([HEADER, *lines]):
            say(line)
    console.print()
    say(
        f"The intervals hold for all rows together in {LEVEL:.0%} of comparisons. They know the noise of the steps, "
        f"not what differs between days or nodes, so changes below {MIN_CHANGE:.0%} of a step count as none."
    )
    for note in comparison.notes[:MAX_NOTES]:
        say(f"  {plain(note)}", "yellow")
    if len(comparison.notes) > MAX_NOTES:
        say(f"  and {len(comparison.notes) - MAX_NOTES} more keys differ", "yellow")
    console.print(Text(f"Table: {printable(str(out / 'compare.csv'))}"), soft_wrap=True)


def _cells(row: dict[Any, Any]) -> tuple[str, ...]:
    show = _milliseconds if row["unit"] == SECONDS else _ratio
    known = not math.isnan(row["low"])
    interval = f"{show(row['low'], signed=True)} .. {show(row['high'], signed=True)}" if known else ""
    numbers = (show(row["run_a"]), show(row["run_b"]), show(row["change"], signed=True), interval)
    return (_what(row), *numbers, str(row["verdict"]))


def _comparison_table(lines: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        is_text = name in {HEADER[0], HEADER[-1]}
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != HEADER[0], overflow="fold")
    for *cells, verdict in lines:
        table.add_row(*(Text(cell) for cell in cells), Text(verdict, style=_VERDICT_STYLES[verdict]))
    return table


def _aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of words and spaces, one line a row: for files and pipes."""
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(HEADER))]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _what(row: dict[Any, Any]) -> str:
    if row["kind"] == "phase":
        return f"{plain(row['metric'])} in {plain(row['phase'])}"
    if row["kind"] != "bottleneck":
        return plain(row["metric"])
    who = f"node {plain(row['node'])}" if pd.isna(row["rank"]) else rank_name(int(row["rank"]))
    return f"delays by {who}: {plain(row['metric'])}" + (f" in {plain(row['phase'])}" if row["phase"] else "")


def _share(row: Any, column: str) -> float:
    """``column`` as a share of run A's step, without its sign."""
    return abs(float(row[column]) / float(row["run_a"]))


def _milliseconds(value: float, *, signed: bool = False) -> str:
    return f"{value * 1e3:+.2f} ms" if signed else f"{value * 1e3:.2f} ms"


def _ratio(value: float, *, signed: bool = False) -> str:
    return f"{value:+.3f}" if signed else f"{value:.3f}"
