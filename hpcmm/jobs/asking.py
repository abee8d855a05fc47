"""The ranks of a job are asked where they stand while it runs, and what they left tells of its end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpcmm.files import read_followed, read_tail
from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics
from hpcmm.jobs.find_run import settings, shared_folder, world_size_of
from hpcmm.jobs.standing import (
    Group,
    Standing,
    findings,
    grouped,
    is_program,
    missing_ranks,
    numbered,
    ranks_named,
    said_of_workers,
    standing_of,
)
from hpcmm.jobs.state import is_local, why_it_waits
from hpcmm.node.recorder import is_still, wakes, works
from hpcmm.ranges import MAX_RANK
from hpcmm.runs.ownership import is_mine
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.stacks import (
    AT_END,
    Answer,
    Place,
    ask,
    main_place,
    newest_folder,
    ranks_of,
)
from hpcmm.slurm.jobs import Job

_PATIENCE_S = 12.0
"""For answers: a rank is looked at twice, and the file that asks may be seen some seconds late."""
_QUIET_S = 180.0
"""Without output and progress, after which ranks that do not move are said to hang: a slow step takes a minute."""
_MOST_SHOWN = 8
_MOST_POINTS = 20
_NO_PROCESS = "no process tells of it: it has ended, or has not started yet"
_MOST_SOURCE_BYTES = 1 << 20
_MOST_SOURCE = 100


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job by where they stand."""

    groups: list[Group]
    findings: list[str]
    """Who is missing where."""
    missing: list[Standing] = field(default_factory=list)
    moves: bool | None = None
    """Whether a rank moved between two looks; None of ranks that are not looked at now, or did not answer."""
    works: list[int] = field(default_factory=list)
    """Ranks that do something at one place: they keep a processor busy, or wake again and again."""
    quiet_s: float | None = None
    """Since when the ranks, which run, have written nothing."""
    asked_unix_ns: int | None = None
    """When they were asked, if that was before the job's end."""

    @property
    def hang(self) -> bool:
        """Whether they run and stand still so clearly that one may say so."""
        return self.moves is False and not self.works and (self.quiet_s or 0.0) >= _QUIET_S


def ask_ranks(evidence: JobDiagnostics, patience_s: float = _PATIENCE_S) -> tuple[JobDiagnostics, Ranks | None]:
    """Ask the ranks of a job that runs where they stand. None if they cannot be asked."""
    run, job = evidence.run, evidence.job
    folder = newest_folder(run, job.raw_id) if run is not None and job.state == "RUNNING" else None
    if run is None or folder is None or evidence.hang is not None or not is_mine(run.root):
        return evidence, None
    size = world_size_of(run)
    try:
        answers = ask(run, folder, size, patience_s)
    except OSError as error:
        note = f"The ranks cannot be asked where they stand: {folder} cannot be written ({error.strerror})."
        return replace(evidence, notes=[*evidence.notes, note]), None
    known, away = _by_rank({rank: each for rank, each in answers.items() if rank not in evidence.done}, size)
    why = _NO_PROCESS if known.keys() - answers.keys() else ""
    lost = [Standing(rank, _node_of(evidence, rank), why=why) for rank in away if rank not in evidence.done]
    standings = numbered([*map(standing_of, known.values()), *lost])
    moves = not all(map(is_still, known.values())) if known else None
    twice = {rank: (answer.looks[-2], answer.looks[-1]) for rank, answer in known.items() if len(answer.looks) > 1}
    busy = [rank for rank, looks in twice.items() if works(*looks) or wakes(*looks)]
    groups = _with_source(grouped(standings), run)
    still = moves is False and not busy
    said = [] if moves else findings(standings, still=still)  # at any moment some wait for others
    ranks = Ranks(groups, said, missing_ranks(standings, still=still), moves, busy, _quiet_s(run, size))
    return replace(evidence, answers=answers), ranks


def _by_rank(answers: dict[int, Answer], size: int) -> tuple[dict[int, Answer], list[int]]:
    """The answers of the ranks, and the ranks without one. ``size``: how many processes were launched."""
    known = ranks_of(answers)
    if known == answers:
        return known, [rank for rank in range(size) if rank not in answers]
    told = max((each.world or 0 for each in known.values()), default=0)
    return known, [rank for rank in range(min(told, MAX_RANK + 1)) if rank not in known]


def ranks_at_end(evidence: JobDiagnostics) -> Ranks | None:
    """Where the ranks stood when the job was ended, else when they were asked last; None if nothing tells."""
    stacks = {rank: place for rank, each in evidence.ranks.items() if (place := main_place(each.stacks)) is not None}
    answers = ranks_of(evidence.answers)
    asked_ns = None
    at_end = {rank: answer for rank, answer in answers.items() if answer.key == AT_END}
    if evidence.hang is None and any(each.looks for each in at_end.values()):  # ranks that a launched process started
        standings = [standing_of(answer) for answer in at_end.values()]
    elif evidence.hang is not None or not stacks:
        standings = [standing_of(answer) for answer in answers.values()]
        asked_ns = max((look.unix_ns for answer in answers.values() for look in answer.looks), default=None)
    else:
        standings = [
            Standing(
                rank,
                _node_of(evidence, rank),
                place,
                **_told_at(place, answers.get(rank)),
                workers=said_of_workers(place, at_end[rank]) if rank in at_end else "",
            )
            for rank, place in stacks.items()
        ]
    if not standings:
        return None
    known = numbered(standings)
    groups = _with_source(grouped(known), evidence.run)
    said = findings(known, still=evidence.hang is not None)
    if asked_ns is None:  # Slurm wakes a stopped rank before it ends it
        kept = grouped(Standing(each.rank, why=each.why) for each in answers.values() if each.why)
        said += [f"{ranks_named(group.ranks)}, when last asked: {group.said}" for group in kept[:_MOST_SHOWN]]
    return Ranks(groups, said, missing_ranks(known, still=evidence.hang is not None), asked_unix_ns=asked_ns)


def _told_at(place: Place, answer: Answer | None) -> dict[str, Any]:
    """What a rank told before of its groups, if it still stood there at the end."""
    look = answer.looks[-1] if answer is not None and answer.looks else None
    before = main_place(look.stack) if look is not None else None
    if look is None or before is None or before.frames != place.frames:
        return {}
    return {"groups": look.groups, "waits": look.waits, "marks": look.marks, "mixed": look.mixed}


def _node_of(evidence: JobDiagnostics, rank: int) -> str:
    return evidence.ranks[rank].node if rank in evidence.ranks else ""


def _quiet_s(run: RunDir, size: int) -> float | None:
    """How long ago a rank has last written to its log or metrics; None if none has."""
    newest_s = []
    for rank in range(size):
        for path in (run.rank_log(rank), run.rank_metrics(rank)):
            try:
                newest_s.append(path.lstat().st_mtime)
            except OSError:  # it has none
                continue
    return max(0.0, time.time() - max(newest_s)) if newest_s else None


def lines_of_ranks(ranks: Ranks) -> list[str]:
    """For a terminal."""
    lines = []
    if ranks.asked_unix_ns is not None:
        when = datetime.fromtimestamp(ranks.asked_unix_ns / 1e9, UTC).isoformat(timespec="seconds")
        lines.append(f"ranks:    as they stood at {when.replace('+00:00', 'Z')}")
    for group in ranks.groups[:_MOST_SHOWN]:
        lines.append(f"{'' if lines else 'ranks:':10}{group.named}: {group.said}")
    rest = [rank for group in ranks.groups[_MOST_SHOWN:] for rank in group.ranks]
    if rest:
        lines.append(f"          and {len(rest)} more ranks, each at another place")
    return lines + [f"missing:  {said}" for said in ranks.findings]


def lines_of_points(points: Iterable[tuple[str, Ranks]]) -> list[str]:
    """Of the points of a sweep that run; those whose ranks move share a line."""
    known = list(points)
    moving = [name for name, ranks in known if ranks.moves]
    still = [(name, ranks) for name, ranks in known if not ranks.moves]
    lines = [f"running:  {', '.join(moving[:_MOST_POINTS])}{_more(moving)}: the ranks move"] if moving else []
    for name, ranks in still[:_MOST_SHOWN]:
        lines += [f"running:  {name}: {said_of_running(ranks)}", *lines_of_ranks(ranks)]
    names = [name for name, _ in still[_MOST_SHOWN:]]
    return lines + ([f"          and {', '.join(names[:_MOST_POINTS])}{_more(names)}: no rank moved"] if names else [])


def _more(names: list[str]) -> str:
    return f" and {len(names) - _MOST_POINTS} more" if len(names) > _MOST_POINTS else ""


def said_of_running(ranks: Ranks) -> str:
    """Whether the ranks move, in a sentence."""
    ago = f"; the last output is {ranks.quiet_s:.0f} s old" if ranks.quiet_s is not None else ""
    if ranks.moves is None:
        return f"No rank answered{ago}."
    if ranks.moves:
        return "The ranks move: two looks at them, 2 s apart, differ."
    if ranks.works:
        busy = ", ".join(map(str, ranks.works[:_MOST_SHOWN]))
        return f"Rank {busy} is at work at one place: two looks 2 s apart are the same, but it does not rest{ago}."
    return f"No rank moved between two looks 2 s apart{ago}."


def still_for(ranks: Ranks) -> str:
    """Of ranks that hang, for how long."""
    return f"no rank moves, and none has written anything for {ranks.quiet_s or 0.0:.0f} s"


def values_of_ranks(ranks: Ranks) -> dict[str, Any]:
    """For JSON."""
    return {
        "moves": ranks.moves,
        "works": ranks.works,
        "quiet_s": ranks.quiet_s,
        "groups": [{"ranks": group.ranks, "at": group.said} for group in ranks.groups],
        "missing": [each.rank for each in ranks.missing],
        "findings": ranks.findings,
    }


def _with_source(groups: Iterable[Group], run: RunDir | None) -> list[Group]:
    """With the line of the user's code at which ranks stand that wait in no collective; of one's own run alone."""
    found = list(groups)
    if run is None or not is_mine(run.root):
        return found
    return [
        replace(group, said=f"{group.said}: {source}") if (source := _source(group, run)) else group
        for group in found[:_MOST_SHOWN]
    ] + found[_MOST_SHOWN:]


_OWN_FRAME = re.compile(r'File "(?P<file>/.+)", line (?P<line>\d{1,7}) in .+')


def _source(group: Group, run: RunDir) -> str:
    match = _OWN_FRAME.fullmatch(group.place.own or "") if group.place is not None else None
    if match is None or group.place is None or group.place.operation is not None or is_program(group.place):
        return ""
    file = Path(match["file"])
    copies = (run.code, shared_folder(run).code)
    try:
        is_copy = any(file.is_relative_to(folder) for folder in copies)
        if not is_copy and file.stat().st_mtime > run.config.stat().st_mtime:  # the line may be another one now
            return ""
        lines = read_followed(file, _MOST_SOURCE_BYTES).decode(errors="replace").splitlines()
    except (OSError, ValueError):  # a name that is none
        return ""
    number = int(match["line"])
    return lines[number - 1].strip()[:_MOST_SOURCE] if 0 < number <= len(lines) else ""


# What they left.

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


def waited_in(evidence: JobDiagnostics, ranks: Iterable[int]) -> str:
    """``rank 0, 1 waited in (rank 1 in all_reduce of the tensor group of ranks 0-1)``: ranks that waited in vain."""
    waited = list(ranks)
    calls: dict[str, list[int]] = {}
    for rank in waited:
        error = evidence.ranks[rank].error
        if error is not None and error.exchange:
            calls.setdefault(error.exchange, []).append(rank)
    told = ", ".join(f"{ranks_named(each)} in {call}" for call, each in list(calls.items())[:_MOST_SHOWN])
    return f"rank {', '.join(map(str, waited))} waited in" + (f" ({told})" if told else "")


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
