"""What ``python -m hpcmm.analyze`` prints: rich on a terminal, plain text of full width elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from hpcmm.analysis.study import Study
from hpcmm.page.verdict import clock_line, coverage_line, headline, number, percent, plain, steps_line
from hpcmm.reports import load

PLAIN_WIDTH = 200
"""Columns of the output into a file or pipe, where nothing may be cut."""


@contextmanager
def progress_bar() -> Iterator[load.Progress]:
    """A progress callback that draws on standard error, when that is a terminal; else one that does nothing."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _of: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, of: int) -> None:
            bar.update(task, description=plain(what), completed=done, total=of)

        yield show


def print_study(study: Study, out: Path, console: Console | None = None) -> None:
    """Verdict, bottlenecks, and what is missing; the page's path last."""
    console = console or _console()
    console.print(Text(headline(study), style="bold"))
    table = study.tables["bottlenecks"]
    if len(table):
        console.print(Text(f"Evidence: {plain(table.iloc[0]['evidence'])}.", style="dim"))
        console.print(Text.assemble("Try: ", (plain(table.iloc[0]["suggestion"]), "bold green")))
    console.print()
    if len(table):
        console.print(_bottlenecks(table, plain_text=not console.is_terminal))
    lines = [steps_line(study), coverage_line(study)]
    console.print(Text("; ".join(lines) + "."))
    if len(study.tables["clock"]) > 1:
        console.print(Text(f"{clock_line(study)[:1].upper()}{clock_line(study)[1:]}."))
    _print_gaps(console, study.tables["coverage"])
    console.print(Text(f"Report: {out / 'report.html'}"), soft_wrap=True)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, color_system=None, force_terminal=False)


def _bottlenecks(rows: pd.DataFrame, *, plain_text: bool) -> Table:
    table = Table(box=box.ASCII2 if plain_text else box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("cause", overflow="fold")
    table.add_column("lost s/step", justify="right", no_wrap=True)
    table.add_column("of step", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("node", overflow="fold")
    table.add_column("phase", overflow="fold")
    table.add_column("sure", no_wrap=True)
    table.add_column("try", overflow="fold", min_width=20)
    styles = {"high": "bold red", "medium": "yellow", "low": "dim"}
    for row in rows.to_dict("records"):
        table.add_row(
            str(row["rank_order"]),
            Text(plain(row["cause"]), style=styles.get(str(row["confidence"]), "")),
            f"{row['lost_s_per_step']:.4f}",
            percent(float(row["step_share"])),
            number(row["rank"]) or "-",
            Text(plain(row["node"]) or "-"),
            Text(plain(row["phase"]) or "-"),
            str(row["confidence"]),
            Text(plain(row["suggestion"]), style="green"),
        )
    return table


def _print_gaps(console: Console, coverage: pd.DataFrame) -> None:
    """One line for each rank or report that something is wrong with."""
    troubled = coverage[(coverage["reason"] != "") & (coverage["status"] != "not_profiled")]
    for row in troubled.head(20).to_dict("records"):
        who = f"rank {row['rank']}" if pd.notna(row["rank"]) and int(row["rank"]) >= 0 else plain(row["report"])
        console.print(Text(f"  {who}: {row['status']}: {plain(row['reason'])}", style="yellow"))
    if len(troubled) > 20:
        console.print(Text(f"  and {len(troubled) - 20} more: see coverage.csv", style="yellow"))
