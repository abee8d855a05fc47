"""Number ranges such as ``0-3,7``, read and written: which ranks and which steps are meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from hpcmm.errors import HpcmmError

_RANGE = re.compile(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*")
_TASKS = r"[0-9]{1,9}(?:-[0-9]{1,9}(?::[0-9]{1,9})?)?"
_JOB_NUMBER = re.compile(
    rf"[0-9]{{1,12}}(?:\+[0-9]{{1,4}})?(?:_(?:[0-9]{{1,9}}|\[{_TASKS}(?:,{_TASKS})*(?:%[0-9]{{1,9}})?\]))?"
)
_MOST_TASKS = 10_000_000
"""Of an array; Slurm's own limit is 4 million."""
_MOST_DIGITS = 9
"""Of a task's number."""
MAX_WORLD_SIZE = 1 << 17
"""A record of more ranks is damaged."""
MAX_RANK = 999_999
"""A larger number in a list that another program wrote is no rank."""


def parse_ranges(listed: str) -> list[range | None]:
    """Each part of ``0-3,7``, both ends included; None for a part that is neither a number nor a range."""
    matches = [_RANGE.fullmatch(part) for part in listed.split(",")]
    return [match and range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches]


def ranks_in(listed: str) -> list[int]:
    """The ranks of ``0-2,5`` as another program wrote them, in its order; what cannot be a rank is left out."""
    parts = [part for part in parse_ranges(listed) if part is not None and part.stop <= MAX_RANK + 1]
    return list(islice(chain.from_iterable(parts), MAX_RANK + 1))


def write_ranges(numbers: Iterable[int], separator: str = ",") -> str:
    """``0-3,7`` for the numbers 0, 1, 2, 3 and 7, in any order."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return separator.join("-".join(map(str, run)) for run in runs)


def is_job_number(job_id: str, raw_id: str) -> bool:
    """Whether this can be a job as Slurm shows it (``12``, ``12_7``, ``12_[8-99%4]``), with its own number.

    Only a task of an array, or a part of a job of several, has an own number that is another one.
    """
    if not _JOB_NUMBER.fullmatch(job_id) or not re.fullmatch(r"[0-9]{1,12}", raw_id):
        return False
    return (raw_id == job_id or "_" in job_id or "+" in job_id) and count_tasks(job_id) <= _MOST_TASKS


def count_tasks(job_id: str) -> int:
    """Tasks that ``12_[0-2,5-9:2%4]`` stands for; 1 without brackets."""
    return max(1, sum(map(len, _ranges_of(job_id))))


def tasks_in(job_id: str) -> list[str]:
    """``12_0``, ``12_1`` ... that ``12_[0-9%4]`` stands for; without brackets the number itself."""
    array = job_id.partition("_")[0]
    ranges = _ranges_of(job_id)
    return [f"{array}_{task}" for part in ranges for task in part] if ranges else [job_id]


def is_task_of(task: str, job_id: str) -> bool:
    """Whether ``12_[0-9%4]`` stands for ``12_3``; without brackets whether they are the same. Writes no task out."""
    array, _, number = task.partition("_")
    if task == job_id or array != job_id.partition("_")[0] or not number.isdecimal() or len(number) > _MOST_DIGITS:
        return task == job_id
    return any(int(number) in part for part in _ranges_of(job_id))


def without_tasks(job_id: str, others: Iterable[str]) -> str | None:
    """``12_[0-9%4]`` without what ``others`` of its array, such as ``12_3`` and ``12_[5-6]``, stand for.

    None if nothing is left. What it costs depends on the parts that are taken out, not on how many tasks there are.
    """
    array = job_id.partition("_")[0]
    mine = [other for other in others if other.partition("_")[0] == array]
    taken = [part for other in mine for part in _ranges_of(other) or _single(other)]
    # A range with steps takes its numbers out one by one.
    solid = [each for part in taken for each in ([part] if part.step == 1 else (range(n, n + 1) for n in part))]
    solid.sort(key=lambda part: part.start)
    parts = _ranges_of(job_id)
    left = [piece for part in parts for piece in _cut(part, solid)]
    if sum(map(len, left)) == sum(map(len, parts)):
        return job_id
    if not left:
        return None
    if len(left) == len(left[0]) == 1:
        return f"{array}_{left[0][0]}"
    return f"{array}_[{','.join(map(_written, left))}{job_id[job_id.find('%') : -1] if '%' in job_id else ''}]"


def _single(task: str) -> list[range]:
    number = task.partition("_")[2]
    return [range(int(number), int(number) + 1)] if number.isdecimal() and len(number) <= _MOST_DIGITS else []


def _cut(part: range, taken: Sequence[range]) -> list[range]:
    """The pieces of ``part`` that no range of ``taken``, in order and without steps, holds."""
    pieces, place = [], 0
    for each in taken:
        begin, end = (min(len(part), max(0, -((part.start - bound) // part.step))) for bound in (each.start, each.stop))
        if begin < end:
            pieces += [part[place:begin]] if begin > place else []
            place = max(place, end)
    return [*pieces, part[place:]] if place < len(part) else pieces


def _written(part: range) -> str:
    if len(part) == 1:
        return str(part[0])
    return f"{part[0]}-{part[-1]}" + (f":{part.step}" if part.step > 1 else "")


def _ranges_of(job_id: str) -> list[range]:
    match = re.search(r"_\[([^\]%]*)", job_id)
    parts = match[1].split(",") if match is not None else []
    bounds = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", part.strip()) for part in parts]
    return [
        range(int(each[1]), int(each[2] or each[1]) + 1, max(1, int(each[3] or 1)))
        for each in bounds
        if each is not None
    ]


def profiled_ranks(
    choice: str, world_size: int, ranks_per_node: int, asked_by: str = "profile.ranks"
) -> frozenset[int]:
    """The ranks named by ``choice``: ``all``, ``one_per_node`` (the first of each), or a list such as ``0,3-5``.

    Raises HpcmmError for anything else, and for ranks that the run does not have. ``asked_by``: the key or option.
    """
    if choice == "all":
        return frozenset(range(world_size))
    if choice == "one_per_node":
        return frozenset(range(0, world_size, ranks_per_node))
    ranks: set[int] = set()
    read = 0
    for part in parse_ranges(choice):
        if part is None:
            raise HpcmmError(f"{asked_by} is {choice!r}: write all, one_per_node, or ranks such as '0,3-5'.")
        # One number beyond the run is enough to refuse it: a huge range must not become a huge set.
        named = range(min(part.start, world_size), min(part.stop, world_size + 1))
        ranks.update(named)
        read += len(named)
        if read > 4 * MAX_RANK:  # the same ones again and again
            raise HpcmmError(f"{asked_by} names more ranks than a run can have: name each once.")
    if not ranks or max(ranks) >= world_size:
        raise HpcmmError(f"{asked_by} is {choice!r}, but the ranks of this run are 0 to {world_size - 1}.")
    return frozenset(ranks)


def step_window(choice: str | None, steps: int | None) -> range | None:
    """The steps named by ``choice``, such as ``100:110``, whose end is not among them; None for all.

    Raises HpcmmError for anything else, and for a window that holds none of the run's ``steps``; None: not known.
    """
    if choice is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,12})\s*:\s*([0-9]{1,12})\s*", choice)
    if match is None:
        raise HpcmmError(
            f"profile.steps is {choice!r}: write the first step and the one after the last, as in 100:110."
        )
    window = range(int(match[1]), int(match[2]))
    if not window:
        raise HpcmmError(f"profile.steps is {choice!r}, which holds no step: its second number is that after the last.")
    if steps is not None and window.start >= steps:
        raise HpcmmError(f"profile.steps is {choice!r}, which holds none of this run's steps 0 to {steps - 1}.")
    return window
