"""Seconds of one projection of ranges onto kernels: ``python benchmarks/projection.py ours|plain REPORT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd

from hpcmm.analysis.projection import project
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


def main() -> None:
    kind, report = sys.argv[1], Path(sys.argv[2])
    cuda = read_report(report, report).cuda
    assert cuda is not None
    began = time.perf_counter()
    if kind == "ours":
        project(cuda.ranges, cuda.activities)
    else:
        plain(cuda.ranges, cuda.activities)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
