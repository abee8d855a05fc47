"""A comparison of two runs as a table of files and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcmm.analysis.bootstrap_ci import LEVEL
from hpcmm.analysis.compare import BETTER, MIN_CHANGE, NO_DIFFERENCE, SECONDS, TOO_FEW, WORSE, Comparison
from hpcmm.page.headlines import number, percent, plain
from hpcmm.page.outputs import table_files, write_all

_STYLES = {BETTER: "bold green", WORSE: "bold red", NO_DIFFERENCE: "dim", TOO_FEW: "yellow"}
HEADER = ("what", "A", "B", "change", "interval", "verdict")
MAX_NOTES = 30


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """``compare.csv`` and ``compare.parquet`` into ``folder``. Raises HpcmmError where that cannot be done."""
    write_all(folder, table_files({"compare": comparison.table}))


def headline(comparison: Comparison) -> str:
    """The verdict on the step time, in one sentence."""
    step = comparison.table.iloc[0]
    verdict = str(step["verdict"])
    times = f"{_milliseconds(step['run_a'])} in A, {_milliseconds(step['run_b'])} in B"
    if verdict == TOO_FEW:
        return f"Too few steps to tell a difference from noise: a step takes {times}."
    if verdict == NO_DIFFERENCE:
        changed = comparison.table["verdict"].isin([BETTER, WORSE]).sum()
        rest = f"; {changed} of its parts did change" if changed else ""
        return f"No difference seen in step time: {times}{rest}."
    interval = f"{percent(_share(step, 'low'))} to {percent(_share(step, 'high'))}"
    return f"Steps are {'shorter' if verdict == BETTER else 'longer'} in B: {times} ({interval})."


def print_comparison(comparison: Comparison, out: Path, console: Console | None = None) -> None:
    """Verdict, table, and how the runs themselves differ; the table's path last."""
    console = console or Console(highlight=False)
    rich = console.is_terminal and not console.is_dumb_terminal

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style if rich else ""), soft_wrap=not rich)

    say(headline(comparison), "bold")
    say(f"A is {plain(comparison.name_a)}, B is {plain(comparison.name_b)}.", "dim")
    console.print()
    lines = [_cells(row) for row in comparison.table.to_dict("records")]
    if rich:
        console.print(_table(lines))
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
    console.print(Text(f"Table: {out / 'compare.csv'}"), soft_wrap=True)


def _cells(row: dict[Any, Any]) -> tuple[str, ...]:
    show = _milliseconds if row["unit"] == SECONDS else _ratio
    known = not math.isnan(row["low"])
    interval = f"{show(row['low'], signed=True)} .. {show(row['high'], signed=True)}" if known else ""
    numbers = (show(row["run_a"]), show(row["run_b"]), show(row["change"], signed=True), interval)
    return (_what(row), *numbers, str(row["verdict"]))


def _table(lines: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        is_text = name in {HEADER[0], HEADER[-1]}
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != HEADER[0], overflow="fold")
    for *cells, verdict in lines:
        table.add_row(*(Text(cell) for cell in cells), Text(verdict, style=_STYLES[verdict]))
    return table


def _aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of words and spaces, one line a row: for files and pipes."""
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(HEADER))]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _what(row: dict[Any, Any]) -> str:
    if row["kind"] == "phase":
        return f"useful time in {plain(row['phase'])}"
    if row["kind"] != "bottleneck":
        return plain(row["metric"])
    who = f"rank {number(row['rank'])}" if number(row["rank"]) else f"node {plain(row['node'])}"
    return f"delays by {who}: {plain(row['metric'])}" + (f" in {plain(row['phase'])}" if row["phase"] else "")


def _share(row: Any, column: str) -> float:
    """``column`` as a share of run A's step, without its sign."""
    return abs(float(row[column]) / float(row["run_a"]))


def _milliseconds(value: float, *, signed: bool = False) -> str:
    return f"{value * 1e3:+.2f} ms" if signed else f"{value * 1e3:.2f} ms"


def _ratio(value: float, *, signed: bool = False) -> str:
    return f"{value:+.3f}" if signed else f"{value:.3f}"
