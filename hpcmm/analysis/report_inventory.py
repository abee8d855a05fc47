"""The inventory: every expected rank and every report, with what became of it. Nothing is left out silently."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import pandas as pd

from hpcmm.analysis.extraction import OLDER_NVTX, ReportFacts
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.same_run import Claim, Run, is_copy, join_windows, other_window, runs_of, windows_of
from hpcmm.analysis.trace import RankTrace, labelled
from hpcmm.ranges import MAX_WORLD_SIZE, write_ranges
from hpcmm.reports.run_record import RunRecord

FOUND = "found"
MISSING = "missing"
TRUNCATED = "truncated"
NEWER_NSYS = "newer_nsys"
EMPTY = "empty"
NOT_PROFILED = "not_profiled"
WRONG_JOB = "wrong_job"
OTHER_RUN = "other_run"
NO_NVTX = "no_nvtx"
NO_STEPS = "no_steps"
DUPLICATE = "duplicate"

COLUMNS = ["rank", "node", "status", "steps", "spans", "events", "span_s", "nsys_version", "reason", "report"]
NVTX_ASKS_NSYS = (0, 2, 12)
"""First version of the Python package nvtx that does."""
_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,7}(?![0-9])")
_RANK_IN_NAME = re.compile(r"rank_([0-9]{1,7})")


def _in_this_run(no_ranges: str, record: RunRecord, *, stepped: bool) -> str:
    """Why a report has no steps, if the run's own record knows better; ``stepped``: whether any report has some."""
    if no_ranges and record.failed_before_steps and not stepped:
        return "the run failed before its first step"
    version = tuple(int(part) for part in re.findall(r"[0-9]{1,9}", record.nvtx)[:3])
    if no_ranges.endswith(OLDER_NVTX) and () < version < NVTX_ASKS_NSYS:
        return "no NVTX ranges at all: this rank ended before its first step, or its loop is not annotated"
    return no_ranges


@dataclass(frozen=True, slots=True)
class ReportInventory:
    """The coverage table, and the traces that the other tables are made from, by rank."""

    table: pd.DataFrame
    used: tuple[Claim, ...]
    complete: bool
    """Every report was read and every rank that should have one has."""
    expected_ranks: int
    """Ranks of the job as its record or its ranks' environment tell; at least those that were read."""


def take_inventory(facts: Sequence[ReportFacts], record: RunRecord) -> ReportInventory:
    """Give each report its rank and status; then add the expected ranks that have no report."""
    stepped = any(len(trace.steps) for fact in facts for trace in fact.traces)
    facts = [replace(fact, no_ranges=_in_this_run(fact.no_ranges, record, stepped=stepped)) for fact in facts]
    apart = _of_others(facts, record)
    ours = [fact.path not in apart for fact in facts]
    same_job = list(compress(facts, ours))
    told = max(map(_world_size, same_job), default=0)
    world = _world_communicator([trace for fact in same_job for trace in fact.traces], told)
    resolved = [_with_ranks(fact, record, world) for fact in facts]
    places = [trace.communicators.get(world) for fact in same_job for trace in fact.traces]
    told = told or max((place.size for place in places if place is not None), default=0)
    # A launcher of a node is one process for the run's record, and its workers are ranks.
    workers = max((len({rank for rank, _ in ranks}) for ranks in resolved), default=1) or 1
    workers = workers if record.ranks_per_node == 1 else 1
    world_size = min(record.world_size * workers or told, MAX_WORLD_SIZE)
    rows, nameless = _rows_without_trace(facts, record)
    rows += [
        _row(fact, rank, trace, apart[fact.path])
        for fact, ranks, is_ours in zip(facts, resolved, ours, strict=True)
        for rank, trace in ranks
        if not is_ours
    ]
    of_workers = record if workers == 1 else replace(record, starts={})
    claims = _claims(zip(same_job, compress(resolved, ours), strict=True), of_workers, nameless)
    used = _settle_claims(claims, of_workers, rows)
    # Ranks are numbered from 0: whoever is rank 7 has seven peers, also if nothing tells how many ranks there are.
    if not record.world_size:
        world_size = max([world_size, *(rank + 1 for rank in claims if rank < MAX_WORLD_SIZE)])
    present = {int(str(row[0])) for row in rows if row[0] is not None and row[2] not in {WRONG_JOB, OTHER_RUN}}
    rows.extend(_without_report(present, world_size, record, nameless, workers))
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"rank": "Int64"})
    table = table.sort_values(["rank", "report"], na_position="last", kind="stable", ignore_index=True)
    fine = {FOUND, NOT_PROFILED} if record.world_size else {FOUND, NO_NVTX, NO_STEPS}
    complete = bool(len(table)) and set(table["status"]) <= fine
    named = labelled([trace for _, trace in used])
    used = [(fact, trace) for (fact, _), trace in zip(used, named, strict=True)]
    return ReportInventory(table, tuple(used), complete, max(world_size, len(used)))


def _world_size(fact: ReportFacts) -> int:
    """How many ranks the environment of a report tells; 0 if it tells none. A launcher's counts launchers."""
    size = fact.identity.world_size or 0
    launched = 1 if "WORLD_SIZE" in fact.identity.environment else len({trace.pid for trace in fact.traces})
    return size * max(1, launched)


def _rows_without_trace(facts: Sequence[ReportFacts], record: RunRecord) -> tuple[list[tuple[object, ...]], list[str]]:
    """Rows of reports without traces, and the names of those whose rank is unknown."""
    rows: list[tuple[object, ...]] = []
    nameless: list[str] = []
    by_name = _ranks_by_names(facts)
    for fact in facts:
        if not fact.traces:
            rank = _rank_without_trace(fact, record)
            rank = by_name.get(fact.path) if rank is None else rank
            rows.append(_row(fact, rank, None, _status_without_trace(fact)))
            nameless += [fact.name] if rank is None and fact.damage else []
    return rows, nameless


def _claims(
    resolved: Iterable[tuple[ReportFacts, Sequence[tuple[int | None, RankTrace]]]],
    record: RunRecord,
    nameless: list[str],
) -> dict[int, list[Claim]]:
    """Traces by the rank that each claims; those of unknown rank get a negative number and are put to ``nameless``."""
    claims: dict[int, list[Claim]] = {}
    each = [(rank, fact, trace) for fact, ranks in resolved for rank, trace in ranks]
    number = 0
    # Those that know their rank come first, for they may know that of another window, too.
    for known, fact, trace in sorted(each, key=lambda claim: claim[0] is None):
        rank = known if known is not None else other_window((fact, trace), claims)
        if rank is None:
            nameless.append(fact.name)
            rank = number = number - 1
        claims.setdefault(rank, []).append((fact, replace(trace, rank=rank, node=_node(trace, rank, record))))
    return claims


def _majority_job(facts: Sequence[ReportFacts], record: RunRecord) -> str | None:
    """The job of most reports. Between equals the run's record tells; alone it does if no report does."""
    jobs = Counter(fact.job_id for fact in facts if fact.job_id)
    return max(jobs, key=lambda job: (jobs[job], job == record.job_id, job)) if jobs else record.job_id


def _of_others(facts: Sequence[ReportFacts], record: RunRecord) -> dict[Path, tuple[str, str]]:
    """Reports of other jobs and runs than the one that is looked at: the status and the reason of each."""
    job_id = _majority_job(facts, record)
    apart = {
        fact.path: (WRONG_JOB, f"belongs to job {fact.job_id}, the others to job {job_id}")
        for fact in facts
        if fact.job_id and job_id and fact.job_id != job_id
    }
    runs = [] if record.world_size else runs_of([fact for fact in facts if fact.path not in apart])
    if not runs:
        return apart
    kept = max(runs, key=lambda run: (run.processes, run.steps, run.begin_ns))
    for run in runs:
        if run is not kept and run.is_apart_from(kept):
            apart |= {fact.path: (OTHER_RUN, _beside(run, kept)) for fact in run.facts}
    return apart


def _beside(run: Run, kept: Run) -> str:
    """When another run was, and why ``kept`` is looked at."""
    before_s, after_s = (gap / NS_PER_S for gap in (kept.begin_ns - run.end_ns, run.begin_ns - kept.end_ns))
    times = [f"ended {before_s:.3g} s before the others began"] if before_s > 0 else []
    times += [f"began {after_s:.3g} s after the others had ended"] if after_s > 0 else []
    fewer = "processes" if run.processes < kept.processes else "steps" if run.steps < kept.steps else ""
    told = " and ".join([*times, *([f"has fewer {fewer}"] if fewer else [])])
    return f"of another run{f', which {told}' if told else ''}: give its reports alone to look at it"


def _world_communicator(traces: Sequence[RankTrace], world_size: int) -> str:
    """NCCL's communicator of all ranks; empty if none is known to be it.

    That is the largest of each process, and the same for all that tell of any. It has as many ranks as the environment
    says (``world_size``, 0 if it says nothing), and counts them as the processes do that know their rank otherwise.
    """
    telling = [trace for trace in traces if trace.communicators]
    if not telling:
        return ""
    size = max(member.size for member in telling[0].communicators.values())
    names = set.intersection(
        *({name for name, member in trace.communicators.items() if member.size >= size} for trace in telling)
    )
    largest = max(member.size for trace in telling for member in trace.communicators.values())
    for name in sorted(names):
        places = [trace.communicators[name] for trace in telling]
        agreed = all(trace.rank in {-1, place.rank} for trace, place in zip(telling, places, strict=True))
        if agreed and largest == size and world_size in {0, size}:
            return name
    return ""


def _with_ranks(fact: ReportFacts, record: RunRecord, world: str = "") -> list[tuple[int | None, RankTrace]]:
    """The traces of a report, each with its rank.

    Several processes that ran at once and tell the same rank have it from their launcher's environment. They are its
    workers, and so are several that tell none in a report of a run of ours: their ranks follow the order in which they
    were started, after those of the launchers before.
    """
    traces = fact.traces
    ranks = [_resolve_rank(fact, trace, record, world) for trace in traces]
    told = list(zip(ranks, traces, strict=True))
    same = [
        trace
        for rank, trace in told
        if any(other is not trace and rank == its and _are_workers(trace, other) for its, other in told)
    ]
    launcher = _rank_without_trace(fact, record)
    is_launcher = record.ranks_per_node == 1 or (not record.world_size and None not in ranks)
    if not same or launcher is None or not is_launcher:
        return told
    in_order = sorted(same, key=lambda trace: trace.pid)
    first = launcher * len(in_order)
    numbered = {id(trace): first + place for place, trace in enumerate(in_order)}
    return [
        (numbered[id(trace)], replace(trace, is_rank_guessed=True)) if id(trace) in numbered else (rank, trace)
        for rank, trace in told
    ]


def _are_workers(one: RankTrace, other: RankTrace) -> bool:
    """Whether both do the same at once. A worker that was started again comes after the one before, and a process that
    a rank starts on the side, to evaluate for instance, takes no part in collectives."""
    if (len(one.collectives) > 0) != (len(other.collectives) > 0):
        return False
    spans = [(each.steps["start_ns"].min(), each.steps["end_ns"].max()) for each in (one, other) if len(each.steps)]
    return len(spans) == 2 and max(start for start, _ in spans) < min(end for _, end in spans)


def _resolve_rank(fact: ReportFacts, trace: RankTrace, record: RunRecord, world: str) -> int | None:
    """From the captured environment, else from the run's own record: by process id, then by file name; else its place
    in NCCL's communicator ``world``."""
    if trace.rank >= 0:
        return trace.rank
    by_pid = record.rank_of(trace.pid, trace.node or None)
    if by_pid is None and len(fact.traces) == 1:
        by_pid = _rank_by_name(fact, record)
    place = trace.communicators.get(world)
    return place.rank if by_pid is None and place is not None else by_pid


def _rank_without_trace(fact: ReportFacts, record: RunRecord) -> int | None:
    rank = fact.identity.rank
    return rank if rank is not None else _rank_by_name(fact, record)


def _rank_by_name(fact: ReportFacts, record: RunRecord) -> int | None:
    """hpcmm names its reports by rank; other people's file names mean nothing."""
    match = _RANK_IN_NAME.fullmatch(fact.path.stem)
    return int(match[1]) if match and int(match[1]) < record.world_size else None


def _ranks_by_names(facts: Sequence[ReportFacts]) -> dict[Path, int]:
    """Ranks of reports that tell none, by a number in their names that is the rank in the names of others.

    ``a_rank_3`` confirms the names ``a_rank_N`` if its process tells that it is rank 3; one that tells another rank
    takes that back. What another report claims is left out.
    """
    confirmed: set[tuple[str, str]] = set()
    wrong: set[tuple[str, str]] = set()
    known = {fact.path: fact.identity.rank for fact in facts if len(fact.traces) == 1}
    known |= {fact.path: fact.traces[0].rank for fact in facts if len(fact.traces) == 1 and fact.traces[0].rank >= 0}
    for path, rank in known.items():
        for pattern, number in _numbers_in(path.stem) if rank is not None else ():
            (confirmed if number == rank else wrong).add(pattern)
    found: dict[Path, int] = {}
    for fact in facts:
        told = {number for pattern, number in _numbers_in(fact.path.stem) if pattern in confirmed - wrong}
        if fact.path not in known and len(told) == 1 and not told & set(known.values()):
            found[fact.path] = told.pop()
    return found


def _numbers_in(stem: str) -> list[tuple[tuple[str, str], int]]:
    """Each number of a name, with what stands before and behind it."""
    return [((stem[: match.start()], stem[match.end() :]), int(match[0])) for match in _NUMBER.finditer(stem)]


def _node(trace: RankTrace, rank: int, record: RunRecord) -> str:
    start = record.starts.get(rank)
    return start.node if start is not None else trace.node


def _settle_claims(claims: dict[int, list[Claim]], record: RunRecord, rows: list[tuple[object, ...]]) -> list[Claim]:
    """Of several reports of one rank keep the one that the run's record names, else the one with the most steps, and
    the other windows of its process."""
    used = []
    for rank, claimants in sorted(claims.items()):
        start = record.starts.get(rank)

        def merit(claim: Claim, pid: int = start.pid if start else -1) -> tuple[bool, int, int]:
            return claim[1].pid == pid, len(claim[1].steps), claim[0].events

        best = max(claimants, key=merit)
        windows = windows_of(best, claimants)
        for claim in claimants:
            fact, trace = claim
            if any(claim is window for window in windows):
                status, why = _status(fact, trace)
                why = f"{fact.name}: {why}" if why and len(windows) > 1 else why
                rows.append(_row(fact, rank, trace, (status, why)))
            else:
                whose = f"claims rank {rank}, which" if rank >= 0 else "shows a process that"
                told = f"is a copy of {best[0].name}" if is_copy(fact, best[0]) else f"{whose} {best[0].name} has"
                rows.append(_row(fact, rank, trace, (DUPLICATE, told)))
        used.append(join_windows(windows))
    return used


def _status(fact: ReportFacts, trace: RankTrace) -> tuple[str, str]:
    lost = "; ".join(filter(None, (trace.gpu_missing, fact.damage)))
    if lost:
        return TRUNCATED, "; ".join(filter(None, (f"read in part: {lost}", fact.doubts)))
    status, reason = _status_of_whole(fact, trace)
    return status, "; ".join(filter(None, (reason, fact.doubts)))


def _status_of_whole(fact: ReportFacts, trace: RankTrace) -> tuple[str, str]:
    """Of a report that lacks nothing, as far as it is known."""
    if not len(trace.steps):
        gpu = f", GPU {trace.device}" if trace.device is not None else ""
        stands_for = f"process {trace.pid}{gpu}: " if gpu or trace.rank < 0 else ""
        return _no_steps(fact), stands_for + fact.no_ranges or "it takes part in collectives, but runs no steps"
    unclosed = trace.steps.loc[~trace.steps["closed"], "step"]
    if len(unclosed):
        return FOUND, f"step {int(unclosed.iloc[-1])} has no end: the process or its capture stopped in mid-step"
    if trace.unnumbered:
        told = (
            f"{trace.unnumbered} of its {trace.unnumbered + len(trace.steps)} steps carry no number, and are left out"
        )
        return FOUND, told
    if trace.rank >= 0:
        guessed = "its rank is a guess, by the order in which its launcher started the workers: none tells its own"
        unseen = "CUDA was to be traced, but no GPU activity was recorded"
        return FOUND, guessed if trace.is_rank_guessed else unseen if fact.gpu_missing else ""
    others = f" of its {len(fact.traces)} processes with steps" if len(fact.traces) > 1 else ""
    return FOUND, f"the report does not tell the rank of process {trace.pid}{others and f', one{others}'}"


def _no_steps(fact: ReportFacts) -> str:
    return NO_STEPS if fact.has_nvtx else NO_NVTX


def _status_without_trace(fact: ReportFacts) -> tuple[str, str]:
    if fact.damage:
        return NEWER_NSYS if fact.is_of_a_newer_nsys else TRUNCATED, fact.damage
    if fact.events == 0:
        return EMPTY, "it holds no NVTX range, no OS call and no GPU activity, and of nothing else is read who waits"
    return _no_steps(fact), fact.no_ranges


def _row(fact: ReportFacts, rank: int | None, trace: RankTrace | None, outcome: tuple[str, str]) -> tuple[object, ...]:
    """A row of the table; ``outcome`` is status and reason."""
    if trace is not None:
        node, steps, spans = trace.node, len(trace.steps), trace.spans
    else:
        node, steps, spans = fact.identity.node or "", 0, fact.spans
    status, reason = outcome
    return rank, node, status, steps, spans, fact.events, fact.span_s, fact.nsys_version, reason, fact.name


def _without_report(
    present: set[int], world_size: int, record: RunRecord, nameless: Sequence[str], workers: int
) -> list[tuple[object, ...]]:
    """Rows of expected ranks that no report claims; ``nameless`` reports may be theirs, but do not tell.

    ``workers``: ranks of each process that the run's record knows. Without a record each nameless report stands for one
    of these ranks, and the rows of the others cannot say which they are.
    """
    rows: list[tuple[object, ...]] = []
    missing = sorted(set(range(world_size)) - present)
    maybe = _some(list(dict.fromkeys(nameless)))
    if nameless and not record.world_size:
        told = f"one of ranks {write_ranges(missing)} has no report; {maybe} may be of another of them"
        return [(None, "", MISSING, 0, 0, 0, 0.0, "", told, "")] * max(0, len(missing) - len(nameless))
    for rank in missing:
        start = record.starts.get(rank // workers)
        node = start.node if start is not None else ""
        if record.world_size and rank // workers not in record.profiled:
            told = (
                "profile.ranks leaves this rank out"
                if record.profiled
                else "the run was not profiled: launch it with profile=nsys"
            )
            rows.append((rank, node, NOT_PROFILED, 0, 0, 0, 0.0, "", told, ""))
        else:
            told = (
                "it started, but left no report: it still runs, or was killed before nsys could write one"
                if start
                else "it has not started: the job still waits, or this rank failed (see its log)"
            )
            if not record.world_size:
                told = f"the other reports are of a job of {world_size} ranks or more"
            if nameless:
                told = f"no report tells that it is of this rank; {maybe} may be"
            rows.append((rank, node, MISSING, 0, 0, 0, 0.0, "", told, ""))
    return rows


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" or one of {len(names) - 3} more" if len(names) > 3 else "")
