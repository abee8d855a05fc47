"""The whole analysis in one line: captures, traces on one clock, matched collectives, charges, tables."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from hpcmm.analysis import bottlenecks, collectives, nccl, tables
from hpcmm.analysis.comm_wait import comm_wait, wait_matrix
from hpcmm.analysis.findings import AnalysisContext
from hpcmm.analysis.gpu_findings import span_s
from hpcmm.analysis.phase_times import phases_summary, phases_table
from hpcmm.analysis.pop_metrics import Reference, efficiency, samples_per_step
from hpcmm.analysis.report_inventory import ReportInventory, facts_of, observe, observe_calls, take_inventory
from hpcmm.analysis.steps import StepTimes, step_times
from hpcmm.analysis.suggestions import suggest
from hpcmm.analysis.tables import Tables, environment_table, startup_table
from hpcmm.analysis.trace import RankTrace, group_rare_phases
from hpcmm.errors import HpcmmError
from hpcmm.reports.clock import UNSYNCHRONISED_ERROR_NS, Arrivals, CommonClock, ReportClock, common_clock
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import ReportSource
from hpcmm.reports.load import Progress, read_all
from hpcmm.reports.run_record import RunRecord
from hpcmm.text import printable


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that the tables and the page are made of. Times of ``traces`` are run time, in nanoseconds."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    """Each made when it is first asked for."""
    traces: tuple[RankTrace, ...]
    collectives: pd.DataFrame
    """Matched collectives with waits, in nanoseconds."""
    steps: StepTimes
    wait_matrix: np.ndarray
    """Seconds a step that each trace (row) waited for each other (column)."""
    clock: CommonClock
    complete: bool
    failed_run: str = ""
    """The run directory, where that notes that the run failed before its first step."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Some tables of a run, without what the page is made of."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    complete: bool


def why_failed(folder: str) -> str:
    """One sentence for a run that failed before its first step."""
    return f"the run failed before its first step; python -m hpcmm.jobs why {shlex.quote(folder)} tells why."


def study(
    sources: Sequence[ReportSource],
    record: RunRecord,
    cache_dir: Path,
    progress: Progress,
    *,
    keep_cache: bool = False,
    reference: Reference | None = None,
) -> Study:
    """Read ``sources`` and derive all tables; computation scaling is against ``reference``.

    Raises HpcmmError when no report can be read.
    """
    ledger = _read(sources, record, Converter.locate(cache_dir), progress, keep_cache=keep_cache)
    return _derive(ledger, record, progress, reference)


OF_CALLS_ALONE = frozenset({"osrt", "environment", "startup"})
"""Tables that need no other rank, no clock and no collective: for these alone, little of a report is read."""
TABLES = (
    "bottlenecks",
    "clock",
    "collectives",
    "comm_wait",
    "coverage",
    "delays",
    "efficiency",
    "environment",
    "gpu",
    "osrt",
    "phases",
    "phases_summary",
    "projection",
    "startup",
    "steps",
    "waitpid",
    "waitpid_windows",
)


def some_tables(
    chosen: Collection[str],
    sources: Sequence[ReportSource],
    record: RunRecord,
    cache_dir: Path,
    progress: Progress,
    *,
    keep_cache: bool = False,
    reference: Reference | None = None,
) -> Selection:
    """The tables ``chosen`` alone; no more is done than they need.

    Raises HpcmmError for a table that does not exist, and when no report can be read.
    """
    for name in chosen:
        if name not in TABLES:
            raise HpcmmError(f"there is no table {printable(name)}: choose among {', '.join(TABLES)}.")
    alone = OF_CALLS_ALONE.issuperset(chosen)
    ledger = _read(sources, record, Converter.locate(cache_dir), progress, keep_cache=keep_cache, calls_alone=alone)
    made = _of_calls(ledger, record) if alone else _derive(ledger, record, progress, reference).tables
    selected = Tables({name: lambda name=name: made[name] for name in TABLES if name in chosen})  # type: ignore[misc]
    return Selection(record.name, selected, ledger.complete)


def _of_calls(ledger: ReportInventory, record: RunRecord) -> Tables:
    traces = [trace for _, trace in ledger.used]
    return Tables(
        {
            "osrt": lambda: tables.osrt_table(traces),
            "environment": lambda: environment_table(ledger.used),
            "startup": lambda: startup_table(record.startup),
        }
    )


def _derive(ledger: ReportInventory, record: RunRecord, progress: Progress, reference: Reference | None) -> Study:
    """All tables, from the traces of all ranks."""
    progress("aligning clocks", 0, 1)
    traces, clock = _on_one_clock(ledger)
    traces = group_rare_phases(traces)
    progress("matching collectives", 0, 1)
    matched = nccl.confirm_order(collectives.match(traces), clock.error_ns)
    rows = collectives.estimate_waits(matched, clock.error_ns)
    rows = collectives.expose(rows.assign(bus_bytes_per_s=collectives.bus_bandwidth(rows)), traces)
    steps = step_times(traces)

    @cache
    def evidence() -> AnalysisContext:
        progress("finding bottlenecks", 0, 1)
        return bottlenecks.gather(traces, rows, steps, ledger.expected_ranks, made["gpu"])

    def ranked() -> pd.DataFrame:
        if len(steps.numbers):
            findings, whole_s = bottlenecks.find(evidence()), steps.mean_s
        else:
            findings = bottlenecks.find_without_steps(made["gpu"], made["collectives"])
            whole_s = span_s(made["gpu"])
        return bottlenecks.table(findings, whole_s, [suggest(finding, record.tunable) for finding in findings])

    steady = rows["step"].isin(steps.numbers)
    made = Tables(
        {
            "coverage": lambda: ledger.table,
            "osrt": lambda: tables.osrt_table(traces),
            "waitpid": lambda: tables.waitpid_table(traces),
            "waitpid_windows": lambda: tables.waitpid_windows(traces),
            "steps": lambda: tables.steps_table(traces, steps.warmup_number),
            "phases": lambda: phases_table(traces, rows, steps.warmup_number),
            "phases_summary": lambda: phases_summary(made["phases"], steps),
            "efficiency": lambda: efficiency(made["phases"], steps, reference, samples_per_step(record.config)),
            "collectives": lambda: tables.collectives_table(rows),
            "comm_wait": lambda: comm_wait(evidence()),
            "gpu": lambda: tables.gpu_table(traces, rows, steps.warmup_number),
            "projection": lambda: tables.projection_table(traces),
            "delays": lambda: tables.delays_table(evidence()),
            "startup": lambda: startup_table(record.startup),
            "clock": lambda: clock.table,
            "environment": lambda: environment_table(ledger.used),
            "bottlenecks": ranked,
        }
    )
    return Study(
        name=record.name,
        tables=made,
        traces=tuple(traces),
        collectives=rows,
        steps=steps,
        wait_matrix=wait_matrix(rows, len(traces), steady) / 1e9 / max(len(steps.numbers), 1),
        clock=clock,
        complete=ledger.complete,
        failed_run=record.folder if record.failed_before_steps else "",
    )


def _read(
    sources: Sequence[ReportSource],
    record: RunRecord,
    converter: Converter,
    progress: Progress,
    *,
    keep_cache: bool,
    calls_alone: bool = False,
) -> ReportInventory:
    reduce = observe_calls if calls_alone else observe
    readings = read_all(sources, converter, reduce, progress, keep_cache=keep_cache, calls_alone=calls_alone)
    facts = [facts_of(one) for one in readings]
    ledger = take_inventory(facts, record)
    if not any(fact.events for fact in facts):
        reasons = [fact.damage for fact in facts if fact.damage] or list(ledger.table["reason"]) or ["there are none."]
        there = f"none of the {len(sources)} reports is usable" if sources else "there are no reports yet"
        if record.failed_before_steps:
            raise HpcmmError(f"{there}: {why_failed(record.folder)}")
        raise HpcmmError(f"{there}; of the first rank: {reasons[0]}")
    return ledger


def _on_one_clock(ledger: ReportInventory) -> tuple[list[RankTrace], CommonClock]:
    """Traces of the ledger in run time, which begins with the first event of the run."""
    epochs = [fact.epoch_ns for fact, _ in ledger.used]
    begins = [fact.epoch_ns + fact.first_ns for fact, _ in ledger.used if fact.epoch_ns is not None]
    origin = min(begins, default=min((fact.first_ns for fact, _ in ledger.used), default=0))
    raw = [
        trace.on_clock(ReportClock.uncorrected(epoch, origin))
        for epoch, (_, trace) in zip(epochs, ledger.used, strict=True)
    ]
    matched = nccl.confirm_order(collectives.match(raw), UNSYNCHRONISED_ERROR_NS)
    usable = matched[matched["synchronising"].astype(bool)] if len(matched) else matched
    arrivals = Arrivals(_matrix(usable, "start_ns", len(raw)), _matrix(usable, "end_ns", len(raw)))
    clock = common_clock(epochs, [trace.node for trace in raw], origin, arrivals)
    firsts = [own(np.array([fact.first_ns])) for (fact, _), own in zip(ledger.used, clock.clocks, strict=True)]
    begin = np.min(firsts) if firsts else 0
    moved = [
        trace.on_clock(lambda times, own=own: own(times) - begin)  # type: ignore[misc]
        for (_, trace), own in zip(ledger.used, clock.clocks, strict=True)
    ]
    return moved, clock


def _matrix(rows: pd.DataFrame, column: str, traces: int) -> np.ndarray:
    """``column`` by instance and trace, NaN where a trace has no part."""
    instances = rows["instance"].unique()
    matrix = np.full((len(instances), traces), np.nan)
    position = pd.Series(np.arange(len(instances)), index=instances)
    matrix[position[rows["instance"]].to_numpy(), rows["trace"].to_numpy(np.intp)] = rows[column].to_numpy(np.float64)
    return matrix
