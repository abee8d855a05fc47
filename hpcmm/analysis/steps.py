"""The steps that all ranks share: their durations, and which of them are warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.trace import RankTrace

MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Durations of the steps that every rank with steps completed; warm-up (the first) is kept apart."""

    numbers: npt.NDArray[np.int64]
    """Step numbers without warm-up, shape (steps,)."""
    duration_s: npt.NDArray[np.float64]
    """Mean over ranks of each of them, shape (steps,)."""
    warmup_number: int | None
    warmup_s: float
    left_out: tuple[int, ...] = ()
    """Ranks that have fewer than half of the steps that most ranks have; they are no part of the above."""

    @property
    def mean_s(self) -> float:
        return float(self.duration_s.mean()) if len(self.duration_s) else 0.0

    @property
    def median_s(self) -> float:
        return float(np.median(self.duration_s)) if len(self.duration_s) else 0.0

    @property
    def noise_s(self) -> float:
        """Robust standard deviation of a step's duration from step to step."""
        if not len(self.duration_s):
            return 0.0
        return MAD_TO_SIGMA * float(np.median(np.abs(self.duration_s - np.median(self.duration_s))))


def step_times(traces: Sequence[RankTrace]) -> StepTimes:
    """Steps that all of ``traces`` with any closed steps have closed. The first of the run is warm-up.

    A rank whose steps are mostly others than those of most ranks, because their numbers are damaged or it stopped
    early, would leave nothing of the run to look at: it is left out.
    """
    known = {trace.rank: closed for trace in traces if len(closed := trace.steps[trace.steps["closed"]])}
    if not known:
        return StepTimes(np.empty(0, dtype=np.int64), np.empty(0), None, 0.0)
    usual = pd.concat([frame["step"] for frame in known.values()]).value_counts()
    usual = usual[usual > len(known) / 2].index
    odd = [rank for rank, frame in known.items() if 2 * frame["step"].isin(usual).sum() < len(usual)]
    frames = [frame for rank, frame in known.items() if rank not in odd]
    first = min(int(frame["step"].min()) for frame in frames)
    whole = pd.concat(
        [pd.DataFrame({"step": f["step"], "duration": (f["end_ns"] - f["start_ns"]) / NS_PER_S}) for f in frames]
    )
    by_step = whole.groupby("step")["duration"].agg(["mean", "size"])
    common = by_step[by_step["size"] == len(frames)]
    warm = common[common.index == first]
    steady = common[common.index != first]
    return StepTimes(
        numbers=steady.index.to_numpy(np.int64),
        duration_s=steady["mean"].to_numpy(np.float64),
        warmup_number=first if len(warm) else None,
        warmup_s=float(warm["mean"].iloc[0]) if len(warm) else 0.0,
        left_out=tuple(odd),
    )
