"""What changed from one run to another, with the noise of the steps taken into account.

Each metric is a series over the steps that are not warm-up; :mod:`hpcmm.analysis.statistics` tells what its mean
may differ by. A difference must also be large enough to matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import BETWEEN_STEPS, SUBPROCESS, Floats
from hpcmm.analysis.phases import ADJOINING
from hpcmm.analysis.pop_metrics import EFFICIENCIES, RUN, STEP, samples_per_step
from hpcmm.analysis.statistics import half_widths
from hpcmm.errors import HpcmmError

BETTER, WORSE, NO_DIFFERENCE, TOO_FEW = "better", "worse", "no difference seen", "too few steps"
SECONDS, RATIO = "s per step", "ratio"

COLUMNS = [
    "kind",
    "metric",
    "phase",
    "rank",
    "node",
    "unit",
    "run_a",
    "run_b",
    "change",
    "low",
    "high",
    "step_share",
    "verdict",
]
_KINDS = ["step", "bottleneck", "phase", "communication", "efficiency"]

SHOWN = 0.25
"""What stands for a row of ``bottlenecks`` shows at least this share of its loss, in each run that has it."""
MIN_CHANGE = 0.02
"""Share of run A's step, or difference of an efficiency, below which a change is none: like runs differ by as much from
one day to the next, which steps of one run cannot show."""


_NO_DIFFERENCE_OF_RUNS = frozenset({"name", "wait", "dry_run"})
"""Keys of the configuration that say how a run was launched, and nothing of what it did."""
_COPIED_SCRIPT = re.compile(r".*/[^/]+-\d{8}-\d{6}-[0-9a-f]{4}/code/(.+)", re.DOTALL)
"""A script in the copy of the code that each launch makes in its run directory."""


@dataclass(frozen=True, slots=True)
class RunTables:
    """What of a run is compared: tables ``steps``, ``phases``, ``efficiency``, ``delays`` and ``bottlenecks``."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    config: Mapping[str, Any]
    why_no_steps: str = ""
    """Of a run without steps: what is to be done about that, in a sentence or two. Empty if that is not known."""

    def without_steps(self, of: str) -> HpcmmError:
        """That it has no steps ``of`` (``to compare``), and what gives it some."""
        why = self.why_no_steps or "only annotated steps after the first count."
        return HpcmmError(f"{self.name} has no steps{of}: {why}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Table of COLUMNS, and how the runs themselves differ, one sentence each."""

    name_a: str
    name_b: str
    table: pd.DataFrame
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """What is compared: a row of the table."""

    kind: str
    name: str
    phase: str = ""
    rank: int | None = None
    node: str = ""
    unit: str = SECONDS


def compare(run_a: RunTables, run_b: RunTables) -> Comparison:
    """Compare ``run_b`` with the older ``run_a``: steps, phases, communication, POP efficiencies, bottlenecks.

    Raises HpcmmError if a run has no steps besides warm-up.
    """
    for run in (run_a, run_b):
        steps = run.tables["steps"]
        is_first_alone = steps["step"].nunique() < 2
        if (
            is_first_alone
            or not len(_steady(run))
            or not steps.loc[steps["step"].isin(_steady(run)), "duration_s"].sum() > 0
        ):
            raise run.without_steps(" to compare")
    unseen = _of_waiting((run_a, run_b))
    blamed = _compared_bottlenecks((run_a, run_b), waits_are_known=not unseen)
    step = Metric("step", "step time")
    if not (_adjoin(run_a) and _adjoin(run_b)):
        step = Metric("step", "time from step to step")
        run_a, run_b = _with_time_between(run_a), _with_time_between(run_b)
    series_a, series_b = (_series(run, step, waits_are_known=not unseen) for run in (run_a, run_b))
    # An efficiency that is not known in one run is not 0 there.
    known = [each for each in {**series_a, **series_b} if each.unit != RATIO or (each in series_a and each in series_b)]
    if not any(series[each].any() for series in (series_a, series_b) for each in COMMUNICATION if each in series):
        alone = all(run.tables["steps"]["rank"].nunique() < 2 for run in (run_a, run_b))
        known = [each for each in known if not (alone and each in COMMUNICATION)]
    metrics = sorted([*known, *blamed.series], key=lambda metric: _KINDS.index(metric.kind))
    series_a |= {metric: of_both[0] for metric, of_both in blamed.series.items()}
    series_b |= {metric: of_both[1] for metric, of_both in blamed.series.items()}
    values_a, values_b = (
        np.column_stack([series.get(metric, np.zeros(len(_steady(run)))) for metric in metrics])
        for run, series in ((run_a, series_a), (run_b, series_b))
    )
    table = _table(metrics, values_a, values_b, [_means(run, metrics) for run in (run_a, run_b)])
    return Comparison(run_a.name, run_b.name, table, (*unseen, *blamed.notes, *_notes(run_a, run_b)))


def _of_waiting(runs: Sequence[RunTables]) -> list[str]:
    """That waiting is not compared, as it was not recorded in a run; empty if it was. Such a run has no efficiency."""
    tables = [run.tables["efficiency"] for run in runs]
    known = [table.loc[table["scope"] == RUN, "parallel_efficiency"].notna().all() for table in tables]
    if all(known):
        return []
    where = "A" if known[1] else "B" if known[0] else "either run"
    told = f"waiting, transfer and efficiencies are not compared: no collective was recorded in {where}"
    return [f"{told}, so the time in a phase includes them"]


def _periods_s(steps: pd.DataFrame) -> pd.Series:
    """From the end of the step before to the end of each step; its own duration if the one before is not there."""
    ordered = steps.sort_values(["rank", "step"])
    end = ordered["start_s"] + ordered["duration_s"]
    follows = (ordered["rank"].diff() == 0) & (ordered["step"].diff() == 1)
    return end.diff().where(follows, ordered["duration_s"]).reindex(steps.index)


def _adjoin(run: RunTables) -> bool:
    """Whether hardly any time lies between the steps of a run."""
    steps = run.tables["steps"]
    inside = steps["step"].isin(_steady(run))
    return bool(_periods_s(steps)[inside].mean() <= ADJOINING * steps.loc[inside, "duration_s"].mean())


def _with_time_between(run: RunTables) -> RunTables:
    """The same with steps that last from the end of the one before: a loader may run in them, or between them."""
    steps = run.tables["steps"]
    return replace(run, tables={**run.tables, "steps": steps.assign(duration_s=_periods_s(steps))})


def _means(run: RunTables, metrics: Sequence[Metric]) -> Floats:
    """Of an efficiency the whole run's, as everywhere else, which is not the mean of its steps'; NaN for the rest."""
    table = run.tables["efficiency"]
    whole = table[table["scope"] == RUN].iloc[0]
    return np.array([whole[_COLUMN_OF[metric.name]] if metric.unit == RATIO else np.nan for metric in metrics], float)


_COLUMN_OF = {name.replace("_", " "): name for name in EFFICIENCIES}


def _table(metrics: Sequence[Metric], values_a: Floats, values_b: Floats, whole: Sequence[Floats]) -> pd.DataFrame:
    """``values`` by step; where ``whole`` has a number it stands for their mean."""
    mean_a, mean_b = (
        np.where(np.isnan(known), values.mean(axis=0), known)
        for known, values in zip(whole, (values_a, values_b), strict=True)
    )
    change, half = mean_b - mean_a, half_widths(values_a, values_b)
    step_s = mean_a[0]
    is_time = np.array([metric.unit == SECONDS for metric in metrics])
    matters = np.abs(change) >= np.where(is_time, MIN_CHANGE * step_s, MIN_CHANGE)
    improved = (change < 0) == is_time
    verdict = np.select(
        [np.isnan(half), ~matters | (np.abs(change) <= half), improved], [TOO_FEW, NO_DIFFERENCE, BETTER], WORSE
    )
    table = pd.DataFrame(
        {
            "kind": [metric.kind for metric in metrics],
            "metric": [metric.name for metric in metrics],
            "phase": [metric.phase for metric in metrics],
            "rank": pd.array([metric.rank for metric in metrics], dtype="Int64"),
            "node": [metric.node for metric in metrics],
            "unit": [metric.unit for metric in metrics],
            "run_a": mean_a,
            "run_b": mean_b,
            "change": change,
            "low": change - half,
            "high": change + half,
            "step_share": np.where(is_time, change / step_s, np.nan),
            "verdict": verdict,
        }
    )
    return table.astype(dict.fromkeys(("kind", "metric", "phase", "node", "unit", "verdict"), "str"))[COLUMNS]


def _steady(run: RunTables) -> npt.NDArray[np.int64]:
    table = run.tables["efficiency"]
    return np.sort(table.loc[table["scope"] == STEP, "step"].to_numpy(np.int64))


def _series(run: RunTables, step: Metric, *, waits_are_known: bool) -> dict[Metric, Floats]:
    """Value of each metric in each steady step; a mean over ranks where it is a time."""
    numbers = _steady(run)
    steps, phases = run.tables["steps"], run.tables["phases"]
    ranks = steps["rank"].nunique()

    def by_step(rows: pd.DataFrame, column: str) -> Floats:
        return _by_step(rows, column, numbers) / max(ranks, 1)

    inside = phases[phases["step"].isin(numbers)]
    found = {step: by_step(steps, "duration_s")}
    if waits_are_known:
        for phase, rows in inside[inside["within"].fillna("") == ""].groupby("phase", sort=True):
            found[Metric("phase", "useful time", phase=str(phase))] = by_step(rows, "useful_s")
        found |= {metric: by_step(inside, column) for metric, column in COMMUNICATION.items()}
    else:
        whole = inside.assign(whole_s=inside[["useful_s", *COMMUNICATION.values()]].sum(axis=1))
        for phase, rows in whole.groupby(whole["within"].replace("", np.nan).fillna(whole["phase"]), sort=True):
            found[Metric("phase", "time", phase=str(phase))] = by_step(rows, "whole_s")
    efficiency = run.tables["efficiency"]
    efficiency = efficiency[efficiency["scope"] == STEP].set_index("step").reindex(numbers)
    for name in EFFICIENCIES:
        values = efficiency[name].to_numpy(np.float64)
        if np.isfinite(values).all():  # the ratio of nothing to nothing is none
            found[Metric("efficiency", name.replace("_", " "), unit=RATIO)] = values
    return found


def _by_step(rows: pd.DataFrame, column: str, numbers: npt.NDArray[np.int64]) -> Floats:
    summed = rows.groupby("step")[column].sum()
    series: Floats = summed.reindex(numbers, fill_value=0.0).to_numpy(np.float64)
    return series


COMMUNICATION = {Metric("communication", "waiting"): "wait_s", Metric("communication", "transfer"): "transfer_s"}
"""What is compared of it, and the column of ``phases``."""


@dataclass(frozen=True, slots=True)
class _Bottlenecks:
    """Rows that name a rank or a node: in each step of run A and of run B, and what is to be said of them."""

    series: Mapping[Metric, Sequence[Floats]]
    notes: Sequence[str]


def _compared_bottlenecks(runs: Sequence[RunTables], *, waits_are_known: bool) -> _Bottlenecks:
    """What stands for each row in both runs: its delays, or how much longer its rank or node works than the others.

    Delays are known where it was recorded who waits. A row that nothing shows step by step is not compared.
    """
    lost = [_bottlenecks(run) for run in runs]
    phases = pd.concat([run.tables["phases"][["step", "phase"]] for run in runs])
    outside = {BETWEEN_STEPS, *phases.loc[phases["step"].isna(), "phase"]}
    found: dict[Metric, Sequence[Floats]] = {}
    notes = []
    for metric in lost[0] | lost[1]:
        measures: list[tuple[str, _Measure]] = [("", _delays)] if waits_are_known else []
        measures.append(("in that phase", _longer_in_phase))
        measures += [("between the steps", _longer_between_steps)] if metric.phase in outside else []
        for where, measure in measures:
            series = [measure(run, metric) for run in runs]
            if all(each.mean() >= SHOWN * of_run.get(metric, 0.0) for each, of_run in zip(series, lost, strict=True)):
                found[metric] = series
                stands = f"its time {where} beyond that of the others stands for the {_in_words(metric)}"
                notes += [f"who waits for it is not known, so {stands}"] if where else []
                break
        else:
            told = [f"{of[metric] * 1e3:.2f} ms in {name}" for name, of in zip("AB", lost, strict=True) if metric in of]
            notes.append(f"not compared, as no table tells them by step ({', '.join(told)}): {_in_words(metric)}")
    return _Bottlenecks(found, notes)


_Measure = Callable[[RunTables, Metric], Floats]


def _in_words(metric: Metric) -> str:
    who = f"node {metric.node}" if metric.rank is None else f"rank {metric.rank}"
    who = "a process of unknown rank" if metric.rank is not None and metric.rank < 0 else who
    return f"delays by {who}: {metric.name}" + (f" in {metric.phase}" if metric.phase else "")


def _delays(run: RunTables, metric: Metric) -> Floats:
    """What the rank or node costs all ranks, in each steady step."""
    delays = run.tables["delays"]
    own = delays["rank"] == metric.rank if metric.rank is not None else delays["node"] == metric.node
    parts = [metric.phase, SUBPROCESS + metric.phase] if metric.phase else delays["phase"].unique()
    return _by_step(delays[own & delays["phase"].isin(parts)], "lost_s", _steady(run))


def _longer_in_phase(run: RunTables, metric: Metric) -> Floats:
    phases = run.tables["phases"]
    return _longer(run, metric, phases[phases["phase"] == metric.phase], "useful_s")


def _longer_between_steps(run: RunTables, metric: Metric) -> Floats:
    steps = run.tables["steps"]
    return _longer(run, metric, steps.assign(between_s=_periods_s(steps) - steps["duration_s"]), "between_s")


def _longer(run: RunTables, metric: Metric, rows: pd.DataFrame, column: str) -> Floats:
    """By how much ``column`` of a rank, or of a node's ranks, exceeds the median of the others, in each steady step."""
    ranks = run.tables["steps"].drop_duplicates("rank").set_index("rank")["node"]
    by_rank = rows.pivot_table(index="step", columns="rank", values=column, aggfunc="sum", fill_value=0.0)
    by_rank = by_rank.reindex(index=_steady(run), columns=ranks.index, fill_value=0.0)
    own = ranks.index == metric.rank if metric.rank is not None else (ranks == metric.node).to_numpy()
    if not own.any() or own.all():
        return np.zeros(len(by_rank))
    values = by_rank.to_numpy(np.float64)
    longer: Floats = np.maximum(values[:, own].mean(axis=1) - np.median(values[:, ~own], axis=1), 0.0)
    return longer


def _bottlenecks(run: RunTables) -> dict[Metric, float]:
    """Seconds a step of the bottlenecks that name a rank or a node; the others are the phases and the communication."""
    rows = run.tables["bottlenecks"]
    found: dict[Metric, float] = {}
    for row in rows.to_dict("records"):
        if pd.notna(row["rank"]) or _text(row["node"]):
            metric = Metric(
                "bottleneck",
                str(row["cause"]),
                phase=_text(row["phase"]),
                rank=int(row["rank"]) if pd.notna(row["rank"]) else None,
                node=_text(row["node"]),
            )
            found[metric] = max(found.get(metric, 0.0), float(row["lost_s_per_step"]))
    return found


def _text(value: object) -> str:
    """Text of a cell: an empty one comes back from a file as nothing."""
    return value if isinstance(value, str) else ""


def _notes(run_a: RunTables, run_b: RunTables) -> Iterator[str]:
    """How the runs themselves differ: ranks, nodes, samples a step, configuration."""
    for what, column in (("ranks", "rank"), ("nodes", "node")):
        counts = [run.tables["steps"][column].nunique() for run in (run_a, run_b)]
        if counts[0] != counts[1]:
            yield f"{what}: {counts[0]} in A, {counts[1]} in B; times are means over the ranks of each"
    samples = [samples_per_step(run.config) for run in (run_a, run_b)]
    if samples[0] != samples[1] and all(samples):
        yield f"a step trains on {samples[0]} samples in A and on {samples[1]} in B; step times are not per sample"
    flat_a, flat_b = dict(_flat(run_a.config)), dict(_flat(run_b.config))
    if flat_a and flat_b:
        for key in sorted((flat_a.keys() | flat_b.keys()) - _NO_DIFFERENCE_OF_RUNS):
            values = [flat.get(key, "(not set)") for flat in (flat_a, flat_b)]
            if _of_the_project(key, values[0]) != _of_the_project(key, values[1]):
                yield f"{key}: {values[0]} in A, {values[1]} in B"


def _of_the_project(key: str, value: str) -> str:
    """A script by its path within its run's copy of the code; all else as it is."""
    copied = _COPIED_SCRIPT.fullmatch(value) if key == "task.path" else None
    return copied[1] if copied else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
