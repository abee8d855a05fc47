"""Why a run failed, and what to do about it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from hpcmm.jobs.asking import (
    Ranks,
    ask_ranks,
    is_workload,
    lines_of_points,
    lines_of_ranks,
    progress,
    ranks_at_end,
    said_of_running,
    step_reached,
    still_for,
    values_of_ranks,
    waiting,
    worked_lately,
)
from hpcmm.jobs.diagnostics import Event, JobDiagnostics, gather_newest, gather_points, known_state
from hpcmm.jobs.find_run import Target, settings
from hpcmm.jobs.first_failure import Verdict, events_of, first_failure, hang_of
from hpcmm.jobs.logs import printable
from hpcmm.jobs.state import State, why_it_waits
from hpcmm.node.classify import ADVICE, ADVICE_FOR_SCRIPTS, Kind
from hpcmm.ranges import tasks_in, write_ranges
from hpcmm.runs.ledger import overrides_of
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.jobs import ACTIVE, ENDED, PENDING, Job


def advice(verdict: Verdict, job_id: str, excluded: str = "", *, is_script: bool = False) -> list[str]:
    """Sentences, and for bad nodes the line that leaves them out. ``excluded``: nodes that the run left out already."""
    known = ADVICE_FOR_SCRIPTS if is_script else ADVICE
    lines = [verdict.remedy or known[verdict.kind].replace("JOB", job_id)]
    if bad := _node_names(verdict):
        nodes = ",".join([*([excluded] if re.fullmatch(_NODES, excluded) else []), *bad])
        lines.append(f"Leave it out: 'cluster.exclude=\"{nodes}\"' for hpcmm.launch, --exclude={nodes} for sbatch.")
    return lines


def _node_names(verdict: Verdict) -> list[str]:
    """The bad nodes, without names that no node has: a record may hold anything, and these go into a command line."""
    return [node for node in verdict.bad_nodes if re.fullmatch(_NODE, node)]


_NODE = r"[A-Za-z0-9][\w.-]*"
_NODES = r"[A-Za-z0-9][\w.,\[\]-]*"
_DRAWS_OVER = {ord(each): "\N{REPLACEMENT CHARACTER}" for each in "\r\b\0"}
"""What would take back the label of a line, as a progress bar does."""
_MOST_LINES = 12
_MOST_RANKS = 8
_MOST_CHARACTERS = 2000
"""Of a line: some exceptions tell the whole of an array."""
_MOST_POINTS = 1000
"""Of a sweep's points that did not complete, the records of so many are read."""
_MOST_ASKED, _ASKED_AT_ONCE = 128, 32
"""Points that run, whose ranks are asked where they stand; each takes some seconds."""
_MOST_NAMES = 20
"""Of points, or of ranges of them, on one line."""
_MOST_GROUPS = 8
"""Ways in which points failed, beside the first."""
_FAILED, _HANGS, _UNKNOWN, _NOT_SUBMITTED = "failed", "hanging", "UNKNOWN", "NOT SUBMITTED"


@dataclass(frozen=True)
class Explanation:
    """A job's first failure with what belongs to it; no verdict if nothing has failed."""

    evidence: JobDiagnostics
    verdict: Verdict | None
    events: list[Event]
    ranks: Ranks | None = None
    """Where they stand, or stood at the end, if that tells something."""

    @property
    def failed(self) -> bool:
        return self.verdict is not None

    @property
    def hangs(self) -> bool:
        """It still runs."""
        return self.verdict is not None and self.ranks is not None and self.ranks.hang


@dataclass(frozen=True)
class PointExplanation:
    """A point of a sweep, or a task of an array."""

    name: str
    """Of the point's run directory (``0003``); the task's number if that is not known."""
    run: RunDir | None
    state: str
    """Slurm's word, ``NOT SUBMITTED``, or ``UNKNOWN`` if nothing tells of its end."""
    job_id: str = ""
    explanation: Explanation | None = None
    """If it failed or runs, and its records were read."""

    @property
    def failed(self) -> bool:
        return _became(self) in {_FAILED, _HANGS}


@dataclass(frozen=True)
class SweepExplanation:
    """All points of a sweep by their newest jobs, and which of them failed first."""

    name: str
    run: RunDir | None
    points: list[PointExplanation]
    notes: list[str]

    @property
    def failures(self) -> list[tuple[PointExplanation, Explanation]]:
        """The points that failed and were looked at, the first failure first."""
        found = [(point, point.explanation) for point in self.points if point.explanation is not None]
        return sorted((each for each in found if each[1].failed), key=lambda each: _failed_at_s(each[1]))

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    @property
    def counts(self) -> dict[str, int]:
        """Points by what became of them; those that are active by Slurm's state."""
        counts = Counter(_became(point) for point in self.points)
        return dict(sorted(counts.items(), key=lambda each: (each[0] != _FAILED, each[0])))


def explain(target: Target) -> Explanation | SweepExplanation:
    """Explain the newest job of ``target``, or of each of its points. Raises HpcmmError if nothing is known of it."""
    state = known_state(target)
    if state.is_array:
        return explain_points(state)
    return _asked(explanation_of(gather_newest(state)))


def _asked(explanation: Explanation) -> Explanation:
    """With where the ranks stand, of a job that runs."""
    if explanation.failed or not explanation.evidence.job.active:
        return explanation
    evidence, ranks = ask_ranks(explanation.evidence)
    return Explanation(evidence, hang_of(still_for(ranks), ranks) if ranks and ranks.hang else None, [], ranks)


def explanation_of(evidence: JobDiagnostics) -> Explanation:
    events = events_of(evidence)
    job = evidence.job
    if job.state == "COMPLETED" or (job.active and not events and evidence.hang is None):
        return Explanation(evidence, None, events)
    verdict = first_failure(evidence)
    # Of a hang also if steps were finished shortly before, which launch.hang_s may end within a minute.
    tells = verdict.kind is Kind.hang or (verdict.kind in _STANDING_TELLS and not worked_lately(evidence))
    return Explanation(evidence, verdict, events, ranks_at_end(evidence) if tells else None)


_STANDING_TELLS = frozenset({Kind.hang, Kind.time_limit, Kind.cancelled, Kind.collective_timeout, Kind.rendezvous})
"""Of these, where all ranks stood belongs to the answer."""


def lines_of(explanation: Explanation | SweepExplanation) -> list[str]:
    """For a terminal."""
    return _lines_of_sweep(explanation) if isinstance(explanation, SweepExplanation) else _lines(explanation)


def _lines(explanation: Explanation) -> list[str]:
    evidence, verdict = explanation.evidence, explanation.verdict
    job = evidence.job
    name = evidence.run.root.name if evidence.run else job.name
    title = f"job {job.job_id} ({name})" if name else f"job {job.job_id}"
    notes = [f"note: {note}" for note in evidence.notes]
    if evidence.gone and (verdict is None or evidence.gone not in verdict.what):
        notes.append(f"note: {evidence.gone} is gone, with what the job wrote there.")
    if verdict is None:
        said = [progress(evidence)]
        said += [said_of_running(explanation.ranks)] if explanation.ranks is not None else []
        lines = [f"{title}: {job.state}. {' '.join(said)}", *_of_ranks(explanation)]
        return [_printable(line) for line in [*lines, *notes]]
    lines = [f"{title}: {verdict.kind}"]
    lines += [f"values:   {values}"] if (values := _values_of_run(evidence.run)) else []
    lines += [f"first:    {_first(verdict)}"] if _first(verdict) else []
    what, *more = (verdict.what.splitlines() or [""])[:6]
    lines += [f"what:     {what}", *(f"          {line}" for line in more)]
    lines += [f"          {line}" for line in _shown(verdict.traceback)]
    if verdict.rank is not None and (step := step_reached(evidence, verdict.rank)):
        lines.append(f"reached:  {step}")
    others = [f"rank {event.rank} ({event.kind})" for event in explanation.events if event.rank != verdict.rank]
    if others:
        more_ranks = f" and {len(others) - _MOST_RANKS} more" if len(others) > _MOST_RANKS else ""
        lines.append(f"then:     {', '.join(others[:_MOST_RANKS])}{more_ranks}")
    lines += _of_ranks(explanation)
    lines.append(f"Slurm:    {_slurm(job)}{_restarts(evidence)}")
    lines += [f"do:       {line}" for line in _advice(explanation)]
    # A rank that another process has started writes to that one's log.
    if evidence.run is not None and verdict.rank is not None and evidence.run.rank_log(verdict.rank).exists():
        lines.append(f"log:      {evidence.run.rank_log(verdict.rank)}")
    elif evidence.run is not None and evidence.batch_lines:
        lines.append(f"log:      {evidence.run.batch_log}")
    return [_printable(line) for line in [*lines, *notes]]


def _of_ranks(explanation: Explanation) -> list[str]:
    return lines_of_ranks(explanation.ranks) if explanation.ranks is not None else []


def _values_of_run(run: RunDir | None) -> str:
    """What tells a point from the others of its sweep; empty of what is no point."""
    place = SweepDir.of_point(run) if run is not None else None
    return overrides_of(place[0]).get(place[1], "") if place is not None else ""


def values_of(explanation: Explanation | SweepExplanation) -> dict[str, Any]:
    """For JSON; of a sweep the first failure as of a run, and all points."""
    return _values_of_sweep(explanation) if isinstance(explanation, SweepExplanation) else _values(explanation)


def _values(explanation: Explanation) -> dict[str, Any]:
    evidence, verdict = explanation.evidence, explanation.verdict
    job = evidence.job
    values: dict[str, Any] = {
        "job_id": job.job_id,
        "run_dir": str(evidence.run.root) if evidence.run else None,
        "failed": explanation.failed,
        "state": job.state,
        "reason": job.reason,
        "waits": waiting(job) if verdict is None and job.pending else "",
        "exit_code": job.exit_code,
        "derived_exit_code": job.derived_exit_code,
        "restart": evidence.restart,
        "nodes": evidence.node_states,
        "notes": evidence.notes,
        "ranks": values_of_ranks(explanation.ranks) if explanation.ranks is not None else None,
    }
    if verdict is None:
        return values
    step = evidence.ranks[verdict.rank].progress if verdict.rank in evidence.ranks else None
    first = asdict(verdict) | {
        "time": _utc(verdict.unix_ns) if verdict.unix_ns else None,
        "last_step": step.last_step if step else None,
    }
    return values | {
        "class": str(verdict.kind),
        "first": first,
        "events": [asdict(event) | {"time": _utc(event.unix_ns)} for event in explanation.events],
        "advice": _advice(explanation),
        "exclude": _node_names(verdict),
    }


def _advice(explanation: Explanation) -> list[str]:
    verdict, evidence = explanation.verdict, explanation.evidence
    assert verdict is not None
    cluster = settings(evidence.run).get("cluster") if evidence.run else None
    excluded = cluster.get("exclude") if isinstance(cluster, dict) else None
    is_script = evidence.run is not None and not is_workload(evidence)
    said = advice(verdict, evidence.job.job_id, str(excluded or ""), is_script=is_script)
    if evidence.job.active and evidence.job.pending:
        meant = why_it_waits(evidence.job)
        said.append(f"Slurm has queued the job again. {meant or 'It needs nothing now.'}")
    return said


def _printable(line: str) -> str:
    text = printable(
        line.translate(_DRAWS_OVER).encode("utf-8", "backslashreplace")
    )  # a message may hold file names that are no text
    cut = len(text) - _MOST_CHARACTERS
    return f"{text[:_MOST_CHARACTERS]} … and {cut} characters more" if cut > 0 else text


def _shown(traceback: list[str]) -> list[str]:
    """The last frames, without the lines that only underline."""
    return [line for line in traceback if line.strip(" ^~")][-_MOST_LINES:]


def _first(verdict: Verdict) -> str:
    parts = [f"rank {verdict.rank}" if verdict.rank is not None else "", f"on {verdict.node}" if verdict.node else ""]
    parts.append(f"at {_utc(verdict.unix_ns)}" if verdict.unix_ns else "")
    return " ".join(part for part in parts if part)


def _utc(unix_ns: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # a record that somebody else wrote
        return "an unknown time"


def _slurm(job: Job) -> str:
    reason = f" ({job.reason})" if job.reason else ""
    codes = f", exit code {job.exit_code}" if job.exit_code else ""
    derived = f", of its steps {job.derived_exit_code}" if job.derived_exit_code not in {"", "0:0"} else ""
    return f"{job.state}{reason}{codes}{derived}, by {job.source}"


def _restarts(evidence: JobDiagnostics) -> str:
    return f"; this is its restart {evidence.restart}" if evidence.restart else ""


# A sweep.


def explain_points(state: State) -> SweepExplanation:
    """Explain each task that failed. What a point's earlier jobs did counts no more."""
    rows = [replace(job, job_id=task) for job in state.jobs for task in tasks_in(job.job_id)]
    # One that has left the queue and did not complete; one that runs may have lost a rank already.
    suspects = [job for job in rows if job.state != "COMPLETED" and not job.pending]
    evidences, notes = gather_points(state, suspects[:_MOST_POINTS])
    explained = {each.job.job_id: explanation_of(each) for each in evidences}
    running = [job_id for job_id, each in explained.items() if each.evidence.job.active and not each.failed]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        asked = running[:_MOST_ASKED]
        explained.update(zip(asked, pool.map(lambda job_id: _asked(explained[job_id]), asked), strict=True))
    if len(running) > _MOST_ASKED:
        notes.append(f"Of {len(running)} points that run, the ranks of the first {_MOST_ASKED} were asked.")
    points = [_point_of(state, job, explained.get(job.job_id)) for job in rows]
    points += [PointExplanation(_last_part(each), each.run, _UNKNOWN, each.job_ids[-1]) for each in state.unknown]
    points += [PointExplanation(_last_part(each), each.run, _NOT_SUBMITTED) for each in state.unsubmitted]
    notes = [*state.notes, *notes]
    if len(suspects) > _MOST_POINTS:
        notes.append(f"Of {len(suspects)} points that did not complete, the first {_MOST_POINTS} were looked at.")
    name = state.run.root.name if state.run else state.jobs[-1].name
    name = name if state.target.array is None else f"{name}, array {state.target.array}"
    return SweepExplanation(name, state.run, sorted(points, key=lambda point: _place(point.name)), notes)


def _point_of(state: State, job: Job, explanation: Explanation | None) -> PointExplanation:
    run = state.run_of(job)
    is_point = run is not None and SweepDir.of_point(run) is not None
    return PointExplanation(run.root.name if run and is_point else job.job_id, run, job.state, job.job_id, explanation)


def _last_part(point: Target) -> str:
    return point.asked.rpartition("/")[2]


def _place(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, name)


def _became(point: PointExplanation) -> str:
    if point.explanation is not None and point.explanation.failed:
        return _HANGS if point.explanation.hangs else _FAILED
    words = {"COMPLETED": "completed", _NOT_SUBMITTED: "never submitted", _UNKNOWN: "without a known end"}
    if point.state in words:
        return words[point.state]
    if point.state in PENDING:
        return "waiting"
    return "running" if point.state in ACTIVE else _FAILED if point.state in ENDED else words[_UNKNOWN]


def _failed_at_s(explanation: Explanation) -> float:
    """Seconds since 1970: of the first failing rank, else of the job's end by Slurm; infinite if neither is known."""
    assert explanation.verdict is not None
    if explanation.verdict.unix_ns:
        return explanation.verdict.unix_ns / 1e9
    try:
        return datetime.fromisoformat(explanation.evidence.job.ended).timestamp()
    except (ValueError, OverflowError):
        return math.inf


def _alike(verdict: Verdict) -> tuple[str, str]:
    """The same for points that failed in the same way; numbers, such as a rank's or a port's, may differ."""
    return verdict.kind, re.sub(r"[0-9]+", "0", (verdict.what.splitlines() or [""])[0])


def _lines_of_sweep(sweep: SweepExplanation) -> list[str]:
    counts = ", ".join(f"{count} {name}" for name, count in sweep.counts.items())
    points = f"{len(sweep.points)} point{'' if len(sweep.points) == 1 else 's'}"
    lines = [f"sweep {sweep.name}: {points}: {counts}."]
    failures = sweep.failures
    if failures:
        lines += _lines(failures[0][1])
        lines += _lines_of_others(failures)
        lines += _lines_of_values(sweep, failures[1:])
    elif _FAILED not in sweep.counts:
        active = any(point.state in ACTIVE for point in sweep.points)
        lines.append("Nothing has failed so far." if active else "Nothing is known to have failed.")
    running = [(each.name, each.explanation.ranks) for each in sweep.points if each.explanation and not each.failed]
    lines += lines_of_points([(name, ranks) for name, ranks in running if ranks is not None])
    return [_printable(line) for line in [*lines, *(f"note: {note}" for note in sweep.notes)]]


def _lines_of_others(failures: Sequence[tuple[PointExplanation, Explanation]]) -> list[str]:
    """The other points that failed, those together that failed alike; the ones like the first come first."""
    groups: dict[tuple[str, str], list[tuple[PointExplanation, Verdict]]] = {}
    for point, explanation in failures:
        assert explanation.verdict is not None
        groups.setdefault(_alike(explanation.verdict), []).append((point, explanation.verdict))
    like_first, *others = groups.values()
    lines = [f"alike:    {_names(point for point, _ in like_first[1:])}"] if len(like_first) > 1 else []
    for group in others[:_MOST_GROUPS]:
        verdict = group[0][1]
        what = (verdict.what.splitlines() or [""])[0]
        lines.append(f"also:     {_names(point for point, _ in group)}: {verdict.kind}: {what}")
    if len(others) > _MOST_GROUPS:
        rest = [point for group in others[_MOST_GROUPS:] for point, _ in group]
        lines.append(f"also:     {_names(rest)}, each in another way")
    return lines


def _lines_of_values(sweep: SweepExplanation, others: Sequence[tuple[PointExplanation, Explanation]]) -> list[str]:
    """The values of the other points that failed, in their order."""
    known = overrides_of(SweepDir(sweep.run.root)) if sweep.run is not None else {}
    shown = [(name, known.get(int(name), "")) for name in (point.name for point, _ in others) if name.isdecimal()]
    return [f"values:   {name}: {values}" for name, values in sorted(shown)[:_MOST_GROUPS] if values]


def _names(points: Iterable[PointExplanation]) -> str:
    """``0003-0007, 0012`` in order, as the points' folders are called."""
    names = [point.name for point in points]
    if all(map(str.isdecimal, names)):
        ranges = write_ranges(map(int, names)).split(",")
        names = ["-".join(f"{int(end):04d}" for end in each.split("-")) for each in ranges]
    more = " and more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _values_of_sweep(sweep: SweepExplanation) -> dict[str, Any]:
    failures = sweep.failures
    first = _values(failures[0][1]) if failures else {"failed": False}
    return first | {
        "sweep": str(sweep.run.root) if sweep.run else None,
        "counts": sweep.counts,
        "points": [_values_of_point(point) for point in sweep.points],
        "notes": sweep.notes,
    }


def _values_of_point(point: PointExplanation) -> dict[str, Any]:
    known = {"point": point.name, "job_id": point.job_id, "run_dir": str(point.run.root) if point.run else None}
    own = _values(point.explanation) if point.explanation is not None else {}
    return own | known | {"state": point.state, "failed": point.failed}
