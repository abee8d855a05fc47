"""How long the analysis of large reports takes, and how much memory, beside the installed nsys.

    python benchmarks/analysis.py [--repeats 5] [--parts report,projection,curve] [--curve 1,4,16,64] [--out FILE]
        [--json FILE]

Makes reports of a made-up run in a temporary folder (1.6 GB for the whole curve), runs ours and the rivals by turns,
each in a fresh process, and prints Markdown tables of medians.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import measuring
import psutil
from measuring import Row, ratio, summary
from synthetic import RunShape, write_run

ROOT = Path(__file__).resolve().parents[1]
LARGE = RunShape(osrt_rows=2_000_000, threads=64, nvtx_ranges=200_000)
OF_CURVE = RunShape(ranks=64, osrt_rows=500_000, threads=64, nvtx_ranges=50_000)
GPU = RunShape(osrt_rows=0, nvtx_ranges=200_000, collectives_per_step=0, kernels=300_000)
RIVAL_LIMIT_S = 120
SAMPLE_S = 0.02

OSRT_ALONE = (
    "import sys; from hpcmm.analyze import analyze; "
    "analyze(sys.argv[1], tables=['osrt']).osrt().to_csv(sys.argv[2], index=False)"
)
SQL_GROUPS = (
    "SELECT value, COUNT(*), SUM(end - start), AVG(end - start), MIN(end - start), MAX(end - start) FROM OSRT_API "
    "JOIN StringIds ON id = nameId GROUP BY nameId"
)
IN_SQL = f"import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute({SQL_GROUPS!r}).fetchall())"
IN_PANDAS = (
    "import sqlite3, sys, pandas as pd; "
    "f = pd.read_sql_query('SELECT value, end - start AS ns FROM OSRT_API JOIN StringIds ON id = nameId', "
    "sqlite3.connect(sys.argv[1])); "
    "f.groupby('value')['ns'].describe(percentiles=[0.5, 0.95]).to_csv(sys.argv[2])"
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: seconds, those of all its processes on a core, and the largest sum of their resident memory."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    finished: bool = True


def run(command: Sequence[str], limit_s: float = 1200.0) -> Cost:
    """Run to the end, or stop after ``limit_s``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began, cpu_before = time.perf_counter(), _cpu_of_children()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak = 0
    while process.poll() is None and time.perf_counter() - began < limit_s:
        peak = max(peak, _resident(process))
        time.sleep(SAMPLE_S)
    wall = time.perf_counter() - began
    if process.returncode is None:
        for one in [*process.children(recursive=True), process]:
            one.kill()
        process.wait()
        return Cost(wall, _cpu_of_children() - cpu_before, peak, finished=False)
    if process.returncode:
        raise SystemExit(f"{command} exited with {process.returncode}: {process.stderr.read().decode()}")
    return Cost(wall, _cpu_of_children() - cpu_before, peak)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: psutil.Process) -> int:
    total = 0
    for one in (process, *_children(process)):
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.wall_s for cost in costs),
        statistics.median(cost.cpu_s for cost in costs),
        int(statistics.median(cost.peak_bytes for cost in costs)),
        all(cost.finished for cost in costs),
    )


def row(part: str, name: str, costs: Sequence[Cost]) -> Row:
    """What the runs of one command cost."""
    return {
        "part": part,
        "name": name,
        "runs": len(costs),
        "finished": all(cost.finished for cost in costs),
        **summary([cost.wall_s for cost in costs], "s", "wall"),
        **summary([cost.cpu_s for cost in costs], "s", "cpu"),
        **summary([cost.peak_bytes / 1e6 for cost in costs], "mb", "peak"),
    }


def by_turns(commands: dict[str, Callable[[], Cost]], repeats: int) -> dict[str, list[Cost]]:
    """Costs of each; the commands take turns, so that a slow spell of the machine hits all of them."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            costs[name].append(command())
    return costs


def one_report(folder: Path, repeats: int, rows: list[Row]) -> Iterator[str]:
    """The OSRT table alone, and everything, of one large report; its results are added to ``rows``."""
    report = write_run(folder / "large", LARGE)[0]
    out = folder / "out"
    commands = {
        "hpcmm: the OSRT table": lambda: run([sys.executable, "-c", OSRT_ALONE, str(report), str(folder / "osrt.csv")]),
        "hpcmm: all tables, page and trace": lambda: run(
            [sys.executable, "-m", "hpcmm.analyze", str(report), "--out", str(out)]
        ),
        "sqlite: GROUP BY function, no quantiles": lambda: run([sys.executable, "-c", IN_SQL, str(report)]),
        "pandas: read and describe by function": lambda: run(
            [sys.executable, "-c", IN_PANDAS, str(report), str(folder / "pandas.csv")]
        ),
    }
    rival = "nsys stats --report osrtsum"
    if shutil.which("nsys"):
        # nsys writes beside its input.
        nsys_input = folder / "nsys.sqlite"
        shutil.copyfile(report, nsys_input)
        stats = ["nsys", "stats", "--report", "osrtsum", "--force-overwrite", "true", "-o", str(folder / "nsys")]
        commands[rival] = lambda: run([*stats, str(nsys_input)])
    costs = by_turns(commands, repeats)
    base = median(costs[rival]) if rival in costs else None
    yield f"One report of 2 million OS calls on 64 threads and 200 thousand ranges, medians of {repeats}:\n"
    yield "| | seconds | on a core | peak MB | times as fast as nsys |\n|---|---|---|---|---|"
    for name, found in costs.items():
        cost = median(found)
        times = ratio(base and base.wall_s, cost.wall_s)
        rows.append({**row("report", name, found), "times_as_fast_as_nsys": times})
        shown = "" if times is None else f"{times:.1f}"
        peak_mb = cost.peak_bytes / 1e6
        yield f"| {name} | {cost.wall_s:.2f} | {cost.cpu_s:.2f} | {peak_mb:.0f} | {shown} |"


def curve(folder: Path, counts: Sequence[int], repeats: int, rows: list[Row]) -> Iterator[str]:
    """The whole analysis of ever more reports."""
    reports = write_run(folder / "curve", replace(OF_CURVE, ranks=max(counts)))
    yield "\nReports of 500 thousand OS calls, 50 thousand ranges, 1,000 steps and 20 thousand collectives each:\n"
    yield "| reports | seconds | on all cores | a report | peak MB of all processes | repeats |"
    yield "|---|---|---|---|---|---|"
    for count in counts:
        times = repeats if count <= 4 else 1
        command = [sys.executable, "-m", "hpcmm.analyze", *map(str, reports[:count]), "--out", str(folder / "out")]
        costs = [run_partial(command) for _ in range(times)]
        cost = median(costs)
        each = cost.wall_s / count
        rows.append({**row("curve", "hpcmm", costs), "reports": count, "a_report_s": each})
        peak_mb = cost.peak_bytes / 1e6
        yield f"| {count} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {each:.2f} | {peak_mb:.0f} | {times} |"


def run_partial(command: Sequence[str]) -> Cost:
    """As :func:`run`, of an analysis that says that ranks are missing (exit status 2)."""
    return run(["sh", "-c", '"$@" || test $? = 2', "sh", *command])


def projection(folder: Path, repeats: int, rows: list[Row]) -> Iterator[str]:
    """Which kernels each NVTX range launched: ours, and a sweep in plain Python, on the same arrays."""
    report = write_run(folder / "gpu", GPU)[0]
    pairs = [(float(_script("ours", report)), float(_script("plain", report))) for _ in range(repeats)]
    ours, plain = zip(*pairs, strict=True)
    for name, seconds in (("hpcmm", ours), ("plain Python", plain)):
        times = ratio(statistics.median(plain), statistics.median(seconds))
        found = {"part": "projection", "name": name, "runs": repeats, **summary(seconds, "s")}
        rows.append({**found, "times_as_fast_as_plain_python": times})
    yield f"\nProjection of 200 thousand ranges onto 300 thousand kernels, medians of {repeats}:\n"
    yield "| | seconds |\n|---|---|"
    yield f"| hpcmm | {statistics.median(ours):.2f} |"
    yield f"| plain Python: a stack over sorted starts and ends | {statistics.median(plain):.2f} |"
    if shutil.which("nsys"):
        nsys_input = folder / "gpu.sqlite"
        shutil.copyfile(report, nsys_input)
        stats = ["nsys", "stats", "--report", "nvtxkernsum", "--force-overwrite", "true", "-o", str(folder / "kern")]
        costs = up_to_limit([*stats, str(nsys_input)], repeats)
        rows.append(row("projection", "nsys stats --report nvtxkernsum", costs))
        cost = median(costs)
        told = f"{cost.wall_s:.1f}" if cost.finished else f"more than {RIVAL_LIMIT_S}, stopped there"
        once = ", once" if len(costs) == 1 else ""
        yield f"| nsys stats --report nvtxkernsum (with reading{once}) | {told} |"


def up_to_limit(command: Sequence[str], repeats: int) -> list[Cost]:
    """A rival's runs; none after one that was stopped."""
    costs: list[Cost] = []
    while len(costs) < repeats and all(cost.finished for cost in costs):
        costs.append(run(command, RIVAL_LIMIT_S))
    return costs


def _script(kind: str, report: Path) -> str:
    command = [sys.executable, str(Path(__file__).with_name("projection.py")), kind, str(report), "--repeats=1"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ).stdout


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--repeats", type=measuring.positive, default=5)
    parser.add_argument("--parts", default="report,projection,curve", help="which tables to make")
    parser.add_argument("--curve", default="1,4,16,64", help="numbers of reports")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    counts = [int(count) for count in options.curve.split(",")]
    rows: list[Row] = []
    makers: dict[str, Callable[[Path], Iterator[str]]] = {
        "report": lambda folder: one_report(folder, options.repeats, rows),
        "projection": lambda folder: projection(folder, options.repeats, rows),
        "curve": lambda folder: curve(folder, counts, options.repeats, rows),
    }
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts.split(","):
            for line in makers[part](Path(name)):
                print(line, flush=True)
                lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    measuring.write(options.json, "analysis", rows)


if __name__ == "__main__":
    main()
