"""Where the ranks of a job stand, or stood when it ended, and which of them the others wait for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpcmm.annotate.schema import axis_of
from hpcmm.ranges import write_ranges
from hpcmm.runs.stacks import (
    Answer,
    Look,
    Mark,
    Place,
    Wait,
    main_place,
)


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
    waits: Sequence[Wait] = ()
    """As it tells itself."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    mixed: Collection[str] = ()
    counted_in: str = ""
    """The group of ``number``."""
    of: str = ""
    """What the group that it waits in is for, such as ``tensor group``; empty of the job's only group."""
    members: str = ""
    """Of that group, such as ``ranks 0-1``."""

    @property
    def wait(self) -> Wait | None:
        """What it waits in, once :func:`numbered` has found it among ``waits``."""
        return self.waits[0] if self.waits and self.place is not None else None

    @property
    def operation(self) -> str | None:
        """The collective that it waits in, with its number."""
        called = self.place.operation if self.place is not None else None
        if self.wait is not None and (called is None or called.startswith("wait") or self.wait.peer is not None):
            called = self.wait.op
        counts = self.number is not None and self.place is not None and not self.place.in_rendezvous
        counts = counts and (self.wait is None or self.wait.peer is None)
        return called if called is None or not counts else f"{called} number {self.number}"

    @property
    def said(self) -> str:
        return said_together([self])


def said_together(standings: Sequence[Standing]) -> str:
    """Of ranks that stand at one place, in groups of one kind."""
    first = standings[0]
    if first.place is None:
        return first.why or _NO_ANSWER
    if first.operation is None and first.workers and is_program(first.place):
        return first.workers
    if first.operation is None:
        more = f"; {first.workers}" if first.workers else ""
        return first.place.short + (f" ({first.why})" if first.why else "") + more
    return f"{waits_together(standings)}, called at {first.place.short.partition(', in ')[0]}"


def waits_together(standings: Sequence[Standing]) -> str:
    """``all_reduce number 4 of the tensor groups of ranks 0-1; ranks 2-3``, ``recv from rank 2 of ...``."""
    words, first = standings[0].operation or "", standings[0]
    if peers := sorted({each.wait.peer for each in standings if each.wait and each.wait.peer is not None}):
        words += f" {'to' if words == 'send' else 'from'} {ranks_named(peers)}"
    groups = list(dict.fromkeys(each.members for each in standings if each.members))
    if groups:
        more = f"; and {len(groups) - _MOST_NAMED} more" if len(groups) > _MOST_NAMED else ""
        words += f" of the {first.of}{'s' if len(groups) > 1 else ''} of {'; '.join(groups[:_MOST_NAMED])}{more}"
    return words


_NO_ANSWER = "it gave no answer: its node, or the process in front of it, may be stopped or gone"
_MOST_NAMED = 8


def standing_of(answer: Answer) -> Standing:
    look = answer.looks[-1] if answer.looks else Look(0)
    place = main_place(look.stack)
    return Standing(
        answer.rank,
        answer.node,
        place,
        answer.why,
        look.groups,
        workers=said_of_workers(place, answer),
        waits=look.waits,
        marks=look.marks,
        mixed=look.mixed,
    )


_PROGRAM = re.compile(r'/hpcmm/worker/entrypoint\.py", line \d+ in _run_program$')


def is_program(place: Place) -> bool:
    """Whether it is hpcmm's own, in front of a program that the user named."""
    return any(map(_PROGRAM.search, place.frames))


_FOR_PROCESSES = re.compile(
    r"/multiprocessing/|/subprocess\.py|/torch/utils/data/dataloader|/torch/distributed/elastic/|/concurrent/futures/"
    r"|/joblib/|/hpcmm/worker/signal_forwarding"
)
_MOST_PLACES, _MOST_FRAMES = 4, 20


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
    """With what each rank waits in, and with the number of its latest collective in the group that matters.

    That is the group that it waits in, or that others wait in without it. If no rank tells of groups, it is the one in
    which the ranks have not all come to the same collective, or the only one.
    """
    known = list(standings)
    members = _members(known)
    began = {group: {each.rank for each in known if any(w.group == group for w in each.waits)} for group in members}
    known = [replace(each, waits=sorted(each.waits, key=lambda w: not _is_open(w, members, began))) for each in known]
    awaited = [wait.group for each in known if (wait := each.wait) is not None and wait.group]
    apart = _apart(known)
    mixed = {group for each in known for group in each.mixed}
    mixed |= {wait.group for each in known if (wait := each.wait) is not None and wait.peer is not None}
    found = []
    for each in known:
        own = [each.wait.group] if each.wait is not None else [group for group in awaited if group in each.groups]
        group = next(iter(own), "") or apart
        number = each.groups.get(group)
        if each.wait is not None and each.wait.number is not None:
            number = each.wait.number
        of, ranks = _named(each, members, known)
        found.append(replace(each, number=None if group in mixed else number, counted_in=group, of=of, members=ranks))
    return found


def _apart(standings: Iterable[Standing]) -> str:
    """The one group in which the ranks have not all come to the same collective, or the only group; else empty."""
    numbers: dict[str, set[int]] = {}
    for each in standings:
        for name, number in each.groups.items():
            numbers.setdefault(name, set()).add(number)
    apart = [name for name, found in numbers.items() if len(found) > 1] if len(numbers) > 1 else list(numbers)
    return apart[0] if len(apart) == 1 else ""


def _members(standings: Iterable[Standing]) -> dict[str, set[int]]:
    """The ranks of each group: as they are told, else those that tell of the group."""
    told: dict[str, set[int]] = {}
    seen: dict[str, set[int]] = {}
    for each in standings:
        for group in each.groups:
            seen.setdefault(group, set()).add(each.rank)
        for group, mark in each.marks.items():
            told.setdefault(group, set()).update(mark.ranks)
    return {group: told.get(group) or ranks for group, ranks in seen.items()}


def _is_open(wait: Wait, members: Mapping[str, set[int]], began: Mapping[str, set[int]]) -> bool:
    """Whether somebody has not come to it."""
    return wait.peer is not None or bool(members.get(wait.group, set()) - began.get(wait.group, set()))


def _named(standing: Standing, members: Mapping[str, set[int]], known: Sequence[Standing]) -> tuple[str, str]:
    """What the group is for that a rank waits in, and its ranks, in words; nothing of the job's only group."""
    wait = standing.wait
    if wait is None or not wait.group or len(members) < 2:
        return "", ""
    marks = {group: mark for each in known for group, mark in each.marks.items() if mark.name}
    group = wait.group
    if wait.peer is not None and group not in marks:  # libraries send within the group of all ranks
        both = {standing.rank, wait.peer}
        along = [name for name in standing.marks if name in marks and both <= members.get(name, set())]
        group = min(along, key=lambda name: len(members[name]), default=group)
    ranks = members.get(group, set())
    axis = axis_of(marks[group].name) or marks[group].name if group in marks else ""
    is_all = not axis and len(ranks) > 1 and ranks >= {each.rank for each in known}
    who = "all ranks" if is_all else ranks_named(sorted(ranks)) if ranks else ""
    return f"{axis} group".strip(), who


def _waited_for(standing: Standing, known: Sequence[Standing], members: Mapping[str, set[int]]) -> set[int] | None:
    """The ranks that a rank waits for; None if that is not known."""
    wait = standing.wait
    if wait is None or not wait.group:
        return None
    if wait.peer is not None:
        return {wait.peer}
    here = {each.rank for each in known if each.wait is not None and each.wait.group == wait.group}
    return members[wait.group] - here if wait.group in members else None


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
    found: dict[tuple[str, str], list[Standing]] = {}
    for each in sorted(standings, key=lambda standing: standing.rank):
        found.setdefault((said_together([replace(each, members="", waits=_of_anybody(each))]), each.of), []).append(
            each
        )
    groups = [
        Group([each.rank for each in alike], said_together(alike), alike[0].place if _is_alone(alike[0]) else None)
        for alike in found.values()
    ]
    return sorted(groups, key=lambda group: (-len(group.ranks), group.ranks[0]))


def _is_alone(standing: Standing) -> bool:
    """Whether it waits neither for others nor for processes that it has started."""
    return standing.operation is None and not standing.workers


def _of_anybody(standing: Standing) -> list[Wait]:
    """What it waits in, whoever the other rank is."""
    return [replace(each, peer=None if each.peer is None else 0) for each in standing.waits]


def missing_ranks(standings: Iterable[Standing], *, still: bool = False) -> list[Standing]:
    """The ranks that others wait for: not in a collective themselves, while some are. Empty if none is in one.

    ``still``: no rank moves or works. Then those in a backward pass wait for gradients, which no call of Python tells.
    """
    known = list(standings)
    if still and (apart := _not_in_backward(known)):
        return apart
    members = _members(known)
    waited_for = [_waited_for(each, known, members) for each in known if each.operation is not None]
    somebody = {rank for ranks in waited_for for rank in ranks or ()}
    ahead = _ahead(known)
    away = [each for each in known if each.operation is None and (each.rank in somebody or None in waited_for)]
    # One in backward may wait for gradients there; it does if it has come as far as those that wait.
    return [each for each in away if not _waits_unseen(each, ahead)] if len(away) < len(known) else []


def _not_in_backward(standings: Sequence[Standing]) -> list[Standing]:
    """The ranks that are elsewhere while others are in a backward pass, if all tell where they are."""
    if any(each.place is None or each.operation is not None for each in standings):
        return []
    away = [each for each in standings if each.place is not None and not each.place.may_wait]
    return away if len(away) < len(standings) else []


def _ahead(standings: Iterable[Standing]) -> dict[str, int]:
    """The number that those that wait in a collective have come to, in each group."""
    found: dict[str, int] = {}
    for each in standings:
        if each.operation is not None and each.number is not None:
            found[each.counted_in] = max(each.number, found.get(each.counted_in, 0))
    return found


def _waits_unseen(standing: Standing, ahead: Mapping[str, int]) -> bool:
    if standing.place is None or not standing.place.may_wait or standing.number is None:
        return False
    return standing.counted_in in ahead and standing.number >= ahead[standing.counted_in]


def findings(standings: Iterable[Standing], *, still: bool = True) -> list[str]:
    """Sentences on who is missing where. ``still``: the ranks are known not to move; else it is one moment's view."""
    known = list(standings)
    members, away = _members(known), missing_ranks(known)
    if still and (apart := _not_in_backward(known)):
        waiting = [each.rank for each in known if each not in apart]
        missing, are = ranks_named([each.rank for each in apart]), "are" if len(apart) > 1 else "is"
        return [f"{missing} {are} not in a backward pass, in which {ranks_named(waiting)} wait, as for gradients"]
    direct: list[Standing] = []
    in_turn: list[Standing] = []
    for each in known:
        if each.operation is not None or (each not in away and _waits_unseen(each, _ahead(known))):
            awaited = _waited_for(each, known, members)
            if awaited is None or awaited & {lost.rank for lost in away}:
                direct.append(each)
            elif awaited:
                in_turn.append(each)
    if away:
        said = [_did_not_come(away, direct, _ahead(known), still=still)]
        return said + ([f"others wait{'' if still else 'ed'} for these in turn: {_calls(in_turn)}"] if in_turn else [])
    waiting_all = [*direct, *in_turn]
    if len({waits_together([each]) for each in waiting_all}) < 2:
        return []
    return [f"the ranks wait{'' if still else 'ed'} in different {_exchanges(waiting_all)}s: {_calls(waiting_all)}"]


def _did_not_come(
    away: Sequence[Standing], direct: Sequence[Standing], ahead: Mapping[str, int], *, still: bool
) -> str:
    numbers = [each.number for each in away if each.number is not None]
    same = numbers and len({each.counted_in for each in (*away, *direct)}) == 1  # else nobody knows of which group
    came = f"; {'their' if len(away) > 1 else 'its'} last one was number {max(numbers)}" if same else ""
    missing, several = ranks_named([each.rank for each in away]), len(away) > 1
    is_past = bool(same) and min(numbers) > ahead.get(away[0].counted_in, min(numbers))
    word = "an exchange" if _exchanges(direct) == "exchange" else "a collective"
    came_not = f"{'are' if several else 'is'} past" if is_past else "did not come to"
    came_not = f"{came_not} {word} that others wait in" if still else f"in no {word.split()[1]} while others were"
    return f"{missing} {came_not} ({_calls(direct)}){came}"


def _exchanges(waiting: Iterable[Standing]) -> str:
    return "exchange" if any(each.wait is not None and each.wait.peer is not None for each in waiting) else "collective"


def _calls(waiting: Sequence[Standing]) -> str:
    """``ranks 0-1 in all_reduce number 4 of ..., rank 2 in ...``."""
    calls: dict[tuple[str, str], list[Standing]] = {}
    for each in waiting:
        operation = each.operation or f"one of backward, number {each.number}"  # so the others are behind, or elsewhere
        calls.setdefault((operation, each.of), []).append(each)
    said = []
    for (operation, _), alike in list(calls.items())[:_MOST_NAMED]:
        words = waits_together(alike) if alike[0].operation is not None else operation
        said.append(f"{ranks_named([each.rank for each in alike])} in {words}")
    return ", ".join(said)


def ranks_named(numbers: list[int]) -> str:
    return f"rank{'' if len(numbers) == 1 else 's'} {write_ranges(numbers)}"
