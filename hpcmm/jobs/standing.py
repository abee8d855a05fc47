"""Where the ranks of a job stand, or stood when it ended, and which of them the others wait for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from hpcmm.files import read_tail
from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics
from hpcmm.jobs.find_run import settings, shared_folder
from hpcmm.jobs.state import is_local, why_it_waits
from hpcmm.ranges import write_ranges
from hpcmm.runs.stacks import (
    Answer,
    Look,
    Place,
    main_place,
)
from hpcmm.slurm.jobs import Job

# Which ranks stand together.


@dataclass(frozen=True)
class Standing:
    """Where one rank stands, or why that is not known."""

    rank: int
    node: str = ""
    place: Place | None = None
    why: str = ""
    groups: Mapping[str, int] = field(default_factory=dict)
    number: int | None = None
    """Of the latest collective that it has called, in the group that matters, see :func:`numbered`."""
    workers: str = ""
    """Where the processes stand that it has started, if it waits for them."""

    @property
    def operation(self) -> str | None:
        """The collective that it waits in, with its number."""
        if self.place is None or self.place.operation is None:
            return None
        counts = self.number is not None and not self.place.in_rendezvous
        return self.place.operation + (f" number {self.number}" if counts else "")

    @property
    def said(self) -> str:
        if self.place is None:
            return self.why or _NO_ANSWER
        if self.operation is None and self.workers and is_program(self.place):
            return self.workers
        if self.operation is None:
            more = f"; {self.workers}" if self.workers else ""
            return self.place.short + (f" ({self.why})" if self.why else "") + more
        return f"{self.operation}, called at {self.place.short.partition(', in ')[0]}"


_NO_ANSWER = "it gave no answer: its node, or the process in front of it, may be stopped or gone"
_MOST_NAMED = 8


def standing_of(answer: Answer) -> Standing:
    look = answer.looks[-1] if answer.looks else Look(0)
    place = main_place(look.stack)
    return Standing(answer.rank, answer.node, place, answer.why, look.groups, workers=said_of_workers(place, answer))


_PROGRAM = re.compile(r'/hpcmm/worker/entrypoint\.py", line \d+ in _run_program$')


def is_program(place: Place) -> bool:
    """Whether it is hpcmm's own, in front of a program that the user named."""
    return any(map(_PROGRAM.search, place.frames))


_FOR_PROCESSES = re.compile(
    r"/multiprocessing/|/subprocess\.py|/torch/utils/data/dataloader|/torch/distributed/elastic/|/concurrent/futures/"
    r"|/joblib/|/hpcmm/worker/signal_forwarding"
)
_MOST_PLACES = 4


def said_of_workers(place: Place | None, answer: Answer) -> str:
    """Where the processes of a rank stand that waits for them, those together that stand at one place."""
    if place is None or not any(_FOR_PROCESSES.search(frame) for frame in place.frames[:_MOST_FRAMES]):
        return ""
    names: dict[str, list[str]] = {}
    for worker in answer.workers:
        at = main_place(worker.looks[-1].stack) if worker.looks else None
        is_launcher = at is not None and any(each.parent == worker.pid for each in answer.workers)
        if not is_launcher and not (at is not None and _serves(at)):
            where = f"at {at.short}" if at is not None else f"({worker.why})"
            names.setdefault(where, []).append(worker.name)
    said = [
        f"{named[0] if len(named) == 1 else f'{len(named)} of its processes'} {where}" for where, named in names.items()
    ]
    return "; ".join(said[:_MOST_PLACES]) + (" and others elsewhere" if len(said) > _MOST_PLACES else "")


_SERVES = re.compile(r"/multiprocessing/(?:resource_tracker|forkserver|managers)\.py")
_BEGINS = re.compile(r'/multiprocessing/process\.py", line \d+ in _bootstrap$')


def _serves(place: Place) -> bool:
    """Whether a process only serves the others, or waits for what they give it to do.

    Below the frame in which it began, one that was forked has those of its parent.
    """
    began = next((at for at, frame in enumerate(place.frames) if _BEGINS.search(frame)), None)
    waits = began is not None and place.own not in place.frames[:began] and _QUEUES.search("".join(place.frames[:5]))
    return bool(waits) or any(map(_SERVES.search, place.frames))


_QUEUES = re.compile(r"/multiprocessing/(?:queues|connection)\.py")


def numbered(standings: Iterable[Standing]) -> list[Standing]:
    """With numbers of the group in which the ranks have not all come to the same collective, or of the only group."""
    known = list(standings)
    numbers: dict[str, set[int]] = {}
    for each in known:
        for name, number in each.groups.items():
            numbers.setdefault(name, set()).add(number)
    apart = [name for name, found in numbers.items() if len(found) > 1] if len(numbers) > 1 else list(numbers)
    return [replace(each, number=each.groups.get(apart[0])) if len(apart) == 1 else each for each in known]


@dataclass(frozen=True)
class Group:
    """Ranks that stand at the same place."""

    ranks: list[int]
    said: str
    place: Place | None = None

    @property
    def named(self) -> str:
        return write_ranges(self.ranks)


def grouped(standings: Iterable[Standing]) -> list[Group]:
    """The largest group first; of two that are alike in size the one with the lowest rank."""
    found: dict[str, Group] = {}
    for each in sorted(standings, key=lambda standing: standing.rank):
        known = found.get(each.said, Group([], each.said, None if each.workers else each.place))
        found[each.said] = replace(known, ranks=[*known.ranks, each.rank])
    return sorted(found.values(), key=lambda group: (-len(group.ranks), group.ranks[0]))


def missing_ranks(standings: Iterable[Standing], *, still: bool = False) -> list[Standing]:
    """The ranks that others wait for: not in a collective themselves, while some are. Empty if none is in one.

    ``still``: no rank moves or works. Then those in a backward pass wait for gradients, which no call of Python tells.
    """
    known = list(standings)
    if still and (apart := _not_in_backward(known)):
        return apart
    ahead = _ahead(known)
    away = [each for each in known if each.operation is None]
    # One in backward may wait for gradients there; it does if it has come as far as those that wait.
    return [each for each in away if not _waits_unseen(each, ahead)] if len(away) < len(known) else []


def _not_in_backward(standings: Sequence[Standing]) -> list[Standing]:
    """The ranks that are elsewhere while others are in a backward pass, if all tell where they are."""
    if any(each.place is None or each.operation is not None for each in standings):
        return []
    away = [each for each in standings if each.place is not None and not each.place.may_wait]
    return away if len(away) < len(standings) else []


def _ahead(standings: Iterable[Standing]) -> int | None:
    """The number that those that wait in a collective have come to."""
    numbers = [each.number for each in standings if each.operation is not None and each.number is not None]
    return max(numbers, default=None)


def _waits_unseen(standing: Standing, ahead: int | None) -> bool:
    if standing.place is None or not standing.place.may_wait:
        return False
    return standing.number is not None and ahead is not None and standing.number >= ahead


def findings(standings: Iterable[Standing], *, still: bool = True) -> list[str]:
    """Sentences on who is missing where. ``still``: the ranks are known not to move; else it is one moment's view."""
    known = list(standings)
    calls: dict[str, list[int]] = {}
    ahead = _ahead(known)
    for each in known:
        operation = each.operation
        if operation is None and each.number != ahead and _waits_unseen(each, ahead):
            operation = f"one of backward, number {each.number}"  # so those that wait are behind, or called another one
        if operation is not None:
            calls.setdefault(operation, []).append(each.rank)
    named = [f"{ranks_named(ranks)} in {name}" for name, ranks in list(calls.items())[:_MOST_NAMED]]
    said = []
    if still and (away := _not_in_backward(known)):
        waiting = [each.rank for each in known if each not in away]
        missing, are = ranks_named([each.rank for each in away]), "are" if len(away) > 1 else "is"
        said.append(f"{missing} {are} not in a backward pass, in which {ranks_named(waiting)} wait, as for gradients")
    elif away := missing_ranks(known):
        numbers = [each.number for each in away if each.number is not None]
        came = f"; {'their' if len(away) > 1 else 'its'} last one was number {max(numbers)}" if numbers else ""
        missing = ranks_named([each.rank for each in away])
        is_past = bool(numbers) and ahead is not None and min(numbers) > ahead
        came_not = f"{'are' if len(away) > 1 else 'is'} past" if is_past else "did not come to"
        came_not = f"{came_not} a collective that others wait in" if still else "in no collective while others were"
        said.append(f"{missing} {came_not} ({', '.join(named)}){came}")
    elif len(calls) > 1:
        said.append(f"the ranks wait{'' if still else 'ed'} in different collectives: {', '.join(named)}")
    return said


def ranks_named(numbers: list[int]) -> str:
    return f"rank{'' if len(numbers) == 1 else 's'} {write_ranges(numbers)}"


# The ranks of a job.

_RECORDING = re.compile(r'/hpcmm/node/recorder\.py", line \d+ in _record$')
_MOST_FRAMES = 20
_LATELY_S = 120.0


def worked_lately(evidence: JobDiagnostics) -> bool:
    """Whether ranks still finished steps shortly before Slurm ended the job; False if nothing tells."""
    try:
        ended_s = datetime.fromisoformat(evidence.job.ended).timestamp()
        job_s = ended_s - datetime.fromisoformat(evidence.job.started).timestamp()
    except (ValueError, OverflowError):
        return False
    known = [rank.progress for rank in evidence.ranks.values() if rank.progress and rank.progress.last_step is not None]
    last_s = max((each.last_unix_ns / 1e9 for each in known), default=0.0)
    return ended_s - last_s <= max(_LATELY_S, job_s / 20)


def hung_rank(evidence: JobDiagnostics) -> RankDiagnostics | None:
    """The one rank that was not in a collective when all were told to end, if all others were."""
    places = {rank: main_place(each.stacks) for rank, each in evidence.ranks.items()}
    away = [rank for rank, place in places.items() if place is not None and not place.in_collective]
    waiting = [rank for rank, place in places.items() if place is not None and place.in_collective]
    # One that was ended while it recorded how it lost another has raised, too.
    raising = {rank for rank in away if any(_RECORDING.search(frame) for frame in frames_of(evidence.ranks[rank]))}
    away = [rank for rank in away if rank not in raising]
    told = [rank for rank, each in evidence.ranks.items() if each.error is not None or rank in raising]
    if len(away) == 1 and len(away) + len(waiting) + len(told) == len(places) > 1:
        return evidence.ranks[away[0]]
    return None


def behind(evidence: JobDiagnostics, complained: set[int]) -> RankDiagnostics | None:
    """The rank that did not complain as the others did, or that finished fewer steps than all others."""
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


def while_others_waited(evidence: JobDiagnostics, hung: RankDiagnostics) -> str:
    """Where a rank was when the job ended, and what all others waited for."""
    others = [main_place(rank.stacks) for rank in evidence.ranks.values() if rank.rank != hung.rank]
    met = not all(place.in_rendezvous for place in others if place is not None)
    waited = "in a collective" if met else "for the group to form (init_process_group)"
    place = main_place(hung.stacks)
    assert place is not None
    return f"while all ranks but this one waited {waited}; it was at {place.said}"


def steps_finished(evidence: JobDiagnostics) -> str:
    """How far the ranks of a job that runs have come; empty if they do not tell."""
    known = [rank.progress for rank in evidence.ranks.values() if rank.progress and rank.progress.last_step is not None]
    steps = [each.last_step for each in known if each.last_step is not None]
    if not steps:
        return ""
    ago_s = max(0.0, time.time() - max(each.last_unix_ns for each in known) / 1e9)
    slowest = min(known, key=lambda each: (each.last_step or 0, each.rank)).rank
    return (
        f"Nothing has failed so far: {len(known)} ranks finished step {min(steps)} to {max(steps)}, rank {slowest} the "
        f"fewest, the last one {ago_s:.0f} s ago."
    )


def progress(evidence: JobDiagnostics) -> str:
    """How far a job has come that has not failed."""
    if evidence.job.state == "COMPLETED":
        stopped = evidence.run is not None and is_local(evidence.run) and evidence.run.stopped.exists()
        if not stopped and _ended_before_its_ranks(evidence):
            return (
                "That is Slurm's word, but none of its ranks started: its script ended before that, such as by exec or "
                "exit in cluster.setup."
            )
        return "It stopped as asked; nothing has failed." if stopped else "Nothing has failed."
    if evidence.job.pending:
        return waiting(evidence.job)
    return steps_finished(evidence) or (
        f"Nothing has failed so far{'; no step is finished yet' if is_workload(evidence) else ''}."
    )


def _ended_before_its_ranks(evidence: JobDiagnostics) -> bool:
    """Whether a script of ours left neither the note that it had prepared the ranks, nor one of its end."""
    run = evidence.run
    if run is None or evidence.prepared or evidence.ranks or is_local(run) or evidence.gone:
        return False
    shared = shared_folder(run)
    return _PREPARES in read_tail(shared.submission_script, _SCRIPT_BYTES, within=shared.root)


def waiting(job: Job) -> str:
    """What a job waits for that is queued."""
    reason = f"Slurm's reason is {job.reason}." if job.reason else "Slurm tells no reason yet."
    start = f" It is expected to start at {job.started}." if job.started else ""
    return f"Nothing has failed so far. {why_it_waits(job) or reason}{start}"


_PREPARES, _SCRIPT_BYTES = "hpcmm.worker prepare ", 1 << 20


def step_reached(evidence: JobDiagnostics, rank: int) -> str:
    """How far a rank came before the end."""
    known = evidence.ranks.get(rank)
    if known is None:
        return ""
    if known.progress is not None and known.progress.last_step is not None:
        return f"finished step {known.progress.last_step}"
    if known.error is not None and known.error.step is not None:
        return f"step {known.error.step}"
    return "no step yet" if known.progress is not None and is_workload(evidence) else ""


def is_workload(evidence: JobDiagnostics) -> bool:
    """Whether the ranks tell of their steps, as those of a user's script do not."""
    task = settings(evidence.run).get("task") if evidence.run else None
    return isinstance(task, dict) and task.get("_target_") is not None


def ranks_that_meet(evidence: JobDiagnostics) -> list[tuple[RankDiagnostics, Place]]:
    """The ranks, if all that left stacks waited for the rendezvous when they were told to end; else none."""
    places = [(rank, place) for rank in evidence.ranks.values() if (place := main_place(rank.stacks)) is not None]
    return places if all(place.in_rendezvous for _, place in places) else []


def frames_of(rank: RankDiagnostics) -> list[str]:
    """Where it was, for a reader."""
    place = main_place(rank.stacks)
    return [f"  {frame}" for frame in place.frames[:_MOST_FRAMES]] if place else []
