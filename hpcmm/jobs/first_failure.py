"""From all evidence to the first failure: the earliest one that is not the consequence of another."""

from __future__ import annotations

import re
import signal
from collections import Counter
from dataclasses import dataclass, field

from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics, srun_words
from hpcmm.jobs.state import DEPENDENCY_FAILED, why_it_waits
from hpcmm.node.classify import (
    CONSEQUENCES,
    Kind,
    LoggedError,
    complaint_in,
    kind_of_exception,
    kind_of_signal,
    kind_of_status,
    signal_name,
)
from hpcmm.runs.failures import Place, main_place

_RECORDING = re.compile(r'/hpcmm/node/recorder\.py", line \d+ in _record$')
_MOST_FRAMES = 20
_ENDED_BY_SLURM = {
    "TIMEOUT": Kind.time_limit,
    "DEADLINE": Kind.time_limit,
    "PREEMPTED": Kind.preempted,
    "CANCELLED": Kind.cancelled,
}
_KILLED_FOR_MEMORY = "the kernel killed a process of the job for want of memory"
_LINES_THAT_TELL = 3
"""Of a log, from its end: what stands before need not be why the program ended."""
_LINES_NEAR = 20
"""Lines behind a traceback that may belong to it, such as those of other threads."""
_TOLD_TO_END = frozenset({signal.SIGTERM, signal.SIGINT})
"""SIGHUP is none of them: neither Slurm nor hpcmm sends it to end a rank."""
_NODE_DOWN = ("down", "fail", "drain", "inval", "reboot")


@dataclass(frozen=True)
class Event:
    """How one rank ended."""

    rank: int
    node: str
    unix_ns: int
    kind: Kind
    what: str
    traceback: list[str] = field(default_factory=list)
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """The first failure. Fields that no evidence tells are empty."""

    kind: Kind
    what: str
    rank: int | None = None
    node: str = ""
    unix_ns: int | None = None
    traceback: list[str] = field(default_factory=list)
    bad_nodes: list[str] = field(default_factory=list)
    """Nodes that a new run had better leave out."""
    remedy: str = ""
    """What to do about just this failure; empty if there is only what helps against its kind."""


def events_of(evidence: JobDiagnostics) -> list[Event]:
    """The ranks' ends by their own fault or another's, by time; not those of ranks that were told to end."""
    found = [event for rank in evidence.ranks.values() if (event := _event(rank)) is not None]
    return sorted(found, key=lambda event: (event.unix_ns, event.rank))


def first_failure(evidence: JobDiagnostics) -> Verdict:
    """The first failure of a job that is known to have failed."""
    events = events_of(evidence)
    by_slurm = _ENDED_BY_SLURM.get(evidence.job.state)
    roots = [event for event in events if event.kind not in CONSEQUENCES]
    if by_slurm is not None:  # Slurm kills what does not end in time
        roots = [event for event in roots if event.kind is not Kind.killed]
    later = [event for event in events if event.kind in CONSEQUENCES]
    dead = _dead_nodes(evidence)
    if dead and not (roots and (not later or roots[0].unix_ns < later[0].unix_ns)):
        return _node_failure(evidence, dead)
    if roots:
        return _of_event(_with_memory(roots[0], evidence))
    if evidence.job.state == "OUT_OF_MEMORY":
        return Verdict(Kind.out_of_memory, _KILLED_FOR_MEMORY)
    if by_slurm is not None:
        return _ended_by_slurm(evidence, by_slurm)
    return _between_ranks(evidence, later) if later else _without_failed_ranks(evidence)


def _was_told_to_end(rank: RankDiagnostics) -> bool:
    return rank.error is None and rank.exit is not None and rank.exit.signal in _TOLD_TO_END


def _between_ranks(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks only tell of each other: a node that is cut off, a rank that did not come, or one that left no word."""
    if cut := _cut_off_nodes(evidence):
        return _cut_off(evidence, cut, later[0])
    if any(event.kind is Kind.collective_timeout for event in later):
        return _did_not_arrive(evidence, later)
    return _lost_peer(evidence, later)


def _event(rank: RankDiagnostics) -> Event | None:
    if rank.error is not None:
        kind = kind_of_exception(rank.error.kind, rank.error.message, rank.error.traceback)
        what = f"{rank.error.kind}: {rank.error.message}"
        return Event(rank.rank, rank.error.node, rank.error.unix_ns, kind, what, rank.error.traceback)
    if rank.exit is None:
        return None
    place = (rank.rank, rank.exit.node, rank.exit.unix_ns)
    if rank.exit.signal is not None:
        if rank.exit.signal in _TOLD_TO_END:
            return None
        return Event(*place, kind_of_signal(rank.exit.signal), signal_name(rank.exit.signal))
    if rank.logged is not None and _ended_it(rank.logged, rank.exit.status):
        kind = kind_of_exception(rank.logged.kind, rank.logged.message, rank.logged.lines)
        return Event(*place, kind, f"{rank.logged.kind}: {rank.logged.message}", rank.logged.lines)
    said = complaint_in(rank.last_lines[-_LINES_THAT_TELL:])
    kind = kind_of_status(rank.exit.status)
    kind = said.kind if said is not None and kind is Kind.unknown else kind
    what = f"exit status {rank.exit.status}{_log_ends(rank.last_lines)}"
    return Event(*place, kind, what, rank.last_lines[:-1], said.remedy if said is not None else "")


def _ended_it(logged: LoggedError, status: int | None) -> bool:
    """Whether what a log tells of is what ended its program: that may have gone on after it, and failed otherwise."""
    if len(logged.lines) == 1:  # a sentence of hpcmm's, which may be a mere note
        return status == 1 and logged.lines_after <= _LINES_THAT_TELL
    return status == 1 or logged.lines_after <= _LINES_NEAR


def _log_ends(lines: list[str]) -> str:
    return f'; its log ends: "{lines[-1].strip()}"' if lines else ""


def _of_event(event: Event) -> Verdict:
    bad = [event.node] if event.kind is Kind.gpu_error and event.node else []
    return Verdict(event.kind, event.what, event.rank, event.node, event.unix_ns, event.traceback, bad, event.remedy)


def _with_memory(event: Event, evidence: JobDiagnostics) -> Event:
    """A rank that was killed where Slurm or the kernel noted that memory ran out was killed for that."""
    if event.kind is Kind.killed and (evidence.job.state == "OUT_OF_MEMORY" or evidence.oom_kill):
        return Event(event.rank, event.node, event.unix_ns, Kind.out_of_memory, f"{event.what} for want of memory")
    return event


def _dead_nodes(evidence: JobDiagnostics) -> list[str]:
    """Nodes that Slurm gave up, while no rank of theirs could tell how it ended."""
    told = {rank.node for rank in evidence.ranks.values() if not rank.silent}
    named = [line.rpartition(" ")[2] for line in evidence.srun_lines if line.startswith("Node failure on ")]
    down = [
        node
        for node, state in evidence.node_states.items()
        if state.startswith(_NODE_DOWN) or state.partition(" ")[0].endswith("*")
    ]
    silent = {rank.node for rank in evidence.ranks.values() if rank.silent and rank.node}
    dead = [node for node in down if node in silent or (node not in told and evidence.job.state == "NODE_FAIL")]
    return sorted({*named, *dead})


def _node_failure(evidence: JobDiagnostics, dead: list[str]) -> Verdict:
    ranks = [rank for rank in evidence.ranks.values() if rank.node in dead]
    states = "; ".join(f"{node} is {evidence.node_states[node]}" for node in dead if node in evidence.node_states)
    last = max((rank.progress.last_unix_ns for rank in ranks if rank.progress), default=None)
    what = f"the node stopped answering Slurm{f' ({states})' if states else ''}"
    return Verdict(Kind.node_failure, what, ranks[0].rank if ranks else None, dead[0], last, bad_nodes=dead)


def _ended_by_slurm(evidence: JobDiagnostics, kind: Kind) -> Verdict:
    who = re.match(r"by (\d+)", evidence.job.reason)
    by = f" by user {who[1]}" if who else ""
    said = {
        Kind.time_limit: "the job reached its time limit",
        Kind.preempted: "another job took the nodes",
        Kind.cancelled: f"the job was cancelled{by}",
    }
    if kind is Kind.time_limit and (meeting := _all_in_rendezvous(evidence)):
        first, waits_at = meeting[0]
        waited = f"all {len(meeting)} ranks" if len(meeting) > 1 else "the rank"
        what = f"{said[kind]} while {waited} waited to meet at MASTER_ADDR; rank {first.rank} was at {waits_at.said}"
        return Verdict(Kind.rendezvous, what, first.rank, first.node)
    what, remedy = said[kind], ""
    if evidence.job.state == "DEADLINE":
        what = "the job could not end before its deadline"
        remedy = "Launch it again with a later deadline in cluster.sbatch, or with a shorter cluster.time_limit_min."
    if not evidence.ranks and not evidence.job.nodes and evidence.job.source != "run directory":
        if evidence.job.reason == DEPENDENCY_FAILED:
            return _never_satisfied(evidence, kind)
        meant = why_it_waits(evidence.job)
        return Verdict(kind, f"{what} before it started{f': {meant}' if meant else ''}", remedy=remedy)
    hung = _hung(evidence)
    if kind is not Kind.preempted and hung is not None:
        place = main_place(hung.stacks)
        assert place is not None
        what = f"{what} while all ranks but this one waited in a collective; it was at {place.said}"
        return Verdict(kind, what, hung.rank, hung.node, remedy=remedy)
    return Verdict(kind, what, remedy=remedy)


def _never_satisfied(evidence: JobDiagnostics, kind: Kind) -> Verdict:
    """Slurm removed the job, since the one before it failed."""
    before = evidence.waited_for
    named = f" (job {' or '.join(before)})" if before else ""
    see = " or ".join(f"python -m hpcmm.jobs why {each}" for each in before or ["JOB"])
    what = f"Slurm removed the job before it started: the job that it was to run after{named} did not end as it should"
    return Verdict(kind, what, remedy=f"See why that one failed with {see}, then launch this one again.")


def _hung(evidence: JobDiagnostics) -> RankDiagnostics | None:
    """The one rank that was not in a collective when all were told to end, if all others were."""
    places = {rank: main_place(each.stacks) for rank, each in evidence.ranks.items()}
    away = [rank for rank, place in places.items() if place is not None and not place.in_collective]
    waiting = [rank for rank, place in places.items() if place is not None and place.in_collective]
    # One that was ended while it recorded how it lost another has raised, too.
    raising = {rank for rank in away if any(_RECORDING.search(frame) for frame in _frames(evidence.ranks[rank]))}
    away = [rank for rank in away if rank not in raising]
    told = [rank for rank, each in evidence.ranks.items() if each.error is not None or rank in raising]
    if len(away) == 1 and len(away) + len(waiting) + len(told) == len(places) > 1:
        return evidence.ranks[away[0]]
    return None


def _all_in_rendezvous(evidence: JobDiagnostics) -> list[tuple[RankDiagnostics, Place]]:
    """The ranks, if all that left stacks waited for the rendezvous when they were told to end; else none."""
    places = [(rank, place) for rank in evidence.ranks.values() if (place := main_place(rank.stacks)) is not None]
    return places if all(place.in_rendezvous for _, place in places) else []


def _cut_off_nodes(evidence: JobDiagnostics) -> list[str]:
    """Nodes that the others could not reach, by the word of ranks on nodes that reached somebody."""
    errors = [rank.error for rank in evidence.ranks.values() if rank.error is not None]
    reports = {error.node: set(error.unreachable) for error in errors if error.unreachable}
    nodes = {rank.node for rank in evidence.ranks.values() if rank.node} | set().union(*reports.values())
    trusted = {node: missing for node, missing in reports.items() if len(missing) < len(nodes) - 1}
    votes = Counter(missing for given in (trusted or reports).values() for missing in given)
    if not votes:
        return []
    most = max(votes.values())
    found = sorted(node for node, count in votes.items() if count == most)
    answering = [node for node in found if not evidence.node_states.get(node, "*").partition(" ")[0].endswith("*")]
    return sorted(set(found) - set(answering)) or found


def _cut_off(evidence: JobDiagnostics, cut: list[str], first: Event) -> Verdict:
    ranks = [rank.rank for rank in evidence.ranks.values() if rank.node in cut]
    if len(cut) > 1:
        what = f"{' and '.join(cut)} could not reach each other: one of them, or the network between, failed"
    else:
        what = (
            f"{cut[0]} could not be reached from the other nodes when {first.what.splitlines()[0][:200]!r} was raised"
        )
    return Verdict(
        Kind.node_failure, what, ranks[0] if ranks else None, cut[0], first.unix_ns, first.traceback, bad_nodes=cut
    )


def _did_not_arrive(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks waited in vain: who did not come, by the stacks, by the ranks' steps, by who did not complain."""
    first = next(event for event in later if event.kind is Kind.collective_timeout)
    missing = _hung(evidence) or _behind(evidence, {event.rank for event in later})
    if missing is None:
        what = f"{first.what}; all ranks were there, so the network is suspect"
        return Verdict(first.kind, what, first.rank, first.node, first.unix_ns, first.traceback)
    place = main_place(missing.stacks)
    where = f"it was at {place.said}" if place else "where it was is not known"
    waited = ", ".join(str(event.rank) for event in later[:8])
    what = f"this rank did not come to a collective that rank {waited} waited in: {where}"
    return Verdict(Kind.collective_timeout, what, missing.rank, missing.node, first.unix_ns, _frames(missing))


def _behind(evidence: JobDiagnostics, complained: set[int]) -> RankDiagnostics | None:
    quiet = [rank for rank in evidence.ranks.values() if rank.rank not in complained]
    if len(quiet) == 1:
        return quiet[0]
    steps = {
        rank.rank: -1 if rank.progress.last_step is None else rank.progress.last_step
        for rank in evidence.ranks.values()
        if rank.progress is not None
    }
    last = [rank for rank, step in steps.items() if step == min(steps.values())]
    return evidence.ranks[last[0]] if len(last) == 1 and len(steps) > 1 else None


def _frames(rank: RankDiagnostics) -> list[str]:
    place = main_place(rank.stacks)
    return [f"  {frame}" for frame in place.frames[:_MOST_FRAMES]] if place else []


def _lost_peer(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks lost a peer, and no peer tells why: it is one that left no word."""
    silent = [rank for rank in evidence.ranks.values() if rank.silent]
    if not silent:
        return _of_event(later[0])
    lost = silent[0]
    said = srun_words(evidence.srun_lines).get(lost.rank, ("", ""))[1]
    if not said and lost.node and all(rank.silent for rank in evidence.ranks.values() if rank.node == lost.node):
        what = f"all processes of the job on {lost.node} ended at once without a word, and the other ranks lost them"
        return Verdict(Kind.node_failure, what, lost.rank, lost.node, later[0].unix_ns, bad_nodes=[lost.node])
    what = f"it left no word{f'; srun says: {said}' if said else ''}, and the others lost it"
    kind = Kind.killed if said == "Killed" else Kind.unknown
    return Verdict(kind, what, lost.rank, lost.node, later[0].unix_ns)


def _without_failed_ranks(evidence: JobDiagnostics) -> Verdict:
    if evidence.ranks and all(_was_told_to_end(rank) for rank in evidence.ranks.values()):
        if (_signal_of(evidence.job.exit_code) or signal.SIGTERM) not in _TOLD_TO_END:
            return _by_slurm_alone(evidence)  # the script was ended, and the ranks with it
        return _ended_from_outside(evidence)
    return _without_ranks(evidence)


_CLEARLY_BEFORE_NS = 100_000_000
"""Of ends that nodes' clocks tell of: srun ends the other ranks later than that, and all that it ends within less."""


def _ended_from_outside(evidence: JobDiagnostics) -> Verdict:
    """All ranks were told to end, and neither Slurm nor a note of hpcmm's says that somebody cancelled the job."""
    if evidence.job.state == "NODE_FAIL":
        return _by_slurm_alone(evidence)
    ends = [rank.exit for rank in evidence.ranks.values() if rank.exit is not None]
    first, *others = sorted(ends, key=lambda end: (end.unix_ns, end.rank))
    told = signal_name(first.signal or signal.SIGTERM)
    named = list(srun_words(evidence.srun_lines))
    slurm = f"Slurm had not cancelled the job: it says {evidence.job.state}"
    if evidence.job.source == "run directory":
        slurm = "whether Slurm cancelled the job is not known"
    remedy = f"See who sent {told}: the program, `scancel --signal`, or a person on the node. If by mistake, run again."
    gap_ns = others[0].unix_ns - first.unix_ns if others else 0
    if others and not (gap_ns > _CLEARLY_BEFORE_NS and named[:1] in ([], [first.rank])):
        return Verdict(Kind.signalled, f"all ranks were sent {told}, from outside; {slurm}", remedy=remedy)
    before = f" {gap_ns / 1e9:.1f} s before srun ended the others" if others else ""
    what = f"{told} ended this rank{before}; {slurm}"
    return Verdict(Kind.signalled, what, first.rank, first.node, first.unix_ns, remedy=remedy)


def _without_ranks(evidence: JobDiagnostics) -> Verdict:
    """No rank left a record: Slurm, the batch script's log and srun's words tell what there is to tell."""
    began = any(rank.progress or rank.last_lines for rank in evidence.ranks.values())
    found = None if began else _of_script(evidence, "before any rank started")
    return (
        (None if evidence.batch_lines else _not_started(evidence))
        or found
        or _by_srun(evidence)
        or (_of_script(evidence, "in the job's script, beside its ranks") if began else None)
        or _by_slurm_alone(evidence)
    )


_SHARED = "Is runs_root on a file system that all nodes share, and is there room? Set it to a folder that they all see."
_GONE = "Launch again, and leave the run directory where it is until the job is over."


def _not_started(evidence: JobDiagnostics) -> Verdict | None:
    """Slurm could not open the log or could not start the script; neither leaves more than an exit code."""
    job = evidence.job
    no_log = job.exit_code == "0:53" or job.reason == "RaisedSignal:53"
    if no_log and evidence.gone:
        return Verdict(Kind.not_started, f"{evidence.gone} is gone, so Slurm could not write there", remedy=_GONE)
    if no_log:
        log = evidence.run.batch_log if evidence.run else "the file of the job's output"
        return Verdict(Kind.not_started, f"{_node(job.nodes)} could not write {log}", remedy=_SHARED)
    if job.state == "BOOT_FAIL":
        said = "Run again; if that fails too, tell the site, and leave the node out with cluster.exclude."
        return Verdict(Kind.node_failure, f"{_node(job.nodes)} did not start", remedy=said)
    if not job.nodes and (meant := why_it_waits(job)):
        said = f"the job was over before it started ({job.reason}): {meant}"
        before = job.reason == DEPENDENCY_FAILED
        kind = Kind.not_started
        return _never_satisfied(evidence, kind) if before else Verdict(kind, said, remedy=meant)
    if job.reason == "JobLaunchFailure" and _signal_of(job.exit_code) is None:
        return Verdict(Kind.not_started, f"Slurm could not start the job's script on {_node(job.nodes)}")
    return None


def _node(hosts: str) -> str:
    return f"node {hosts}" if hosts and "[" not in hosts and "," not in hosts else f"a node of {hosts or 'the job'}"


def _signal_of(exit_code: str) -> int | None:
    """The signal in ``status:signal`` that ended a job's script."""
    number = exit_code.partition(":")[2]
    return int(number) if number.isdecimal() and int(number) in set(signal.Signals) else None


_SAID_BY_LOG = {
    **dict.fromkeys(Kind, frozenset[Kind]()),
    Kind.exception: frozenset(Kind) - {Kind.unknown},
    Kind.setup: frozenset({Kind.out_of_memory, Kind.disk_full}),
}
"""Kinds that other lines of the log tell, and that say more than a sentence of hpcmm's of this kind."""


def _of_script(evidence: JobDiagnostics, when: str) -> Verdict | None:
    """What the script's own log says, if that is a failure's word and not only output."""
    said = complaint_in(evidence.batch_lines)
    batch = evidence.batch_error
    sentences = [line for line in evidence.batch_lines if line.startswith("hpcmm: ")]
    lines = said.lines if said is not None and (len(said.lines) > 1 or said.line not in said.lines) else []
    if evidence.oom_kill:
        return Verdict(Kind.out_of_memory, f"{when}: {_KILLED_FOR_MEMORY}", traceback=said.lines if said else [])
    if batch is None:
        if said is None or (said.kind is Kind.unknown and srun_words(evidence.srun_lines)):
            return None
        status = f" with exit code {evidence.job.exit_code}" if evidence.job.exit_code else ""
        what = f'{when}, the job\'s script ended{status}; its log says: "{said.line}"'
        return Verdict(said.kind, what, traceback=lines, remedy=said.remedy)
    lines = [line for line in lines if line not in sentences]
    kind = kind_of_exception(batch.kind, batch.message, batch.lines)
    message = sentences[-1].removeprefix("hpcmm: ") if sentences else batch.message or batch.kind
    if len(batch.lines) > 1:
        return Verdict(kind, f"{when}: {message}", traceback=batch.lines)
    if said is not None and said.kind in _SAID_BY_LOG[kind]:
        kind = said.kind
    remedy = said.remedy if said is not None and kind in {said.kind, Kind.setup} else ""
    return Verdict(kind, f"{when}: {message}", traceback=lines, remedy=remedy)


def _by_srun(evidence: JobDiagnostics) -> Verdict | None:
    for rank, (node, said) in srun_words(evidence.srun_lines).items():
        log = evidence.ranks[rank].last_lines if rank in evidence.ranks else []
        complaint = complaint_in(log[-_LINES_THAT_TELL:])
        kind = Kind.killed if said == "Killed" else complaint.kind if complaint else Kind.unknown
        remedy = complaint.remedy if complaint else ""
        return Verdict(kind, f"srun says: {said}{_log_ends(log)}", rank, node, traceback=log[:-1], remedy=remedy)
    return None


def _by_slurm_alone(evidence: JobDiagnostics) -> Verdict:
    job = evidence.job
    if job.state == "NODE_FAIL":
        return Verdict(Kind.node_failure, f"Slurm gave up {_node(job.nodes)}")
    if evidence.gone:
        return Verdict(Kind.data, f"{evidence.gone} is gone, with all that the job wrote there", remedy=_GONE)
    status = f", exit code {job.exit_code}" if job.exit_code else ""
    number = _signal_of(job.exit_code)
    if number and evidence.oom_kill:
        return Verdict(Kind.out_of_memory, _KILLED_FOR_MEMORY)
    if number:
        kind = Kind.unknown if number in _TOLD_TO_END else kind_of_signal(number)
        return Verdict(kind, f"{signal_name(number)} ended the job's script")
    log = [line for line in evidence.batch_lines if line.strip()]
    return Verdict(Kind.unknown, f"no rank left a word of its end{status}{_log_ends(log)}")
