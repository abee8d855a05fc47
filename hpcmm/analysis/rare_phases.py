"""Phases beyond a hundred names are taken together: names with a number in them would make a phase of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from hpcmm.analysis.phases import OTHER
from hpcmm.analysis.trace import RankTrace

MAX_PHASES = 100
OTHERS = "(other phases)"


def fold(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """``traces`` with the :data:`MAX_PHASES` phases that take most time over all ranks, the rest as :data:`OTHERS`."""
    names = {str(name) for trace in traces for name in trace.segments["phase"].unique()}
    if len(names) <= MAX_PHASES:
        return list(traces)
    lengths = pd.concat(
        [
            pd.DataFrame(
                {"phase": trace.segments["phase"], "ns": trace.segments["end_ns"] - trace.segments["start_ns"]}
            )
            for trace in traces
        ]
    )
    longest = lengths.groupby("phase")["ns"].sum().sort_values(ascending=False, kind="stable")
    kept = {*longest.index[: MAX_PHASES - 1], OTHER, ""}

    def folded(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(phase=frame["phase"].where(frame["phase"].isin(kept), OTHERS))

    return [
        replace(
            trace,
            segments=folded(trace.segments),
            collectives=folded(trace.collectives),
            waits=folded(trace.waits),
            calls=folded(trace.calls),
            batches=None if trace.batches is None else folded(trace.batches),
        )
        for trace in traces
    ]
