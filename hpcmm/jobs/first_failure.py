"""From all evidence to the first failure: the earliest one that is not the consequence of another."""

from __future__ import annotations

import re
import signal
from collections import Counter
from dataclasses import dataclass, field

from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics, srun_words
from hpcmm.node.classify import CONSEQUENCES, Kind, kind_of_exception, kind_of_signal, signal_name

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.+)')
_THREAD = re.compile(r"(?:Current t|T)hread 0x[0-9a-f]+.*\(most recent call first\):")
_WAITING = re.compile(r"/(?:torch/distributed/|deepspeed/comm/|hpcmm/annotate/collectives)")
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib/python\d|<frozen ")
_INNERMOST = 12
"""Frames from the top in which a wait for other ranks must show."""


@dataclass(frozen=True)
class Place:
    """The main thread's place."""

    frames: list[str]
    """Innermost first, such as ``File "train.py", line 3 in load``."""
    in_collective: bool

    @property
    def said(self) -> str:
        """The innermost frame, and the innermost of the user's own code if that is another."""
        if not self.frames:
            return "an unknown place"
        own = next((frame for frame in self.frames if not _LIBRARY.search(frame)), None)
        return self.frames[0] + (f" (called from {own})" if own and own != self.frames[0] else "")


def main_place(stacks: str) -> Place | None:
    """The place of the thread that runs the training, in the last dump; None if there is none."""
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (match := _FRAME.match(line)):
            threads[-1].append(f'File "{match["file"]}", line {match["line"]} in {match["function"]}')
    # The main thread is the one that began with the interpreter's own start of a module.
    mains = [frames for frames in threads if frames and ("<frozen runpy>" in frames[-1] or "<module>" in frames[-1])]
    frames = mains[-1] if mains else threads[-1] if threads else []
    if not frames:
        return None
    return Place(frames, any(_WAITING.search(frame) for frame in frames[:_INNERMOST]))


_ENDED_BY_SLURM = {
    "TIMEOUT": Kind.time_limit,
    "DEADLINE": Kind.time_limit,
    "PREEMPTED": Kind.preempted,
    "CANCELLED": Kind.cancelled,
}
_TOLD_TO_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
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
        return Verdict(Kind.out_of_memory, "the kernel killed a process of the job for want of memory")
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
    if rank.logged is not None:
        kind = kind_of_exception(rank.logged.kind, rank.logged.message, rank.logged.lines)
        return Event(*place, kind, f"{rank.logged.kind}: {rank.logged.message}", rank.logged.lines)
    return Event(*place, Kind.unknown, f"exit status {rank.exit.status}")


def _of_event(event: Event) -> Verdict:
    bad = [event.node] if event.kind is Kind.gpu_error and event.node else []
    return Verdict(event.kind, event.what, event.rank, event.node, event.unix_ns, event.traceback, bad)


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
    hung = _hung(evidence)
    if kind is Kind.time_limit and hung is not None:
        place = main_place(hung.stacks)
        assert place is not None
        what = f"{said[kind]} while all ranks but this one waited in a collective; it was at {place.said}"
        return Verdict(kind, what, hung.rank, hung.node)
    return Verdict(kind, said[kind])


def _hung(evidence: JobDiagnostics) -> RankDiagnostics | None:
    """The one rank that was not in a collective when all were told to end, if all others were."""
    places = {rank: main_place(each.stacks) for rank, each in evidence.ranks.items()}
    away = [rank for rank, place in places.items() if place is not None and not place.in_collective]
    waiting = [rank for rank, place in places.items() if place is not None and place.in_collective]
    told = [rank for rank, each in evidence.ranks.items() if each.error is not None]
    if len(away) == 1 and len(away) + len(waiting) + len(told) == len(places) > 1:
        return evidence.ranks[away[0]]
    return None


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
    return [f"  {frame}" for frame in place.frames[:20]] if place else []


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
        return Verdict(Kind.cancelled, "all ranks were told to end, and none of them had failed")
    return _without_ranks(evidence)


def _without_ranks(evidence: JobDiagnostics) -> Verdict:
    words = srun_words(evidence.srun_lines)
    batch = evidence.batch_error
    if batch is not None and not words:
        kind = kind_of_exception(batch.kind, batch.message, batch.lines)
        what = f"before any rank started: {batch.message or batch.kind}"
        return Verdict(kind, what, traceback=batch.lines if len(batch.lines) > 1 else [])
    for rank, (node, said) in words.items():
        kind = Kind.killed if said == "Killed" else Kind.unknown
        return Verdict(kind, f"srun says: {said}", rank, node)
    if evidence.job.state == "BOOT_FAIL":
        return Verdict(Kind.node_failure, "a node did not start", bad_nodes=[])
    status = f", exit code {evidence.job.exit_code}" if evidence.job.exit_code else ""
    return Verdict(Kind.unknown, f"no rank left a word of its end{status}")
