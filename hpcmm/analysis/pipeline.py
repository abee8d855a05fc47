"""The whole analysis in one line: traces of all ranks, on one clock, matched collectives, attributed waits, tables.

It is pure: :mod:`hpcmm.analyze.analysis` reads the reports and hands over what became of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache

import numpy as np
import pandas as pd

from hpcmm.analysis import (
    bottlenecks,
    collectives,
    completeness,
    copies,
    gpu_trace,
    host_calls,
    idle,
    nccl,
    osrt,
    parallelism,
    phases,
    process_groups,
    projection,
    time_tables,
    user_ranges,
    waitpid,
)
from hpcmm.analysis.advice import WITHOUT_PYTHON
from hpcmm.analysis.choice import NO_WHOLE_STEP
from hpcmm.analysis.clock import UNSYNCHRONISED_ERROR_NS, Arrivals, CommonClock, ReportClock, common_clock
from hpcmm.analysis.findings import AnalysisContext, Finding, gpu_doubt
from hpcmm.analysis.gpu_findings import span_s
from hpcmm.analysis.phases import StepTimes, step_times
from hpcmm.analysis.pop_metrics import Reference, efficiency, samples_per_step
from hpcmm.analysis.report_inventory import NO_NVTX, NO_STEPS, ReportInventory
from hpcmm.analysis.study import TABLES, Selection, Study, Tables, step_line
from hpcmm.analysis.suggestions import suggest
from hpcmm.analysis.time_tables import FirstStep, comm_wait, phases_summary, phases_table, startup_table, wait_matrix
from hpcmm.analysis.trace import RankTrace
from hpcmm.errors import HpcmmError
from hpcmm.reports.report import Parts, Progress
from hpcmm.reports.run_record import RunRecord
from hpcmm.runs.throughput import in_words
from hpcmm.text import printable

OF_OS_CALLS = frozenset({"osrt", "environment", "startup"})
"""Tables that need no other rank, no clock and no collective: for these alone, little of a report is read."""


def parts_for(chosen: Collection[str] | None) -> Parts:
    """What the tables ``chosen`` need of the reports; None stands for all tables.

    Raises HpcmmError for a table that does not exist.
    """
    for name in chosen or ():
        if name not in TABLES:
            raise HpcmmError(f"there is no table {printable(name)}: choose among {', '.join(TABLES)}.")
    return Parts.ALL if chosen is None or not OF_OS_CALLS.issuperset(chosen) else Parts.OS_CALLS


def some_tables(
    chosen: Collection[str],
    inventory: ReportInventory,
    record: RunRecord,
    progress: Progress,
    reference: Reference | None = None,
) -> Selection:
    """The tables ``chosen`` alone; no more is done than they need.

    Raises HpcmmError for a table that does not exist.
    """
    of_calls = parts_for(chosen) is Parts.OS_CALLS
    made = _of_calls(inventory, record) if of_calls else study(inventory, record, progress, reference).tables
    selected = Tables({name: lambda name=name: made[name] for name in TABLES if name in chosen})  # type: ignore[misc]
    return Selection(record.name, selected, inventory.complete)


def _of_calls(inventory: ReportInventory, record: RunRecord) -> Tables:
    traces = [trace for _, trace in inventory.used]
    return Tables(
        {
            "osrt": lambda: osrt.osrt_table(traces),
            "environment": lambda: _environment(inventory),
            "startup": lambda: startup_table(record.startup, _first_steps(inventory, record)),
        }
    )


def _environment(inventory: ReportInventory) -> pd.DataFrame:
    """Variables of the program that nsys started, by rank. ``[redacted]`` stands for values that may be secrets.

    Ranks that were captured in one report share its environment, which is that of their launcher.
    """
    rows = [
        (trace.rank, trace.node, variable, value)
        for fact, trace in inventory.used
        for variable, value in sorted(fact.identity.environment.items())
    ]
    return pd.DataFrame(rows, columns=["rank", "node", "variable", "value"])


def _first_steps(inventory: ReportInventory, record: RunRecord) -> Iterator[FirstStep]:
    """Of a capture that holds the start. A report begins with its process."""
    profile = record.config.get("profile")
    if isinstance(profile, dict) and profile.get("steps"):
        return
    for fact, trace in inventory.used:
        if len(trace.steps) and not trace.is_warm:
            first = trace.steps.sort_values("start_ns").iloc[0]
            begin, end = float(first["start_ns"]), float(first["end_ns"])
            yield FirstStep(trace.rank, max(0.0, begin - fact.first_ns) / 1e9, (end - begin) / 1e9)


def study(
    inventory: ReportInventory, record: RunRecord, progress: Progress, reference: Reference | None = None
) -> Study:
    """All tables, from the traces of all ranks; computation scaling is against ``reference``."""
    progress("aligning clocks", 0, 1)
    traces, clock = on_one_clock(inventory)
    traces = phases.group_rare_phases([process_groups.with_record(trace, record.groups) for trace in traces])
    progress("matching collectives", 0, 1)
    rows = collectives.match_with_waits(traces, clock.error_ns, clock.shared)
    steps = step_times(traces)
    framework = _framework(inventory, record)

    @cache
    def context() -> AnalysisContext:
        progress("finding bottlenecks", 0, 1)
        return bottlenecks.gather(traces, rows, steps, inventory.expected_ranks, made, record.network)

    def ranked() -> pd.DataFrame:
        if len(steps.numbers):
            findings, whole_s = bottlenecks.find(context()), steps.period_s
        else:
            findings, whole_s = _found_without_steps(made, rows, traces, inventory.expected_ranks, record)
        return bottlenecks.table(findings, whole_s, _suggestions(findings, inventory, record))

    made = Tables(
        {
            "coverage": lambda: inventory.table,
            **_of_os_calls(traces),
            "steps": lambda: time_tables.steps_table(traces, steps.warmup_number),
            "phases": lambda: phases_table(traces, rows, steps.warmup_number),
            "phases_summary": lambda: phases_summary(made["phases"], steps),
            "efficiency": lambda: _efficiency(made["phases"], inventory, rows, steps, record, reference),
            "collectives": lambda: collectives.collectives_table(parallelism.with_axes(rows, traces)),
            "comm_bytes": lambda: collectives.bytes_table(made["collectives"], steps.warmup_number),
            "comm_wait": lambda: comm_wait(context()),
            "gpu": lambda: gpu_trace.gpu_table(traces, rows, steps.warmup_number),
            **_of_gpus(traces, steps.warmup_number),
            "delays": lambda: time_tables.delays_table(context()),
            "startup": lambda: startup_table(record.startup, _first_steps(inventory, record)),
            "clock": lambda: clock.table,
            "environment": lambda: _environment(inventory),
            "bottlenecks": ranked,
        }
    )
    return Study(
        name=record.name,
        tables=made,
        traces=tuple(traces),
        collectives=rows,
        steps=steps,
        wait_matrix=wait_matrix(rows, len(traces), rows["step"].isin(steps.numbers)) / 1e9 / max(len(steps.numbers), 1),
        clock=clock,
        complete=inventory.complete,
        throughput=in_words(record.throughput) if record.throughput else "",
        failed_run=record.folder if record.failed else "",
        failed_before_steps=record.failed_before_steps and not any(len(trace.steps) for trace in traces),
        ranges=user_ranges.in_words([fact.adopted for fact, _ in inventory.used if fact.adopted is not None]),
        line_to_add=step_line(framework) if _lacks_steps(inventory.table) else "",
    )


def _framework(inventory: ReportInventory, record: RunRecord) -> str:
    """What the run trains with: as its script says, or that it has no Python; empty if that is not known."""
    has_no_python = [fact.has_no_python for fact, _ in inventory.used]
    return record.framework or (WITHOUT_PYTHON if has_no_python and all(has_no_python) else "")


def _suggestions(findings: Sequence[Finding], inventory: ReportInventory, record: RunRecord) -> list[str]:
    """What to try against each of ``findings``."""
    found = [fact.identity.environment for fact, _ in inventory.used]
    # A report without an environment, as one that was made smaller, may be of any run.
    has_slurm = bool(record.config) or not all(found) or any(each.startswith("SLURM") for own in found for each in own)
    framework = _framework(inventory, record)
    return [suggest(each, record.tunable, record.cpus, framework, has_slurm=has_slurm) for each in findings]


def _efficiency(
    of_phases: pd.DataFrame,
    inventory: ReportInventory,
    rows: pd.DataFrame,
    steps: StepTimes,
    record: RunRecord,
    reference: Reference | None,
) -> pd.DataFrame:
    alone = inventory.expected_ranks <= 1 and sum(len(trace.steps) > 0 for _, trace in inventory.used) <= 1
    silent = process_groups.silent_ranks([trace for _, trace in inventory.used if len(trace.steps)])
    samples = samples_per_step(record.config)
    return efficiency(of_phases, steps, reference, samples, waiting_is_known=alone or (len(rows) > 0 and not silent))


def _lacks_steps(coverage: pd.DataFrame) -> bool:
    """Whether a report has no steps, and not for the window that was asked for."""
    lacking = coverage["status"].isin([NO_NVTX, NO_STEPS])
    return bool((lacking & ~coverage["reason"].str.contains(NO_WHOLE_STEP, regex=False)).any())


def _of_os_calls(traces: Sequence[RankTrace]) -> dict[str, Callable[[], pd.DataFrame]]:
    return {
        "osrt": lambda: osrt.osrt_table(traces),
        "waitpid": lambda: waitpid.waitpid_table(traces),
        "waitpid_windows": lambda: waitpid.waitpid_windows(traces),
    }


def _of_gpus(traces: Sequence[RankTrace], warmup_step: int | None) -> dict[str, Callable[[], pd.DataFrame]]:
    return {
        "idle": lambda: idle.idle_table(traces, warmup_step),
        "copies": lambda: copies.copies_table(traces),
        "kernels": lambda: gpu_trace.kernels_table(traces),
        "projection": lambda: projection.projection_table(traces),
    }


def _found_without_steps(
    made: Tables, rows: pd.DataFrame, traces: Sequence[RankTrace], expected_ranks: int, record: RunRecord
) -> tuple[list[Finding], float]:
    """Findings of a capture without steps, and the seconds that they are shares of."""
    unseen = process_groups.unseen_ranks(rows, traces, expected_ranks)
    if made["gpu"].empty:
        # Collectives that are annotated tell more than OS calls, and of a run that failed there is no loop.
        return host_calls.find([] if record.failed_before_steps or len(rows) else traces, unseen)
    return bottlenecks.find_without_steps(made, unseen, gpu_doubt(traces)), span_s(made["gpu"])


def on_one_clock(inventory: ReportInventory) -> tuple[list[RankTrace], CommonClock]:
    """Traces of the inventory in run time, which begins with the first event of the run."""
    epochs = [fact.epoch_ns for fact, _ in inventory.used]
    begins = [fact.epoch_ns + fact.first_ns for fact, _ in inventory.used if fact.epoch_ns is not None]
    origin = min(begins, default=min((fact.first_ns for fact, _ in inventory.used), default=0))
    raw = [
        trace.with_collectives_on(ReportClock.uncorrected(epoch, origin))
        for epoch, (_, trace) in zip(epochs, inventory.used, strict=True)
    ]
    matched = nccl.confirm_order(collectives.match(raw), UNSYNCHRONISED_ERROR_NS)
    # Ends of collectives that all ranks leave together show how far the clocks are apart.
    usable = matched[matched["synchronising"].astype(bool)] if len(matched) else matched
    arrivals = Arrivals(_matrix(usable, "start_ns", len(raw)), _matrix(usable, "end_ns", len(raw)))
    clock = common_clock(epochs, [trace.node for trace in raw], origin, arrivals)
    firsts = [own(np.array([fact.first_ns])) for (fact, _), own in zip(inventory.used, clock.clocks, strict=True)]
    begin = np.min(firsts) if firsts else 0
    moved = [
        trace.on_clock(lambda times, own=own: own(times) - begin)  # type: ignore[misc]
        for (_, trace), own in zip(inventory.used, clock.clocks, strict=True)
    ]
    return completeness.without_other_reports(moved, [fact.path for fact, _ in inventory.used]), clock


def _matrix(rows: pd.DataFrame, column: str, traces: int) -> np.ndarray:
    """``column`` by instance and trace, NaN where a trace has no part."""
    instances = rows["instance"].unique()
    matrix = np.full((len(instances), traces), np.nan)
    position = pd.Series(np.arange(len(instances)), index=instances)
    matrix[position[rows["instance"]].to_numpy(), rows["trace"].to_numpy(np.intp)] = rows[column].to_numpy(np.float64)
    return matrix
