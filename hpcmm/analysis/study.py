"""The whole analysis in one line: captures, traces on one clock, matched collectives, charges, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hpcmm.analysis import bottlenecks, collectives, tables
from hpcmm.analysis.comm_wait import comm_wait, wait_matrix
from hpcmm.analysis.coverage import Ledger, assess, facts_of
from hpcmm.analysis.steps import StepTimes, step_times
from hpcmm.analysis.suggestions import suggest
from hpcmm.analysis.trace import RankTrace, extract_traces
from hpcmm.errors import HpcmmError
from hpcmm.reports.clock import Arrivals, CommonClock, ReportClock, common_clock
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import ReportSource
from hpcmm.reports.load import Progress, read_all
from hpcmm.reports.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that the tables and the page are made of. Times of ``traces`` are run time, in nanoseconds."""

    name: str
    tables: dict[str, pd.DataFrame]
    traces: tuple[RankTrace, ...]
    collectives: pd.DataFrame
    """Matched collectives with waits, in nanoseconds."""
    steps: StepTimes
    wait_matrix: np.ndarray
    """Seconds a step that each trace (row) waited for each other (column)."""
    clock: CommonClock
    complete: bool


def study(
    sources: Sequence[ReportSource], record: RunRecord, cache: Path, progress: Progress, *, keep_cache: bool = False
) -> Study:
    """Read ``sources`` and derive all tables.

    Raises HpcmmError when no report can be read.
    """
    ledger = _read(sources, record, Converter.locate(cache), progress, keep_cache=keep_cache)
    progress("aligning clocks", 0, 1)
    traces, clock = _on_one_clock(ledger)
    progress("matching collectives", 0, 1)
    rows = collectives.estimate_waits(collectives.match(traces), clock.error_ns)
    rows = collectives.expose(rows.assign(bus_bytes_per_s=collectives.bus_bandwidth(rows)), traces)
    steps = step_times(traces)
    progress("finding bottlenecks", 0, 1)
    stepping = [trace for trace in traces if len(trace.steps)]
    findings = bottlenecks.find(bottlenecks.gather(traces, rows, steps, ledger.expected_ranks)) if stepping else []
    suggestions = [suggest(finding, record.config) for finding in findings]
    warmup = steps.warmup_number
    steady = rows["step"].isin(steps.numbers)
    return Study(
        name=record.name,
        tables={
            "coverage": ledger.table,
            "osrt": tables.osrt_table(traces),
            "waitpid": tables.waitpid_table(traces),
            "waitpid_windows": tables.waitpid_windows(traces),
            "steps": tables.steps_table(traces, warmup),
            "phases": tables.phases_table(traces, warmup),
            "collectives": tables.collectives_table(rows),
            "comm_wait": comm_wait(traces, rows, steps),
            "clock": clock.table,
            "bottlenecks": bottlenecks.table(findings, steps.mean_s, suggestions),
        },
        traces=tuple(traces),
        collectives=rows,
        steps=steps,
        wait_matrix=wait_matrix(rows, len(traces), steady) / 1e9 / max(len(steps.numbers), 1),
        clock=clock,
        complete=ledger.complete,
    )


def _read(
    sources: Sequence[ReportSource], record: RunRecord, converter: Converter, progress: Progress, *, keep_cache: bool
) -> Ledger:
    facts = []
    for reading in read_all(sources, converter, progress, keep_cache=keep_cache):
        traces = extract_traces(reading.report) if reading.report is not None else []
        facts.append(facts_of(reading, traces))
    ledger = assess(facts, record)
    if not any(fact.events for fact in facts):
        reasons = [fact.damage for fact in facts if fact.damage] or list(ledger.table["reason"]) or ["there are none."]
        there = f"none of the {len(sources)} reports is usable" if sources else "there are no reports yet"
        raise HpcmmError(f"{there}; of the first rank: {reasons[0]}")
    return ledger


def _on_one_clock(ledger: Ledger) -> tuple[list[RankTrace], CommonClock]:
    """Traces of the ledger in run time, which begins with the first event of the run."""
    epochs = [fact.epoch_ns for fact, _ in ledger.used]
    begins = [fact.epoch_ns + fact.first_ns for fact, _ in ledger.used if fact.epoch_ns is not None]
    origin = min(begins, default=min((fact.first_ns for fact, _ in ledger.used), default=0))
    raw = [
        trace.on_clock(ReportClock.uncorrected(epoch, origin))
        for epoch, (_, trace) in zip(epochs, ledger.used, strict=True)
    ]
    matched = collectives.match(raw)
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
