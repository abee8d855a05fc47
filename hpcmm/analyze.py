"""``python -m hpcmm.analyze``: from the nsys reports of a run to tables that say where its time went."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hpcmm.analysis.study import Study, study
from hpcmm.errors import HpcmmError
from hpcmm.page.terminal import print_study, progress_bar
from hpcmm.page.write import write_outputs
from hpcmm.reports.find import find_reports
from hpcmm.reports.load import Progress
from hpcmm.reports.run_record import read_run_record

ALL_READ, NOTHING_USABLE, PARTIAL = 0, 1, 2

DESCRIPTION = """\
Read the Nsight Systems reports of a run and say how many seconds a step loses, to what, and because of which rank.

PATH is a run directory of hpcmm, a folder of reports, or any number of report files: .nsys-rep, .qdstrm (what a
killed capture leaves) or .sqlite exports, made by hpcmm or not. Inputs are only read. Tables (CSV), summary.md and
report.html go to RUN_DIR/analysis, or to DIR.
"""
EPILOG = """\
exit status: 0 every report was read; 2 some were missing or damaged, the rest was analysed; 1 nothing was usable.
docs/tables.md explains every column, docs/bottlenecks.md every verdict.
"""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What ``analyze`` found: the tables by name, where they lie, and the exit status of the command."""

    tables: dict[str, pd.DataFrame]
    out: Path
    exit_status: int
    study: Study


def analyze(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    keep_cache: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse the reports under ``paths`` and write tables and page to ``out`` (default: the run's ``analysis``).

    Raises HpcmmError when nothing there is usable.
    """
    found = find_reports([Path(path) for path in paths])
    run_dir = found.run_dir
    if not found.sources and run_dir is None:
        raise HpcmmError(f"no nsys reports in {', '.join(map(str, paths))}: give a run directory or report files.")
    folder = Path(out) if out is not None else run_dir.analysis if run_dir is not None else Path("analysis")
    result = study(
        found.sources,
        read_run_record(run_dir),
        folder / "cache",
        progress or (lambda _what, _done, _of: None),
        keep_cache=keep_cache,
    )
    write_outputs(result, folder)
    return Analysis(result.tables, folder, ALL_READ if result.complete else PARTIAL, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hpcmm.analyze",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directory or nsys reports")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for tables and page")
    parser.add_argument(
        "--keep-cache",
        action="store_true",
        help="keep the SQLite exports in DIR/cache: faster next time, but they hold the ranks' whole environment",
    )
    options = parser.parse_args(arguments)
    try:
        with progress_bar() as progress:
            analysis = analyze(options.paths, options.out, keep_cache=options.keep_cache, progress=progress)
    except (HpcmmError, OSError) as error:
        print(f"hpcmm.analyze: {error}", file=sys.stderr)
        return NOTHING_USABLE
    print_study(analysis.study, analysis.out)
    return analysis.exit_status


if __name__ == "__main__":
    sys.exit(main())
