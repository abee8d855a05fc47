"""Seconds of one projection of ranges onto kernels, ours or a sweep in plain Python: the median of some.

    python benchmarks/projection.py ours|plain REPORT [--repeats 5] [--json FILE]

REPORT is an SQLite export of nsys with CUDA's kernels. Reading it is not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import measuring
import pandas as pd
from measuring import summary

from hpcmm.analysis.projection import project
from hpcmm.errors import HpcmmError
from hpcmm.reports.events import read_report


def plain(ranges: pd.DataFrame, activities: pd.DataFrame) -> list[tuple[int, int, int]]:
    """For each range, the first start and last end of the kernels that were launched in it, and their number."""
    starts, ends = ranges["start_ns"].tolist(), ranges["end_ns"].tolist()
    events = [(start, 0, -ends[index], index) for index, start in enumerate(starts)]
    events += [(end, 2, 0, index) for index, end in enumerate(ends)]
    launches = zip(activities["launch_ns"], activities["start_ns"], activities["end_ns"], strict=True)
    kernels = list(launches)
    events += [(launch, 1, 0, index) for index, (launch, _, _) in enumerate(kernels)]
    events.sort()
    found = [(1 << 62, 0, 0)] * len(starts)
    stack: list[int] = []
    for _, kind, _, index in events:
        if kind == 0:
            stack.append(index)
        elif kind == 1:
            _, begin, finish = kernels[index]
            for owner in stack:
                first, last, count = found[owner]
                found[owner] = (min(first, begin), max(last, finish), count + 1)
        elif index in stack:
            stack.remove(index)
    return found


def seconds(projection: Callable[[pd.DataFrame, pd.DataFrame], object], *tables: pd.DataFrame) -> float:
    began = time.perf_counter()
    projection(*tables)
    return time.perf_counter() - began


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("kind", choices=("ours", "plain"))
    parser.add_argument("report", type=Path, metavar="REPORT")
    parser.add_argument("--repeats", type=measuring.positive, default=5)
    options = parser.parse_args()
    try:
        cuda = read_report(options.report, options.report).cuda
    except (HpcmmError, OSError) as error:
        parser.error(str(error))
    if cuda is None:
        parser.error(f"{options.report} holds no kernels")
    projection = project if options.kind == "ours" else plain
    taken = [seconds(projection, cuda.ranges, cuda.activities) for _ in range(options.repeats)]
    print(statistics.median(taken))
    sizes = {"ranges": len(cuda.ranges), "kernels": len(cuda.activities)}
    row = {"name": options.kind, **sizes, "runs": len(taken), **summary(taken, "s")}
    measuring.write(options.json, "projection", [row])


if __name__ == "__main__":
    main()
