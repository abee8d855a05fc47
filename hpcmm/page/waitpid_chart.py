"""Waits for child processes over the run: a band a rank, and what each kind of wait really is."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hpcmm.analysis import waitpid
from hpcmm.analysis.osrt import NS_PER_S
from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import number, plain, rank_list, rank_name, seconds
from hpcmm.page.step_charts import Bar, Part

MAX_BANDS = 64
MIN_WIDTH = 0.15
"""Percent of the drawing; a shorter wait is drawn this wide, so that it is seen."""

MEANING = {
    waitpid.SUPERVISION: "a launcher waits for the process it started: it costs nothing",
    waitpid.OP_BUILD: "before the first step, compiled operators are probed or built: it delays the start only",
    waitpid.LOADING: "a loader process, or the thread that minds it: harmless while the data phase is short",
    waitpid.WITHIN_STEP: "the thread that trains stands still within a step: this costs time",
    waitpid.OTHER_WAIT: "a background thread, or between steps",
}
_COLOURS = {
    waitpid.SUPERVISION: "other",
    waitpid.OP_BUILD: "forward",
    waitpid.LOADING: "data",
    waitpid.WITHIN_STEP: "wait",
    waitpid.OTHER_WAIT: "transfer",
}


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One verdict over all ranks."""

    verdict: str
    kind: str
    meaning: str
    ranks: str
    calls: str
    union: str
    window: str


@dataclass(frozen=True, slots=True)
class ChildWaits:
    """Bands by rank over ``span``, the step part of the run in percent of it, and the verdicts."""

    bands: list[Bar]
    steps: tuple[float, float] | None
    span: str
    verdicts: list[VerdictRow]
    left_out: int


def child_waits(study: Study) -> ChildWaits | None:
    """The bands; None where no wait for a child was recorded."""
    windows = study.tables["waitpid_windows"]
    if windows.empty:
        return None
    first_s, last_s = _step_span(study)
    span = max(float(windows["end_s"].max()), last_s, 1e-9)
    by_rank = {int(str(rank)): group for rank, group in windows.groupby("rank")}
    within = windows[windows["verdict"] == waitpid.WITHIN_STEP].groupby("rank")["union_s"].sum()
    order = sorted(by_rank, key=lambda rank: (-float(within.get(rank, 0.0)), rank))
    chosen = sorted(order[:MAX_BANDS])
    bands = [_band(rank, by_rank[rank], span) for rank in chosen]
    steps = (round(100 * first_s / span, 3), round(100 * (last_s - first_s) / span, 3)) if last_s > first_s else None
    return ChildWaits(bands, steps, seconds(span), _verdicts(windows), len(order) - len(chosen))


def _step_span(study: Study) -> tuple[float, float]:
    """Start of the first step and end of the last, in seconds of the run."""
    closed = [trace.steps for trace in study.traces if len(trace.steps)]
    if not closed:
        return 0.0, 0.0
    return (
        min(int(steps["start_ns"].min()) for steps in closed) / NS_PER_S,
        max(int(steps["end_ns"].max()) for steps in closed) / NS_PER_S,
    )


def _band(rank: int, windows: pd.DataFrame, span: float) -> Bar:
    parts, told = [], []
    # The longest first: others that lie within are drawn over it, and each is seen.
    lengths = windows.assign(length=windows["end_s"] - windows["start_s"]).sort_values("length", ascending=False)
    for row in lengths.to_dict("records"):
        start, end = float(row["start_s"]), float(row["end_s"])
        width = max(100 * (end - start) / span, MIN_WIDTH)
        verdict = plain(row["verdict"])
        text = f"{verdict}: {plain(row['role'])}, {_window(start, end)}, {number(int(row['calls']))} calls"
        told.append(text)
        kind = _COLOURS.get(str(row["verdict"]), "transfer")
        at = min(100 * start / span, 100 - width)
        parts.append(Part(text, kind, seconds(float(row["union_s"])), "", round(at, 3), round(width, 3)))
    return Bar(rank_name(rank), parts, seconds(float(windows["union_s"].sum())), "; ".join(told[:8]))


def _verdicts(windows: pd.DataFrame) -> list[VerdictRow]:
    """Those that cost time first."""
    order = {verdict: at for at, verdict in enumerate(dict.fromkeys([waitpid.WITHIN_STEP, *MEANING]))}
    rows = []
    for verdict, group in sorted(
        ((str(name), group) for name, group in windows.groupby("verdict")), key=lambda item: order.get(item[0], 99)
    ):
        by_rank = group.groupby("rank")["union_s"].sum()
        rows.append(
            VerdictRow(
                plain(verdict),
                _COLOURS.get(str(verdict), "transfer"),
                MEANING.get(str(verdict), ""),
                rank_list(group["rank"]),
                number(int(group["calls"].sum())),
                seconds(float(by_rank.max())),
                _window(float(group["start_s"].min()), float(group["end_s"].max())),
            )
        )
    return rows


def _window(start_s: float, end_s: float) -> str:
    digits = 0 if end_s - start_s >= 10 else 2
    return f"{start_s:.{digits}f} s to {end_s:.{digits}f} s"
