"""The command line: ``python -m hpcmm.analyze PATH...`` and ``python -m hpcmm.analyze compare RUN_A RUN_B``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmm.analysis.choice import Choice
from hpcmm.analysis.study import TABLES
from hpcmm.analyze.analysis import ALL_READ, analyze, as_paths, default_folder
from hpcmm.analyze.runs import compare, file_of, read_reference, replaced_in_words, written_before
from hpcmm.cli import progress_bar, run_command
from hpcmm.errors import HpcmmError
from hpcmm.reports.find import Found, find_reports
from hpcmm.resources import resource
from hpcmm.runs.ownership import other_user, refuse_folder_of_others
from hpcmm.text import printable

DESCRIPTION = """\
Read the Nsight Systems reports of a run and say how many seconds a step loses, to what, and because of which rank.

PATH is a run directory of hpcmm (or the name in ./runs of a run, or the start of it, a point of a sweep as SWEEP/0003,
or a job's number such as 12 or 12_3), a folder of reports, or any
number of report files: .nsys-rep, .qdstrm (what a killed capture leaves) or .sqlite exports, made by hpcmm or not.
Inputs are only read.

Into RUN_DIR/analysis go the files below; of reports that are in no run directory into ./analysis, that is, of the
current folder, in place of an earlier analysis there, which is then named; with --out into DIR:
  report.html            the verdicts, a timeline of all ranks, and charts: open it in a browser
  summary.md             the verdicts and the small tables
  trace.json.gz          all ranks on one clock, for ui.perfetto.dev or chrome://tracing
  *.csv and *.parquet    bottlenecks, coverage, phases, collectives, efficiency and the other tables
"""
EPILOG = """\
examples:
  python -m hpcmm.analyze runs/latest
  python -m hpcmm.analyze nsys/*.nsys-rep --out /tmp/analysis
  python -m hpcmm.analyze runs/on_8_nodes --reference runs/on_1_node
  python -m hpcmm.analyze compare runs/before runs/after

exit status: 0 every report was read; 2 some were missing or damaged, the rest was analysed; 1 nothing was usable.
docs/tables.md explains every column, docs/bottlenecks.md every verdict.
"""
COMPARE_DESCRIPTION = """\
Say what got better or worse from RUN_A, the older, to RUN_B: step time, each blamed rank or node, each phase, waiting,
transfer, and the POP efficiencies. A change counts only where it is beyond the noise of both runs' steps, with the
number of comparisons taken into account, and at least 2% of a step. Keys of the configuration that differ are named.

A RUN is a run directory, the name of a run in ./runs, a folder of reports, a report file, or the folder that an
earlier analysis wrote.
The table goes to DIR as compare.csv and compare.parquet; without --out, to the folder of RUN_B's analysis, which is
./analysis if RUN_B is reports that are in no run directory. If a table was there already, that is said.
"""
COMPARE_EPILOG = """\
exit status: 0 compared, whatever the verdicts; 1 a run could not be read or has no steps.
A folder that is itself called "compare" is analysed as ./compare.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.analyze") -> int:
    """The command line; returns the exit status."""

    def command(given: list[str]) -> int:
        return _compare(given[1:], prog) if given[:1] == ["compare"] else _analyze(given, prog)

    return run_command(
        "hpcmm.analyze",
        command,
        arguments,
        errors=(HpcmmError, OSError),
        interrupted="an earlier analysis there is as it was",
        needs_folder=False,
        one_line=True,
    )


def _analyze(arguments: Sequence[str], prog: str) -> int:
    samples = str(resource("profiles/samples")).replace("%", "%%")
    parser = _parser(prog, DESCRIPTION, f"{EPILOG}\nto try it, recorded reports: {samples}/slow_data --out slow_data\n")
    parser.usage = (
        f"{prog} [--out DIR] [--tables NAME,...] [--steps REGEX] [--phases REGEX]\n"
        "           [--from S] [--to S] [--between REGEX] [--reference RUN] [--keep-cache] PATH [PATH ...]\n"
        f"       {prog} compare RUN_A RUN_B [--out DIR]"
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directory or nsys reports")
    parser.add_argument("--out", type=_folder, metavar="DIR", help="folder for tables and page")
    parser.add_argument(
        "--tables",
        type=lambda names: [name.strip() for name in names.split(",")],
        metavar="NAME,...",
        help="write these tables alone, and do no more than they need: osrt alone is fastest",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="RUN",
        help="a smaller run, to which computation scaling and global efficiency are stated (run directory, reports, or "
        "the folder of its analysis)",
    )
    parser.add_argument(
        "--keep-cache",
        action="store_true",
        help="keep the SQLite exports in DIR/cache: faster next time, but they hold the ranks' whole environment",
    )
    _add_choices(parser)
    options = parser.parse_args(arguments)
    choice = Choice(options.steps, options.phases, options.from_s, options.to_s, options.between)
    found = find_reports(as_paths(options.paths))
    folder = _own(default_folder(found)) if options.out is None else _apart_from_inputs(options.out, found)
    before = written_before(folder, options.tables or TABLES) if options.out is None and found.run_dir is None else None
    with progress_bar() as progress:
        reference = read_reference(options.reference, progress=progress) if options.reference is not None else None
        analysis = analyze(
            options.paths,
            folder,
            tables=options.tables,
            reference=reference,
            keep_cache=options.keep_cache,
            progress=progress,
            choice=choice,
        )
    if options.tables is None:
        from hpcmm.page.terminal import print_study  # noqa: PLC0415 -- a table alone needs no page

        print_study(analysis.study, analysis.out)
    else:
        for name, table in analysis.tables.items():
            print(f"{printable(str(folder / name))}.csv: {len(table)} rows")
    if told := replaced_in_words(before, analysis.tables.get("coverage"), folder):
        print(printable(told), file=sys.stderr)
    return analysis.exit_status


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Options for reports of programs that know nothing of hpcmm."""
    ranges = parser.add_argument_group(
        "NVTX ranges of your own, and parts of a run",
        "REGEX stands for the ranges whose whole name it matches; if there are none, for those that it matches in part",
    )
    ranges.add_argument("--steps", default="", metavar="REGEX", help="the ranges that are steps: 'iteration [0-9]+'")
    ranges.add_argument("--phases", default="", metavar="REGEX", help="the ranges within steps that are phases")
    ranges.add_argument("--from", dest="from_s", type=float, metavar="S", help="leave out what came before, in seconds")
    ranges.add_argument("--to", dest="to_s", type=float, metavar="S", help="leave out what came after")
    ranges.add_argument(
        "--between", default="", metavar="REGEX", help="only from the first of these ranges to the end of the last"
    )


def _apart_from_inputs(folder: Path, found: Found) -> Path:
    """``folder``. Raises HpcmmError if it is none that can be written to, or holds reports, which are only read."""
    if folder.exists() and not folder.is_dir():
        raise HpcmmError(f"{folder} is not a folder: name another with --out.")
    inputs = {path.parent.resolve() for source in found.sources for path in source.candidates}
    if folder.resolve() in inputs:
        raise HpcmmError(
            f"{folder} holds the reports, and nothing is written beside them: name another folder with --out."
        )
    refuse_folder_of_others(folder)
    return folder


def _own(folder: Path) -> Path:
    """``folder``, which nobody named. Raises HpcmmError if it, or the run that it lies in, is another user's."""
    for each in (folder, folder.parent if folder.name != str(folder) else folder):
        if (user := other_user(each)) is not None:
            raise HpcmmError(
                f"{each} is another user's ({user}), and nothing is written there: name a folder with --out."
            )
    return folder


def _folder(text: str) -> Path:
    """An option's folder; an empty word, as of a variable that is not set, is none."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no folder")
    return Path(text)


def _compare(arguments: Sequence[str], prog: str) -> int:
    parser = _parser(f"{prog} compare", COMPARE_DESCRIPTION, COMPARE_EPILOG)
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="the older run")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="the newer run")
    parser.add_argument("--out", type=_folder, metavar="DIR", help="folder for compare.csv and compare.parquet")
    options = parser.parse_args(arguments)
    with progress_bar() as progress:
        comparison = compare(options.run_a, options.run_b, progress=progress)
    from hpcmm.page.outputs import write_comparison  # noqa: PLC0415 -- as above
    from hpcmm.page.terminal import print_comparison  # noqa: PLC0415

    folder = options.out or _folder_of(options.run_b)
    refuse_folder_of_others(folder)
    is_replaced = options.out is None and file_of(folder, "compare") is not None
    write_comparison(comparison, folder)
    print_comparison(comparison, folder)
    if is_replaced:
        told = "An earlier comparison's table was there, and is replaced: --out DIR gives each a folder of its own."
        print(told, file=sys.stderr)
    return ALL_READ


def _folder_of(run: Path) -> Path:
    """Where the analysis of ``run`` lies or would lie."""
    if run.is_dir() and file_of(run, "efficiency") is not None:
        return _own(run)
    return _own(default_folder(find_reports(as_paths(run))))


def _parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


if __name__ == "__main__":
    sys.exit(main())
