"""From all evidence to the first failure: the earliest one that is not the consequence of another."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field, replace

from hpcmm.jobs.asking import (
    Ranks,
    behind,
    frames_of,
    hung_rank,
    ranks_at_end,
    ranks_that_meet,
    waited_in,
    while_others_waited,
    worked_lately,
)
from hpcmm.jobs.diagnostics import (
    TOLD_TO_END,
    Event,
    JobDiagnostics,
    RankDiagnostics,
    dead_nodes,
    end_by_log,
    event_of,
    has_begun,
)
from hpcmm.jobs.find_run import settings
from hpcmm.jobs.logs import early_ends, log_ends, srun_words
from hpcmm.jobs.state import DEPENDENCY_FAILED, why_it_waits
from hpcmm.node.classify import CONSEQUENCES, Kind, cause_of_exception, complaint_in, kind_of_signal, signal_name
from hpcmm.runs.exit_status import signal_of
from hpcmm.runs.failures import cut_off_nodes, says_why
from hpcmm.runs.stacks import HangNote, main_place

_ENDED_BY_SLURM = {
    "TIMEOUT": Kind.time_limit,
    "DEADLINE": Kind.time_limit,
    "PREEMPTED": Kind.preempted,
    "CANCELLED": Kind.cancelled,
}
_KILLED_FOR_MEMORY = "the kernel killed a process of the job for want of memory"
_ENDED_WORKER = "killed by signal: Terminated"
"""A loader's worker that got SIGTERM, as all processes of a job do that is to end."""


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
    """The ranks' ends by their own fault, then those by another's, each by time; not those of ranks told to end."""
    found = [event for rank in evidence.ranks.values() if (event := event_of(rank)) is not None]
    # A rank that raised ends after those that lost it: it leaves its groups first.
    return sorted(found, key=lambda event: (event.kind in CONSEQUENCES, event.unix_ns, event.rank))


def first_failure(evidence: JobDiagnostics) -> Verdict:
    """The first failure of a job that is known to have failed."""
    if (hang := evidence.hang) is not None:
        return hang_of(f"no rank moved for {hang.still_s:.0f} s, so the job was ended", ranks_at_end(evidence), hang)
    events = events_of(evidence)
    by_slurm = _ENDED_BY_SLURM.get(evidence.job.state)
    roots = [event for event in events if event.kind not in CONSEQUENCES]
    early = early_ends(evidence.batch_lines)[1] if not evidence.oom_kill else []
    if by_slurm is not None or early:  # Slurm and srun kill what does not end in time
        roots = [event for event in roots if event.kind is not Kind.killed and _ENDED_WORKER not in event.what]
    roots.sort(key=lambda event: _ENDED_WORKER in event.what)
    later = [event for event in events if event.kind in CONSEQUENCES]
    dead = dead_nodes(evidence)
    if dead and not (roots and (not later or roots[0].unix_ns < later[0].unix_ns)):
        return _node_failure(evidence, dead)
    if roots or evidence.job.state == "OUT_OF_MEMORY":
        first = Verdict(Kind.out_of_memory, _KILLED_FOR_MEMORY)
        return _of_event(_with_memory(roots[0], evidence)) if roots else first
    if by_slurm is not None:
        return _ended_by_slurm(evidence, by_slurm)
    if early:
        return _ended_early(evidence, early)
    return _between_ranks(evidence, later) if later else _without_failed_ranks(evidence)


def hang_of(what: str, ranks: Ranks | None, hang: HangNote | None = None) -> Verdict:
    """Ranks that stand still: ``what`` says since when."""
    missing = ranks.missing if ranks is not None else []
    rank, node = (missing[0].rank, missing[0].node) if len(missing) == 1 else (None, "")
    said = "; ".join([what, *(ranks.findings[:1] if ranks is not None else [])])
    return Verdict(Kind.hang, said, rank, node, hang.unix_ns if hang is not None else None)


def _was_told_to_end(rank: RankDiagnostics) -> bool:
    return rank.error is None and rank.exit is not None and rank.exit.signal in TOLD_TO_END


def _between_ranks(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks only tell of each other: a node that is cut off, a rank that did not come, or one that left no word."""
    ranks = evidence.ranks.values()
    errors = [rank.error for rank in ranks if rank.error is not None]
    if cut := cut_off_nodes(errors, {rank.node for rank in ranks if rank.node}, evidence.node_states):
        return _cut_off(evidence, cut, later[0])
    if any(event.kind is Kind.collective_timeout for event in later):
        return _did_not_arrive(evidence, later)
    return _lost_peer(evidence, later)


def _of_event(event: Event) -> Verdict:
    bad = [event.node] if event.kind is Kind.gpu_error and event.node else []
    return Verdict(event.kind, event.what, event.rank, event.node, event.unix_ns, event.traceback, bad, event.remedy)


def _with_memory(event: Event, evidence: JobDiagnostics) -> Event:
    """A rank that was killed where Slurm or the kernel noted that memory ran out was killed for that."""
    if event.kind is Kind.killed and (evidence.job.state == "OUT_OF_MEMORY" or evidence.oom_kill):
        return Event(event.rank, event.node, event.unix_ns, Kind.out_of_memory, f"{event.what} for want of memory")
    return event


def _ended_early(evidence: JobDiagnostics, early: list[int]) -> Verdict:
    """Ranks that ended as if all were done, while others still needed them."""
    rank = evidence.ranks.get(early[0]) or RankDiagnostics(early[0])
    others = ", ".join(str(each) for each in evidence.ranks if each not in early) or "others"
    waited_s = early_ends(evidence.batch_lines)[0]
    and_then = f", and srun ended the rest after {waited_s} s" if waited_s else ""
    more = f" (so did rank {', '.join(map(str, early[1:9]))})" if len(early) > 1 else ""
    what = f"this rank ended by itself with status 0{more} while rank {others} went on{and_then}"
    return Verdict(Kind.ended_early, what + log_ends(rank.last_lines), rank.rank, rank.node)


def _interrupted(evidence: JobDiagnostics) -> Verdict | None:
    """A rank that KeyboardInterrupt ended: Python then ends as by SIGINT, whoever raised it."""
    for rank in evidence.ranks.values():
        by_sigint = rank.exit is not None and rank.exit.signal == signal.SIGINT
        if rank.exit and by_sigint and rank.logged is not None and rank.logged.kind == "KeyboardInterrupt":
            what = "KeyboardInterrupt: the program raised it, or something sent it SIGINT"
            lines = rank.logged.lines
            return Verdict(Kind.exception, what, rank.rank, rank.node, rank.exit.unix_ns, lines)
    return None


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
    what, remedy = said[kind], ""
    if evidence.job.state == "DEADLINE":
        what = "the job could not end before its deadline"
        remedy = "Launch it again with a later deadline in cluster.sbatch, or with a shorter cluster.time_limit_min."
    if not evidence.ranks and not evidence.job.nodes and evidence.job.source != "run directory":
        if evidence.job.reason == DEPENDENCY_FAILED:
            return _never_satisfied(evidence, kind)
        meant = why_it_waits(evidence.job)
        return Verdict(kind, f"{what} before it started{f': {meant}' if meant else ''}", remedy=remedy)
    if kind is Kind.preempted or evidence.job.state == "DEADLINE":
        return Verdict(kind, what, remedy=remedy)
    return _ended_as_it_ran(evidence, kind, what)


def _ended_as_it_ran(evidence: JobDiagnostics, kind: Kind, what: str) -> Verdict:
    """At its time limit, or by somebody: what the job was at, as far as that is known."""
    began = any(map(has_begun, evidence.ranks.values()))
    if kind is Kind.time_limit and not began and evidence.run is not None and not evidence.gone:
        return _never_began(evidence, what)
    meeting = ranks_that_meet(evidence) if kind is Kind.time_limit else []
    if meeting and evidence.done:
        return _ended_early(evidence, evidence.done)
    if meeting:
        first, waits_at = meeting[0]
        waited = f"all {len(meeting)} ranks" if len(meeting) > 1 else "the rank"
        what = f"{what} while {waited} waited to meet at MASTER_ADDR; rank {first.rank} was at {waits_at.said}"
        return Verdict(Kind.rendezvous, what, first.rank, first.node)
    lately = worked_lately(evidence)
    if not lately and (hung := hung_rank(evidence)) is not None:
        return _at_end_of_hang(kind, what, hung, evidence)
    return Verdict(kind, what, remedy=_WORKED_OR_HUNG if kind is Kind.time_limit and not lately else "")


_WORKED_OR_HUNG = (
    "If the ranks still worked (see the ends of their logs), raise cluster.time_limit_min, or go on from the last "
    "checkpoint. If their logs stand still long before the end, see what they waited for."
)


def _never_began(evidence: JobDiagnostics, what: str) -> Verdict:
    """The time limit came while the job's script was still at what comes before its ranks."""
    launch = settings(evidence.run).get("launch") if evidence.run else None
    stages = isinstance(launch, dict) and launch.get("stage")
    what = f"{what} before any rank started"
    if evidence.prepared and stages and not any(line.startswith("Staged ") for line in evidence.batch_lines):
        what += ": launch.stage was still being copied to the nodes"
        remedy = "Stage less, from a faster file system, or raise cluster.time_limit_min."
    else:
        parts = ["the ranks' start"] if evidence.prepared else ["cluster.setup", "cluster.modules", "the preparation"]
        remedy = (
            f"See what took the time ({', '.join(parts)}): run it on a node of the same partition (`srun --pty bash`). "
            "Only if it needs the time, raise cluster.time_limit_min."
        )
    log = [line for line in evidence.batch_lines if says_why(line)]
    return Verdict(Kind.time_limit, f"{what}{log_ends(log)}", remedy=remedy)


def _at_end_of_hang(kind: Kind, what: str, hung: RankDiagnostics, evidence: JobDiagnostics) -> Verdict:
    remedy = f"See what rank {hung.rank} did there, and whether it hung: more time helps only if it was slow."
    if kind is Kind.cancelled:
        remedy = f"If it was cancelled because it hung, see what rank {hung.rank} did there; else submit it again."
    return Verdict(kind, f"{what} {while_others_waited(evidence, hung)}", hung.rank, hung.node, remedy=remedy)


def _never_satisfied(evidence: JobDiagnostics, kind: Kind) -> Verdict:
    """Slurm removed the job, since the one before it failed."""
    before = evidence.waited_for
    named = f" (job {' or '.join(before)})" if before else ""
    see = " or ".join(f"python -m hpcmm.jobs why {each}" for each in before or ["JOB"])
    what = f"Slurm removed the job before it started: the job that it was to run after{named} did not end as it should"
    return Verdict(kind, what, remedy=f"See why that one failed with {see}, then launch this one again.")


def _cut_off(evidence: JobDiagnostics, cut: list[str], first: Event) -> Verdict:
    ranks = [rank.rank for rank in evidence.ranks.values() if rank.node in cut]
    if len(cut) > 1:
        what = f"{' and '.join(cut)} could not reach each other: one of them, or the network between, failed"
    else:
        raised = first.what.splitlines()[0][:200]
        what = f"{cut[0]} could not be reached from the other nodes when {raised!r} was raised"
    rank = ranks[0] if ranks else None
    return Verdict(Kind.node_failure, what, rank, cut[0], first.unix_ns, first.traceback, bad_nodes=cut)


def _did_not_arrive(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks waited in vain: who did not come, by the stacks, by the ranks' steps, by who did not complain."""
    first = next(event for event in later if event.kind is Kind.collective_timeout)
    missing = hung_rank(evidence) or behind(evidence, {event.rank for event in later})
    if missing is None:
        what = f"{first.what}; all ranks were there, so the network is suspect"
        return Verdict(first.kind, what, first.rank, first.node, first.unix_ns, first.traceback)
    place = main_place(missing.stacks)
    where = f"it was at {place.said}" if place else "where it was is not known"
    waited = waited_in(evidence, [event.rank for event in later[:8]])
    what = f"this rank did not come to a collective that {waited}: {where}"
    return Verdict(Kind.collective_timeout, what, missing.rank, missing.node, first.unix_ns, frames_of(missing))


def _lost_peer(evidence: JobDiagnostics, later: list[Event]) -> Verdict:
    """Ranks lost a peer, and no peer tells why: it is one that left no word."""
    silent = [rank for rank in evidence.ranks.values() if rank.silent]
    if not silent and (interrupted := _interrupted(evidence)):
        return interrupted
    if not silent:
        return _ended_early(evidence, evidence.done) if evidence.done else _of_event(later[0])
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
        if (signal_of(evidence.job.exit_code) or signal.SIGTERM) not in TOLD_TO_END:
            return _by_slurm_alone(evidence)  # the script was ended, and the ranks with it
        return _interrupted(evidence) or _ended_from_outside(evidence)
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
        or _by_log(evidence)
        or (_of_script(evidence, "in the job's script, beside its ranks") if began else None)
        or _by_slurm_alone(evidence)
    )


_SHARED = "Is runs_root on a file system that all nodes share, and is there room? Set it to a folder that they all see."
_GONE = "Launch again, and leave the run directory where it is until the job is over."


def _not_started(evidence: JobDiagnostics) -> Verdict | None:
    """Slurm could not open the log or could not start the script; neither leaves more than an exit code."""
    job = evidence.job
    no_log = job.exit_code == "0:53" or job.reason == "RaisedSignal:53"
    if no_log and (gone := evidence.moved_from or evidence.gone):
        now = f"; the run is now {evidence.run.root}" if evidence.moved_from and evidence.run else ""
        return Verdict(Kind.not_started, f"{gone} is gone, so Slurm could not write there{now}", remedy=_GONE)
    if no_log:
        log = evidence.run.batch_log if evidence.run else "the file of the job's output"
        return Verdict(Kind.not_started, f"{_node(job.nodes)} could not write {log}", remedy=_SHARED)
    if job.state == "BOOT_FAIL":
        said = "Run again; if that fails too, tell the site, and leave the node out with cluster.exclude."
        return Verdict(Kind.node_failure, f"{_node(job.nodes)} did not start", remedy=said)
    if not job.nodes and (meant := why_it_waits(job)):
        said = f"the job was over before it started ({job.reason}): {meant}"
        over = Verdict(Kind.not_started, said, remedy=meant)
        return _never_satisfied(evidence, over.kind) if job.reason == DEPENDENCY_FAILED else over
    if job.reason == "JobLaunchFailure" and signal_of(job.exit_code) is None:
        return Verdict(Kind.not_started, f"Slurm could not start the job's script on {_node(job.nodes)}")
    return None


def _node(hosts: str) -> str:
    return f"node {hosts}" if hosts and "[" not in hosts and "," not in hosts else f"a node of {hosts or 'the job'}"


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
        if no_python := _no_python(evidence, said.line, when):
            return replace(no_python, traceback=lines)
        status = f" with exit code {evidence.job.exit_code}" if evidence.job.exit_code else ""
        what = f'{when}, the job\'s script ended{status}; its log says: "{said.line}"'
        return Verdict(said.kind, what, traceback=lines, remedy=said.remedy)
    lines = [line for line in lines if line not in sentences]
    kind, remedy = cause_of_exception(batch.kind, batch.message, batch.lines)
    message = sentences[-1].removeprefix("hpcmm: ") if sentences else batch.message or batch.kind
    if len(batch.lines) > 1:
        return Verdict(kind, f"{when}: {message}", traceback=batch.lines, remedy=remedy)
    if said is not None and said.kind in _SAID_BY_LOG[kind]:
        kind = said.kind
    if said is not None and kind in {said.kind, Kind.setup}:
        remedy = remedy or said.remedy
    if kind is Kind.exception:  # no program's: hpcmm's sentence itself says what to do
        kind, remedy = Kind.setup, remedy or "Do what the sentence says, then launch again."
    return Verdict(kind, f"{when}: {message}", traceback=lines, remedy=remedy)


def _no_python(evidence: JobDiagnostics, line: str, when: str) -> Verdict | None:
    """The script could not start cluster.python."""
    cluster = settings(evidence.run).get("cluster") if evidence.run else None
    python = cluster.get("python") if isinstance(cluster, dict) else None
    if not python or not re.search(rf"(?:^|[ '`]){re.escape(str(python))}'?: ", line):
        return None
    what = f'{when}: cluster.python is {python}, which {_node(evidence.job.nodes)} cannot run; the log says: "{line}"'
    remedy = "Set cluster.python to a Python that all nodes have, or make it available with cluster.modules or setup."
    return Verdict(Kind.setup, what, remedy=remedy)


def _by_srun(evidence: JobDiagnostics) -> Verdict | None:
    for rank, (node, said) in srun_words(evidence.srun_lines).items():
        status = re.fullmatch(r"Exited with exit code (\d+)", said)
        left = evidence.ranks.get(rank) or RankDiagnostics(rank)
        ended = _of_event(end_by_log(left, f"srun says: {said}", int(status[1]) if status else None))
        return replace(ended, kind=Kind.killed if said == "Killed" else ended.kind, node=node, unix_ns=None)
    return None


def _by_log(evidence: JobDiagnostics) -> Verdict | None:
    """A rank that left no record, as on a full disk, if its log's end tells why."""
    if evidence.job.state == "NODE_FAIL" or signal_of(evidence.job.exit_code):
        return None
    for rank in evidence.ranks.values():
        ended = end_by_log(rank, "it left no record of its end", None)
        if rank.silent and ended.kind is not Kind.unknown:
            return replace(_of_event(ended), unix_ns=None)
    return None


def _by_slurm_alone(evidence: JobDiagnostics) -> Verdict:
    job = evidence.job
    if job.state == "NODE_FAIL":
        return Verdict(Kind.node_failure, f"Slurm gave up {_node(job.nodes)}")
    if evidence.gone:
        return Verdict(Kind.data, f"{evidence.gone} is gone, with all that the job wrote there", remedy=_GONE)
    status = f", exit code {job.exit_code}" if job.exit_code else ""
    number = signal_of(job.exit_code)
    if number and evidence.oom_kill:
        return Verdict(Kind.out_of_memory, _KILLED_FOR_MEMORY)
    if number:
        kind = Kind.unknown if number in TOLD_TO_END else kind_of_signal(number)
        return Verdict(kind, f"{signal_name(number)} ended the job's script")
    silent = [rank for rank in evidence.ranks.values() if rank.silent and rank.last_lines]
    if silent:
        lines = silent[0].last_lines
        what = f"it left no word of its end{status}{log_ends(lines)}"
        return Verdict(Kind.unknown, what, silent[0].rank, silent[0].node, traceback=lines[:-1])
    log = [line for line in evidence.batch_lines if line.strip()]
    return Verdict(Kind.unknown, f"no rank left a word of its end{status}{log_ends(log)}")
