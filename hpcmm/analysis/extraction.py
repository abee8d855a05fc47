"""From the events of one report to the traces of its ranks, and the facts that outlive them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcmm.analysis import gpu_trace, osrt, phases, waitpid
from hpcmm.analysis.choice import CHOOSE_FOR_ME, Choice, cut, no_whole_step, stepped_before, why_nothing, window_of
from hpcmm.analysis.completeness import UUID
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.trace import COLLECTIVE_COLUMNS, NO_PEER, NO_SIZE, NOT_LAUNCHED, UNEVEN, RankTrace
from hpcmm.analysis.user_ranges import Adopted, adopt, adopt_phases
from hpcmm.annotate import schema
from hpcmm.reports.report import IMPOSSIBLE, LOADER_NAME, UNKNOWN, CudaEvents, Identity, Parts, Report
from hpcmm.text import printable

NVTX_NEEDS_NSYS = (2024, 1)
"""First nsys under which the Python package nvtx >= 0.2.12 records anything: it asks whether its domain is enabled."""
FEW_RANGES = 0.1
"""A process that writes less than this share of the NVTX ranges of those that train is none of them."""
OLDER_NVTX = "install nvtx==0.2.11, or trace with --trace=nvtx"


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What is kept of a report once its events are gone: its traces, and what the inventory says of it."""

    path: Path
    traces: tuple[RankTrace, ...] = ()
    identity: Identity = field(default_factory=lambda: Identity(None, None, None))
    nsys_version: str = ""
    spans: int = 0
    """Ranges of the annotation."""
    events: int = 0
    span_s: float = 0.0
    epoch_ns: int | None = None
    first_ns: int = 0
    no_ranges: str = ""
    """Why the report has no steps; empty when it has."""
    has_nvtx: bool = False
    """Whether it holds any NVTX ranges, of whatever domain."""
    gpu_missing: bool = False
    """CUDA was asked for, but left no events."""
    damage: str = ""
    adopted: Adopted | None = None
    """Steps and phases that are the program's own ranges, or what could be; None if hpcmm's annotation has them."""
    doubts: str = ""
    """What of it may have been lost."""
    stepped_before: frozenset[int] = frozenset()
    """Processes that ran steps before those that are looked at."""
    has_no_python: bool = False
    """Its workers are no Python programs, as far as it tells."""
    is_of_a_newer_nsys: bool = False
    """It could not be read because nsys here is older than the one that wrote it."""

    @property
    def has_steps(self) -> bool:
        """Whether its ranges name steps, in the window that was asked for or elsewhere."""
        return self.adopted is None or bool(self.adopted.steps or self.adopted.begins)

    @property
    def name(self) -> str:
        return printable(self.path.name)

    @property
    def job_id(self) -> str | None:
        return self.identity.job_id


def observe(report: Report, choice: Choice = CHOOSE_FOR_ME) -> ReportFacts:
    """Traces and facts of a report; ``choice``: which of its ranges are steps and phases, and what of its time counts.

    Of a report that has nothing then there are facts, but no traces.
    """
    whole, adopted = with_user_ranges(report, choice)
    before = frozenset[int]() if adopted is None else adopted.stepped_before
    no_steps = ""
    report = whole
    traces: tuple[RankTrace, ...] = ()
    if choice.is_whole:
        traces = tuple(extract_traces(whole))
    elif (window := window_of(whole, choice)) is not None:
        before |= stepped_before(whole, window)
        if not window.is_empty:
            report = cut(whole, window)
            workers = workers_of(whole) if workers_of(report) else []  # also one that has no whole step there
            traces = tuple(extract_traces(report, workers))
            no_steps = no_whole_step(whole, choice, window) if _stepping(whole) else ""
    if not traces and not choice.is_whole:
        why = why_nothing(whole, choice)
        facts = ReportFacts(report.path, identity=report.identity, events=report.events, no_ranges=why)
        return replace(facts, adopted=adopted, stepped_before=before, has_nvtx=_has_nvtx(whole))
    return ReportFacts(
        path=report.path,
        traces=traces,
        identity=report.identity,
        nsys_version=report.nsys_version,
        spans=len(report.nvtx),
        events=report.events,
        span_s=(report.last_ns - report.first_ns) / 1e9,
        epoch_ns=report.epoch_ns,
        first_ns=report.first_ns,
        gpu_missing="cuda" in report.requested and report.cuda is None and report.parts is Parts.ALL,
        no_ranges="" if any(len(trace.steps) for trace in traces) else no_steps or _why_no_ranges(report, adopted),
        has_nvtx=_has_nvtx(report),
        damage="; ".join(report.damage),
        adopted=adopted and replace(adopted, ranges=adopted.ranges.iloc[:0]),
        doubts="; ".join(report.doubts),
        stepped_before=before,
        has_no_python=_has_no_python(whole),
    )


def _has_no_python(report: Report) -> bool:
    if {schema.DOMAIN, schema.COMM_DOMAIN} & set(report.domains):  # of hpcmm's own annotation
        return False
    names = [report.processes.get(pid, "") for pid in workers_of(report)]
    kernels = () if report.cuda is None else report.cuda.activities["name"].unique()
    return waitpid.has_no_python(names, report.program, map(str, kernels))


def with_user_ranges(report: Report, choice: Choice = CHOOSE_FOR_ME) -> tuple[Report, Adopted | None]:
    """``report`` with the program's own ranges as steps and phases if it has none of hpcmm's, or if they are chosen."""
    nvtx = phases.settle_steps(report.nvtx)
    report = replace(report, nvtx=nvtx)
    steps = nvtx[(nvtx["domain"] == schema.DOMAIN) & (nvtx["name"] == schema.STEP)]
    if len(steps) and not choice.steps:
        if not choice.phases:
            return report, None
        adopted = adopt_phases(report.ranges, steps, choice.phases)
    else:
        launches = None if report.cuda is None else report.cuda.activities[["pid", "launch_tid"]]
        adopted = adopt(report.ranges, choice, launches)
        if adopted.ranges.empty:
            return report, adopted
    others = nvtx[nvtx["domain"] != schema.DOMAIN]
    both = pd.concat([adopted.ranges, others], ignore_index=True) if len(others) else adopted.ranges
    return replace(report, nvtx=both.sort_values("start_ns", kind="stable", ignore_index=True)), adopted


def common_steps(facts: Sequence[ReportFacts]) -> str:
    """What most reports' own ranges of steps are called; empty if no report has such steps."""
    labels = Counter(fact.adopted.steps for fact in facts if fact.adopted is not None and fact.adopted.steps)
    return max(labels, key=lambda label: (labels[label], label)) if labels else ""


def warm(facts: Sequence[ReportFacts]) -> list[ReportFacts]:
    """``facts`` with a note on each process that one of the reports shows to have run steps before."""
    before = {(fact.identity.node, pid) for fact in facts for pid in fact.stepped_before}
    return [
        replace(
            fact,
            traces=tuple(
                replace(trace, is_warm=True) if (fact.identity.node, trace.pid) in before else trace
                for trace in fact.traces
            ),
        )
        for fact in facts
    ]


def has_other_steps(fact: ReportFacts, label: str) -> bool:
    """Whether a report has ranges of this name, but others, or none, were taken for its steps."""
    adopted = fact.adopted
    return adopted is not None and adopted.steps != label and label in adopted.labels


def _has_nvtx(report: Report) -> bool:
    return bool(report.domains) or "nvtx" in report.traced


def _why_no_ranges(report: Report, adopted: Adopted | None) -> str:
    if adopted is not None and adopted.candidates:
        told = ", ".join(adopted.candidates)
        return f"none of its NVTX ranges is clearly a step; --steps REGEX says which is one: {told}"
    if _has_nvtx(report):
        ours = report.nvtx["domain"]
        kinds = {"collectives": (ours == schema.COMM_DOMAIN).any(), "phases": (ours == schema.DOMAIN).any()}
        there = " and ".join(kind for kind, seen in kinds.items() if seen)
        if there:
            return f"its {there} are annotated, but no steps in domain hpcmm"
        return f"none of its own NVTX ranges comes again and again, as steps do ({_add_steps(report)})"
    if report.requested and "nvtx" not in report.requested:
        return "no NVTX ranges at all: nsys was told not to trace them; add nvtx to its --trace"
    version = tuple(int(part) for part in re.findall(r"[0-9]{1,9}", report.nsys_version)[:2])
    told = f"no NVTX ranges at all: its loop names no steps ({_add_steps(report)})"
    if version and version < NVTX_NEEDS_NSYS and not _has_no_python(report):
        told += (
            f"; or it does, but the Python package nvtx 0.2.12 or later records nothing under nsys "
            f"{report.nsys_version}: {OLDER_NVTX}"
        )
    elif not report.requested:
        told += ", or nsys did not trace them (--trace=nvtx)"
    return told


def _add_steps(report: Report) -> str:
    if _has_no_python(report):
        return "nvtxRangePush and nvtxRangePop around each repetition"
    return "add hpcmm.annotate.steps, or launch it with hpcmm"


def extract_traces(report: Report, workers: list[int] | None = None) -> list[RankTrace]:
    """One trace for each of its ``workers``; if it runs no steps, for each GPU that it uses.

    ``workers`` are those of :func:`workers_of` it by default. If only its OS calls were read, a trace holds steps and
    the summary of its OS calls, and the rest is empty.

    The rank is what the process told in a mark, else the report's own where one process ran steps, else -1: the
    environment of a report of several ranks is their launcher's. Processes that run no steps go with the first that
    does.
    """
    workers = workers_of(report) if workers is None else workers
    roles = waitpid.process_roles(report.osrt, report.processes, frozenset(workers))
    family = waitpid.Family.of(report, roles)
    if report.cuda is not None and not _stepping(report):
        return _extract_devices(report, report.cuda, family, workers)
    rank = report.identity.rank if len(workers) == 1 and report.identity.rank is not None else -1
    return [_extract(report, pid, report.ranks.get(pid, rank), family, workers) for pid in workers]


def workers_of(report: Report) -> list[int]:
    """The processes of ``report`` that train, each of which stands for a rank; loaders and launchers do not.

    They are the processes that run steps, and those that told their rank and communicate. Without any: those that use
    a GPU or communicate, and others with as many NVTX ranges; else those that write NVTX ranges at all; else those
    that their OS calls show alike.
    """
    if stepping := _stepping(report):  # and those that take part, though they run no steps
        talking = set(_in_domain(report, schema.COMM_DOMAIN))
        return stepping + [pid for pid in report.ranks if pid in talking and pid not in stepping]
    using = set() if report.cuda is None else {int(pid) for pid in report.cuda.activities["pid"].unique()}
    written = {int(str(pid)): int(count) for pid, count in report.ranges["pid"].value_counts().items()}
    active = {*written, *map(int, report.osrt["pid"].unique())}
    using |= (report.communicating & active) | set(_in_domain(report, schema.COMM_DOMAIN))
    loaders = {pid for pid, name in report.processes.items() if LOADER_NAME in name} - using
    writers = {pid: count for pid, count in written.items() if pid not in loaders}
    # Of those that write ranges, whoever wrote far fewer than the others started them, or serves them.
    most = max((writers.get(pid, 0) for pid in using), default=0) if using else max(writers.values(), default=0)
    few = FEW_RANGES * most
    found = using | {pid for pid, count in writers.items() if most and count >= few}
    return sorted(found) or waitpid.busiest_alike(report.osrt, report.processes)


def _stepping(report: Report) -> list[int]:
    """Processes that run steps, in the order of their first."""
    return _in_domain(report, schema.DOMAIN, schema.STEP)


def _in_domain(report: Report, domain: str, name: str = "") -> list[int]:
    """Processes that wrote a range of ``domain`` (of that ``name``), in the order of their first."""
    chosen = report.nvtx["domain"] == domain
    if name:
        chosen &= report.nvtx["name"] == name
    return [int(pid) for pid in report.nvtx["pid"][chosen].drop_duplicates()]


def _extract_devices(report: Report, cuda: CudaEvents, family: waitpid.Family, workers: list[int]) -> list[RankTrace]:
    """One trace for each GPU of each process, which stand for ranks that nothing annotated.

    A process that works without a GPU, for all that was recorded, has one trace.
    """
    used = cuda.activities[["pid", "device"]].drop_duplicates().sort_values(["pid", "device"])
    known = report.identity.rank if len(used) == 1 and len(workers) == 1 and report.identity.rank is not None else -1
    traces: list[RankTrace] = []
    for pid in workers:
        devices = [int(device) for device in used.loc[used["pid"] == pid, "device"]]
        rank = report.ranks.get(pid, known) if len(devices) <= 1 else -1
        for place, device in enumerate(devices or [None]):
            own = _extract(report, pid, rank, family, workers, device)
            if place:
                # OS calls and ranges are the process's own: its first GPU has them.
                none = own.osrt.iloc[:0], own.waits.iloc[:0], own.calls.iloc[:0]
                own = replace(own, osrt=none[0], waits=none[1], calls=none[2], projection=None)
            traces.append(own)
    return traces


def _extract(
    report: Report, pid: int, rank: int, family: waitpid.Family, workers: list[int], device: int | None = None
) -> RankTrace:
    """The trace of process ``pid``; ``workers`` are all processes of the report that stand for ranks."""
    extract = _extract_all if report.parts is Parts.ALL else _extract_calls
    trace = extract(report, pid, rank, family, workers, device)
    return replace(trace, communicators=report.communicators.get(pid, {}))


def _extract_all(
    report: Report, pid: int, rank: int, family: waitpid.Family, workers: list[int], device: int | None
) -> RankTrace:
    mine = report.nvtx[report.nvtx["pid"] == pid]
    ranges = mine[(mine["domain"] == schema.DOMAIN) & (mine["kind"] != 60)]
    tid = _step_thread(ranges, pid)
    ranges = ranges[ranges["tid"] == tid]
    steps = phases.find_steps(ranges)
    segments = phases.flatten(ranges, steps)
    calls = _calls_of(report.osrt, pid, workers)
    step_set = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    host = gpu_trace.HostSide(
        pid=pid,
        device=device,
        steps=steps,
        segments=segments,
        collectives=_collectives(mine[mine["domain"] == schema.COMM_DOMAIN], segments),
        blocked=osrt.blocked_intervals(report.osrt, pid, tid),
        lost_gpu_records=report.lost_gpu_records,
        osrt=report.osrt,
        window_ns=(report.first_ns, report.last_ns) if report.is_cut else None,
    )
    gpu = gpu_trace.of_process(host, report.cuda)
    return RankTrace(
        rank=rank,
        node=report.identity.node or "",
        pid=pid,
        report=report.path.name,
        steps=steps,
        segments=segments,
        collectives=gpu.collectives.drop(columns="tid"),
        blocked=gpu.blocked,
        waits=waitpid.find_waits(calls, family, (pid, tid), segments),
        osrt=osrt.summarise(calls, family.roles, (pid, tid), step_set),
        calls=osrt.calls_by_phase(report.osrt, pid, tid, segments),
        spans=len(mine),
        unnumbered=phases.unnumbered_steps(ranges),
        device=device,
        busy=gpu.busy,
        gpu_missing=gpu.missing,
        gpu_doubt=gpu.missing or _doubt(report, pid),
        **_kept(report, gpu),
        batches=phases.batch_sizes(ranges, steps),
        stalled=osrt.stalled_intervals(report.osrt, pid),
        main_thread=osrt.main_thread(report.osrt, pid) if report.cuda is None and steps.empty else None,
        groups=_groups(report, pid),
        expert_tokens=_expert_tokens(report, pid, segments),
    )


def _kept(report: Report, side: gpu_trace.GpuSide) -> dict[str, Any]:
    """The fields of a RankTrace that tell of GPUs, which are told apart from those of other reports."""
    fields = side.kept()
    rows = fields["gpu"]
    return fields if rows is None else fields | {"gpu": rows.assign(gpu=_of_run(report, rows["gpu"]))}


def _of_run(report: Report, gpu: pd.Series[str]) -> pd.Series[str]:
    """What tells GPUs of a report from all others of the run: their UUIDs, or the report with what tells them there."""
    return gpu.where(gpu.str.startswith(UUID), f"{report.path} " + gpu)


def _doubt(report: Report, pid: int) -> str:
    if report.lost_gpu_records:
        return "nsys lost GPU records, or may have"
    if report.cuda is None:
        return ""
    calls, activities = report.cuda.calls, report.cuda.activities
    launches = activities.loc[activities["pid"] == pid, "launch_ns"]
    if ((calls["pid"] == pid) & (calls["record"] == IMPOSSIBLE)).any():
        return "some GPU records have times that cannot be"
    return NOT_LAUNCHED if len(launches) and (launches == UNKNOWN).all() else ""


def _groups(report: Report, pid: int) -> dict[str, schema.GroupMark]:
    marks = [schema.GroupMark.parse(name) for name in report.marks.loc[report.marks["pid"] == pid, "name"]]
    return {mark.group: mark for mark in marks if mark is not None}


def _expert_tokens(report: Report, pid: int, segments: pd.DataFrame) -> pd.DataFrame | None:
    mine = report.marks[report.marks["pid"] == pid]
    tokens = pd.Series([schema.parse_expert_tokens(name) for name in mine["name"]], index=mine.index, dtype="Float64")
    told = mine[tokens.notna()]
    if told.empty:
        return None
    step, _ = phases.locate(segments, told["start_ns"].to_numpy(np.int64))
    return pd.DataFrame({"step": step, "tokens": tokens.dropna().to_numpy(np.float64)})


def _extract_calls(
    report: Report, pid: int, rank: int, family: waitpid.Family, workers: list[int], device: int | None
) -> RankTrace:
    """Steps and the summary of OS calls; all else is empty."""
    mine = report.nvtx[(report.nvtx["pid"] == pid) & (report.nvtx["domain"] == schema.DOMAIN)]
    steps_only = mine[(mine["name"] == schema.STEP) & (mine["kind"] != 60)]
    tid = _step_thread(steps_only, pid)
    steps = phases.find_steps(steps_only[steps_only["tid"] == tid])
    nothing = steps_only.iloc[:0]
    segments = phases.flatten(nothing, steps.iloc[:0])
    none = osrt.calls_by_phase(report.osrt.iloc[:0], pid, tid, segments)
    step_set = IntervalSet(steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64))
    return RankTrace(
        rank=rank,
        node=report.identity.node or "",
        pid=pid,
        report=report.path.name,
        steps=steps,
        segments=segments,
        collectives=_collectives(nothing, segments).drop(columns="tid"),
        blocked=None,
        waits=pd.DataFrame(columns=waitpid.WAIT_COLUMNS),
        osrt=osrt.summarise(_calls_of(report.osrt, pid, workers), family.roles, (pid, tid), step_set),
        calls=none,
        device=device,
    )


def _calls_of(osrt: pd.DataFrame, pid: int, workers: list[int]) -> pd.DataFrame:
    """OS calls of one of ``workers``; the first has those of all other processes, too."""
    if len(workers) == 1:
        return osrt
    process = osrt["pid"]
    return osrt[(process == pid) | ~process.isin(workers)] if pid == workers[0] else osrt[process == pid]


def _step_thread(ranges: pd.DataFrame, pid: int) -> int:
    """The thread with the most steps; a process's first thread, whose tid is the pid, when there are none."""
    steps = ranges.loc[ranges["name"] == schema.STEP, "tid"]
    return int(steps.mode().iloc[0]) if len(steps) else pid


def _collectives(ranges: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """Collectives of one process in the order of their enqueue, with the step and phase they were enqueued in."""
    parsed = [schema.CollectiveName.parse(name) for name in ranges["name"]]
    known = np.array([name is not None for name in parsed], dtype=bool)
    frame = ranges[known].reset_index(drop=True)
    parts = [name for name in parsed if name is not None]
    frame = frame.assign(
        op=[name.op for name in parts],
        group=[name.group for name in parts],
        sequence=np.array([name.sequence for name in parts], dtype=np.int64),
        bytes=np.array([name.bytes for name in parts], dtype=np.int64),
    )
    frame["peer"] = np.array([NO_PEER if name.peer is None else name.peer for name in parts], dtype=np.int64)
    for column in UNEVEN:
        frame[column] = np.array([_or_none(getattr(name, column)) for name in parts], dtype=np.int64)
    frame["occurrence"] = frame.groupby(["group", "op", "sequence"]).cumcount()
    frame["step"], frame["phase"] = phases.locate(segments, frame["start_ns"].to_numpy(np.int64))
    return frame[[*COLLECTIVE_COLUMNS, "peer", *UNEVEN, "tid"]]


def _or_none(size: int | None) -> int:
    return NO_SIZE if size is None else size
