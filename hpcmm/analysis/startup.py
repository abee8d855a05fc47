"""Where the time from Slurm's start of the job to the end of the first step went: metrics records to a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

COLUMNS = ("attempt", "part", "median_s", "longest_s", "slowest_rank", "ranks")
FIRST_STEP = "first step"


def startup_table(records: Mapping[int, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """One row for each attempt and part of the start, in the order in which the parts happen.

    ``records``: by rank, the records of its metrics file. ``median_s`` and ``longest_s`` are over the ranks, of which
    ``ranks`` recorded the part. The last part, ``first step``, is the first step of the attempt. The parts of one rank
    follow one another, but ranks wait for each other in ``rendezvous`` and ``engine``, so the medians of the parts add
    up only roughly to the time of the whole start. Records that lack what they should hold are left out.
    """
    parts = pd.DataFrame(
        [part for rank, of_rank in records.items() for part in _parts(rank, of_rank)],
        columns=["attempt", "part", "rank", "order", "duration_s"],
    )
    rows = []
    for (attempt, part), group in parts.groupby(["attempt", "part"], sort=False):
        slowest = group.sort_values(["duration_s", "rank"]).iloc[-1]
        rows.append(
            {
                "attempt": attempt,
                "part": part,
                "median_s": group["duration_s"].median(),
                "longest_s": slowest["duration_s"],
                "slowest_rank": slowest["rank"],
                "ranks": group["rank"].nunique(),
                "order": group["order"].median(),
            }
        )
    table = pd.DataFrame(rows, columns=[*COLUMNS, "order"])
    return table.sort_values(["attempt", "order"], kind="stable", ignore_index=True)[list(COLUMNS)]


def _parts(rank: int, records: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, str, int, int, float]]:
    """(attempt, part, rank, order, duration_s) of each part of each attempt of one rank."""
    stepped: set[int] = set()
    for order, record in enumerate(records):
        event, attempt = record.get("event"), record.get("attempt", 1)
        if not isinstance(attempt, int):
            continue
        if event == "startup":
            part, duration_s = record.get("part"), record.get("duration_s")
        elif event in ("step", "lost") and attempt not in stepped:
            stepped.add(attempt)
            part, duration_s = FIRST_STEP, record.get("step_s")
        else:
            continue
        if isinstance(part, str) and isinstance(duration_s, int | float) and math.isfinite(duration_s):
            yield attempt, part, rank, order, float(duration_s)
