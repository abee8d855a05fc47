"""The analysis as Python sees it: a study of reports, and one method a table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from hpcmm.analysis.choice import CHOOSE_FOR_ME, Choice
from hpcmm.analysis.extraction import ReportFacts, common_steps, has_other_steps, observe, warm
from hpcmm.analysis.pipeline import parts_for, some_tables, study
from hpcmm.analysis.pop_metrics import Reference
from hpcmm.analysis.report_inventory import ReportInventory, take_inventory
from hpcmm.analysis.study import Selection, Study, why_failed
from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import find_folder
from hpcmm.node.cache import private_folder
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import Found, ReportSource, find_reports
from hpcmm.reports.load import read_all
from hpcmm.reports.report import TEXT_AS_PYTHON, Parts, Progress
from hpcmm.reports.run_record import RunRecord, read_run_record
from hpcmm.runs.ownership import exchangeable
from hpcmm.text import printable

ALL_READ, PARTIAL = 0, 2

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What ``analyze`` found. Each method returns a table, made when it is first asked for, as a frame of your own.

    Times end in ``_s`` (seconds), sizes are bytes; ``step`` is missing where something lies outside any step. A
    negative rank is a process whose report does not tell its rank. ``docs/tables.md`` explains every column.
    """

    made: Study | Selection
    record: RunRecord
    """What the run directory says of itself; empty without one."""
    out: Path
    """Where :meth:`write` writes: the folder given, else the run's ``analysis``, else ``./analysis``."""

    @property
    def study(self) -> Study:
        """All that the page is made of. Raises HpcmmError if only some tables were asked for."""
        if isinstance(self.made, Study):
            return self.made
        raise HpcmmError(f"only {', '.join(self.tables)} was asked for: analyse without tables= for all that there is.")

    @property
    def name(self) -> str:
        """The run's name; empty if reports came without a run directory."""
        return self.made.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's frozen configuration; empty if it is not known."""
        return self.record.config

    @property
    def complete(self) -> bool:
        """Whether every report was read and every rank that should have one has."""
        return self.made.complete

    @property
    def exit_status(self) -> int:
        """Of the command: 0 when complete, else 2."""
        return ALL_READ if self.complete else PARTIAL

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All tables by name, those of the methods below; or those that were asked for."""
        return self.made.tables

    def write(self, folder: str | Path | None = None) -> Path:
        """Write all tables (CSV, Parquet), summary.md, report.html and trace.json.gz; returns the folder.

        Of an analysis of some tables only these are written.


        Raises HpcmmError with nothing changed there when the folder cannot be written.
        """
        target = self.out if folder is None else Path(folder)
        # A notebook needs no page, 0.2 s of imports, and some tables do not, either.
        if isinstance(self.made, Study):
            from hpcmm.page.outputs import write_outputs  # noqa: PLC0415

            write_outputs(self.made, target)
        else:
            from hpcmm.page.outputs import table_files, write_all  # noqa: PLC0415

            write_all(target, table_files(self.tables))
        return target

    def _table(self, name: str) -> pd.DataFrame:
        if name not in self.tables:
            raise HpcmmError(f"table {name} was not asked for, only {', '.join(self.tables)}.")
        return self.tables[name].copy(deep=False)

    def bottlenecks(self) -> pd.DataFrame:
        """What a step loses, ranked: cause, lost_s_per_step, step_share, rank, node, phase, evidence, suggestion."""
        return self._table("bottlenecks")

    def coverage(self) -> pd.DataFrame:
        """Every expected rank and every report: rank, node, status, steps, events, span_s, reason, report."""
        return self._table("coverage")

    def steps(self) -> pd.DataFrame:
        """Each step of each rank: start_s, duration_s, warmup."""
        return self._table("steps")

    def phases(self) -> pd.DataFrame:
        """Rank x step x phase, communication apart (``within`` its phase): duration_s, useful_s, wait_s, transfer_s."""
        return self._table("phases")

    def phases_summary(self) -> pd.DataFrame:
        """Rank x phase without warm-up: mean_s, p50_s, p95_s, max_s, variation; warmup_s apart."""
        return self._table("phases_summary")

    def efficiency(self) -> pd.DataFrame:
        """The POP efficiencies (0 to 1) of the run, each step and each phase, in column ``scope``."""
        return self._table("efficiency")

    def startup(self) -> pd.DataFrame:
        """Each part of the start, by attempt: median_s and longest_s over the ranks, slowest_rank, ranks."""
        return self._table("startup")

    def collectives(self) -> pd.DataFrame:
        """Each rank's part in each collective: start_s, end_s, wait_s, transfer_s, bus_bytes_per_s, late_rank."""
        return self._table("collectives")

    def comm_bytes(self) -> pd.DataFrame:
        """What each rank exchanges in each step, by group and operation: messages, bytes, bus_bytes."""
        return self._table("comm_bytes")

    def comm_wait(self) -> pd.DataFrame:
        """Rank x phase, seconds a step: waiting, transfer, what was overlapped, who was waited for and in what."""
        return self._table("comm_wait")

    def delays(self) -> pd.DataFrame:
        """What each rank's delays cost all ranks, by step and part of its work: lost_s."""
        return self._table("delays")

    def osrt(self) -> pd.DataFrame:
        """Calls into the OS by rank, thread role, function: calls, total_s, union_s, in_step_s, p50_s, p95_s."""
        return self._table("osrt")

    def waitpid(self) -> pd.DataFrame:
        """Every wait for a child process: rank, role, child, step, phase, start_s, duration_s, verdict."""
        return self._table("waitpid")

    def waitpid_windows(self) -> pd.DataFrame:
        """Waits for child processes coalesced: rank, role, verdict, start_s, end_s, calls, union_s."""
        return self._table("waitpid_windows")

    def clock(self) -> pd.DataFrame:
        """Each node's clock against the first node's: offset_s, drift_ppm, residual_s, error_s, collectives."""
        return self._table("clock")

    def environment(self) -> pd.DataFrame:
        """Environment variables of every rank, with every value redacted that is not on the allow-list."""
        return self._table("environment")

    def gpu(self) -> pd.DataFrame:
        """Device x step where CUDA was traced: compute_s, comm_s, overlap_s, exposed_comm_s, idle_s and its cause."""
        return self._table("gpu")

    def idle(self) -> pd.DataFrame:
        """Why each GPU had nothing to do: idle_s by cause, function (what) and range; gaps and the largest one."""
        return self._table("idle")

    def copies(self) -> pd.DataFrame:
        """Copies of each GPU by direction and host memory: copies, bytes, copy_s, exposed_s, bytes_per_s."""
        return self._table("copies")

    def kernels(self) -> pd.DataFrame:
        """The kernels of each GPU that take the most time: calls, total_s, time_share, communication."""
        return self._table("kernels")

    def projection(self) -> pd.DataFrame:
        """NVTX ranges projected on the GPU where CUDA was traced: calls, host_s, gpu_envelope_s, gpu_union_s."""
        return self._table("projection")

    def wait_matrix(self) -> pd.DataFrame:
        """Who (row: rank) waited for whom (column: rank), seconds a step."""
        ranks = [trace.rank for trace in self.study.traces]
        return pd.DataFrame(
            self.study.wait_matrix.copy(),
            index=pd.Index(ranks, name="rank"),
            columns=pd.Index(ranks, name="waited_for_rank"),
        )


@pd.option_context(*TEXT_AS_PYTHON)
def analyze(
    paths: Paths,
    out: str | Path | None = None,
    *,
    tables: Collection[str] | None = None,
    reference: Reference | None = None,
    keep_cache: bool = False,
    progress: Progress | None = None,
    choice: Choice = CHOOSE_FOR_ME,
) -> Analysis:
    """Analyse the reports under ``paths``: run directories, runs' names (in ``./runs``), folders of reports, reports.

    Nothing is written unless ``out`` names a folder (or :meth:`Analysis.write` is called). With ``tables``, names of
    tables, no more is done than these need, which for ``osrt`` alone is far less. ``reference`` is what
    :func:`hpcmm.analyze.runs.read_reference` gives. With ``keep_cache`` the SQLite exports stay in ``out/cache``.
    ``choice`` says which NVTX ranges are steps and phases, and which part of the run counts.

    Raises HpcmmError when nothing there is usable, for a table that does not exist, and for ranges that nobody wrote.
    """
    found = find_reports(as_paths(paths))
    if not found.sources and found.run_dir is None:
        told = ", ".join(map(str, as_paths(paths)))
        raise HpcmmError(f"no nsys reports in {told}: give a run directory or report files.")
    record = read_run_record(found.run_dir)
    parts = parts_for(tables)
    report_progress = progress or (lambda _what, _done, _of: None)
    with _cache(None if out is None else Path(out) / "cache", keep=keep_cache) as cache:
        converter = Converter.locate(cache)
        reader = _Reader(converter, parts, report_progress, keep_cache=keep_cache and out is not None)
        facts = _observed(found.sources, reader, choice)
    inventory = _usable_inventory(facts, record)
    made: Study | Selection = (
        study(inventory, record, report_progress, reference)
        if tables is None
        else some_tables(tables, inventory, record, report_progress, reference)
    )
    if isinstance(made, Study):
        made = replace(made, window=choice.window)
    analysis = Analysis(made, record, Path(out) if out is not None else default_folder(found))
    if out is not None:
        analysis.write()
    return analysis


@contextmanager
def _cache(wanted: Path | None, *, keep: bool) -> Iterator[Path]:
    """Where the exports go, which hold the environment of the processes: ``wanted``, or the temporary folder if members
    of a group, or others, could exchange that.

    Raises HpcmmError if it shall be kept there all the same, or they could exchange the temporary folder too.
    """
    found = None if wanted is None else exchangeable(wanted)
    if wanted is not None and found is None:
        yield wanted
        return
    if found is not None and keep:
        raise HpcmmError(
            f"{found.why}, so others could read the ranks' environment in {wanted}: leave --keep-cache out, or name a "
            "folder of your own with --out."
        )
    with private_folder("hpcmm-") as scratch:
        yield scratch / "cache"


@dataclass(frozen=True, slots=True)
class _Reader:
    """How reports become facts."""

    converter: Converter
    parts: Parts
    progress: Progress
    keep_cache: bool

    def read(self, sources: Sequence[ReportSource], choice: Choice) -> list[ReportFacts]:
        """Traces and facts of each of ``sources``; of one that could not be read, the reason."""
        readings = read_all(
            sources,
            self.converter,
            partial(observe, choice=choice),
            self.progress,
            keep_cache=self.keep_cache,
            parts=self.parts,
            every_range=choice.needs_ranges,
        )
        return [
            reading.value
            or ReportFacts(
                reading.source.path,
                damage=printable(reading.reason),
                is_of_a_newer_nsys=reading.is_of_a_newer_nsys,
            )
            for reading in readings
        ]


def _observed(sources: Sequence[ReportSource], reader: _Reader, choice: Choice) -> list[ReportFacts]:
    """Facts of all reports, whose steps are called alike. What needs another report to be known is read again.

    Raises HpcmmError if no report has the ranges that ``choice`` names, or anything at the time.
    """
    if choice.is_timed and len(sources) > 1:
        everything = replace(choice, from_s=None, to_s=None)
        begins = [fact.epoch_ns + fact.first_ns for fact in reader.read(sources, everything) if fact.epoch_ns]
        choice = replace(choice, origin_ns=min(begins, default=None))
    facts = reader.read(sources, choice)
    _refuse_unknown_ranges(facts, choice)
    label = common_steps(facts)
    others = [at for at, fact in enumerate(facts) if label and has_other_steps(fact, label)]
    if others and not choice.steps:
        _read_again(facts, others, sources, reader, replace(choice, usual_steps=label))
    _begin_alike(facts, sources, reader, choice)
    return warm(facts)


def _begin_alike(facts: list[ReportFacts], sources: Sequence[ReportSource], reader: _Reader, choice: Choice) -> None:
    """Have all steps that are no ranges themselves begin by one rule, or no report have such steps.

    What comes between two steps, as an evaluation, would be in different steps of the ranks otherwise.
    """
    rules = {at: fact.adopted.begin_rules for at, fact in enumerate(facts) if fact.adopted and fact.adopted.begins}
    if not rules:
        return
    lacking = [fact for fact in facts if fact.traces and not fact.has_steps]  # whose waiting would be in no row
    first, *others = rules.values()
    common = [] if lacking else [rule for rule in first if all(rule in each for each in others)]
    if common:
        differing = [at for at, each in rules.items() if each[0] != common[0]]
        _read_again(facts, differing, sources, reader, replace(choice, begin_rule=common[0]))
    else:
        _read_again(facts, list(rules), sources, reader, replace(choice, needs_step_ranges=True))


def _read_again(
    facts: list[ReportFacts], places: Sequence[int], sources: Sequence[ReportSource], reader: _Reader, choice: Choice
) -> None:
    """Put the facts that ``choice`` gives at ``places`` into ``facts``."""
    for at, fact in zip(places, reader.read([sources[at] for at in places], choice), strict=True):
        facts[at] = fact


def _refuse_unknown_ranges(facts: Sequence[ReportFacts], choice: Choice) -> None:
    adopted = [fact.adopted for fact in facts if fact.adopted is not None]
    candidates = list(dict.fromkeys(told for each in adopted for told in each.candidates))
    there = f"; ranges that come again and again are {', '.join(candidates[:10])}" if candidates else ""
    if choice.steps and not any(each.steps for each in adopted):
        raise HpcmmError(f"no NVTX range of these reports is called as --steps {choice.steps!r} says{there}.")
    if choice.phases and not any(each.phases for each in adopted):
        raise HpcmmError(f"no NVTX range within a step is called as --phases {choice.phases!r} says{there}.")
    if not choice.is_whole and not any(fact.traces for fact in facts):
        if choice.between and not choice.is_timed:
            raise HpcmmError(f"nothing of these reports lies within what --between {choice.between!r} asks for{there}.")
        reasons = [fact.no_ranges for fact in facts if fact.no_ranges]
        told = f": of the first one, {reasons[0]}" if reasons else ""
        raise HpcmmError(f"--from and --to leave nothing of these reports{told}.")


def _usable_inventory(facts: Sequence[ReportFacts], record: RunRecord) -> ReportInventory:
    """What became of each report. Raises HpcmmError when no report is usable."""
    inventory = take_inventory(facts, record)
    if any(fact.events for fact in facts):
        return inventory
    reasons = [fact.damage for fact in facts if fact.damage] or list(inventory.table["reason"]) or ["there are none."]
    there = f"none of the {len(facts)} reports is usable" if facts else "there are no reports yet"
    if record.failed_before_steps:
        raise HpcmmError(f"{there}: {why_failed(record.folder)}")
    raise HpcmmError(f"{there}; of the first rank: {reasons[0]}")


def default_folder(found: Found) -> Path:
    """Where the command writes when it is not told: ``analysis`` of the run directory, else of the current folder."""
    return found.run_dir.analysis if found.run_dir is not None else Path("analysis")


def as_paths(paths: Paths) -> list[Path]:
    """One path or several as a list, with the name of a run as its directory in ``./runs``."""
    given = [paths] if isinstance(paths, str | Path) else paths
    return [find_folder(Path(path)) for path in given]
