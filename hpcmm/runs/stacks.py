"""Where ranks stand: their stacks, and how they are asked for while a job runs.

``RUN/stacks/JOB.RESTART/request`` asks; each rank's process in front answers with ``rank_0003.json`` there. Only the
run's owner can write either. ``RUN/failures/JOB.RESTART/hang.json`` says that the watchdog saw no rank advance.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from hpcmm.files import names_in, read_json_object, write_json
from hpcmm.ranges import MAX_RANK
from hpcmm.runs.failures import attempt_folder
from hpcmm.runs.run_dir import RunDir

ASK_FOR_STACK = signal.SIGRTMIN + 11
"""A real-time signal that glibc, Slurm, submitit, Python and nsys leave alone; a rank that does not listen to it is
never sent it. It is sent only to the thread that answers, if that cannot."""

MOST_STACK = 64 * 1024
"""Characters of a stack that are kept: Python writes at most 100 frames."""
_MOST_BYTES = 4 * 1024**2
"""Of an answer that is read."""
MOST_WORKERS, MOST_STACK_OF_WORKER = 64, 16 * 1024
"""Of the processes that a launched one has started, so many are asked."""
_MOST_OF_OTHERS = 32 * 1024**2
_MOST_GROUPS, _MOST_MEMBERS = 64, 1024
_MOST_FRAMES, _MOST_NAME = 100, 300
_ATTEMPT = re.compile(r"([0-9]{1,12})\.([0-9]{1,9})")
_ANSWER = re.compile(r"rank_([0-9]{1,6})\.json")

# What a stack says.

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d{1,9}) in (?P<function>.+)')
_THREAD = re.compile(r"(?:Current t|T)hread 0x[0-9a-f]{1,16}\b.*\(most recent call first\):|Stack \(most recent call f")
_WAITING = re.compile(
    r"/torch/distributed/(?:distributed_c10d|c10d_logger|rendezvous|_functional_collectives)\.py|deepspeed/comm/"
    r"|hpcmm/annotate/collectives"
)
_DISTRIBUTED = re.compile(r"/torch/distributed/(?!checkpoint/|elastic/)")
_OPERATION = re.compile(
    r"(?!\w+_fn$)(?:(?:monitored_)?barrier|i?(?:all_)?reduce(?:_\w+)?|all_?gather(?:_\w+)?|reduce_scatter(?:_\w+)?"
    r"|all_to_all(?:_\w+)?|broadcast(?:_\w+)?|i?(?:send|recv)(?:_object_list)?|batch_isend_irecv"
    r"|(?:gather|scatter)(?:_\w+)?|new_group|split_group|init_process_group|wait_tensor|wait)"
)
_MEETING = re.compile(
    r"/torch/distributed/rendezvous\.py\"|/torch/distributed/distributed_c10d\.py\", line \d+ in init_process_group"
    r"|/hpcmm/worker/distributed\.py\", line \d+ in _rendezvous"
)
"""Where a rank waits to meet the others at MASTER_ADDR."""
_ASKS = re.compile(r"_?(?:get|is|set)_\w+|<module>")
"""Functions of torch.distributed that wait for nobody, and its import."""
_BACKWARD = re.compile(r"/torch/autograd/graph\.py\", line \d+ in _engine_run_backward")
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib/python\d|<frozen |/hpcmm/(?:annotate|worker|node)/")
_INNERMOST = 12
"""Frames from the top in which a wait for other ranks must show."""


@dataclass(frozen=True)
class Place:
    """The main thread's place."""

    frames: list[str]
    """Innermost first, such as ``File "train.py", line 3 in load``."""
    in_collective: bool
    in_rendezvous: bool = False

    @property
    def own(self) -> str | None:
        """The innermost frame of the user's own code."""
        return next((frame for frame in self.frames if not _LIBRARY.search(frame)), None)

    @property
    def said(self) -> str:
        """The innermost frame, and the innermost of the user's own code if that is another."""
        if not self.frames:
            return "an unknown place"
        return self.frames[0] + (f" (called from {self.own})" if self.own and self.own != self.frames[0] else "")

    @property
    def operation(self) -> str | None:
        """The collective that it waits in, by the name that the user's code called."""
        if not self.in_collective:
            return None
        called = [_parts(frame)[2] for frame in self.frames if _WAITING.search(frame) or _DISTRIBUTED.search(frame)]
        known = [name for name in called if _OPERATION.fullmatch(name)]
        return (known or called or ["a collective"])[-1]

    @property
    def may_wait(self) -> bool:
        """It is in a call that may wait for other ranks without a sign of it: backward, in which gradients meet."""
        return bool(self.frames) and _BACKWARD.search(self.frames[0]) is not None

    @property
    def short(self) -> str:
        """``train.py:3 in evaluate``, and the library's function that it called from there."""
        own = self.own or (self.frames[-1] if self.frames else "")
        file, line, function = _parts(own)
        inner = self.frames[: self.frames.index(own)] if own in self.frames else []
        called = [name for name in (_parts(frame)[2] for frame in reversed(inner)) if name not in _WRAPPERS]
        words = f"{PurePath(file).name}:{line} in {function}"
        if not called:
            return words
        return f"{words}, in {called[0]}" + (f" ({called[-1]})" if called[-1] != called[0] else "")


_WRAPPERS = frozenset({"wrapper", "_wrapped_call_impl", "_call_impl", "decorate_context", "inner", "kernel", "record"})
"""Functions that stand between a call and what it means."""


def _parts(frame: str) -> tuple[str, int, str]:
    """File, line and function of a frame."""
    match = _FRAME.match(f"  {frame}")
    return (match["file"], int(match["line"]), match["function"]) if match else (frame, 0, "")


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
    near = frames[:_INNERMOST]
    waits = [frame for frame in near if _WAITING.search(frame) or (frame == near[0] and _DISTRIBUTED.search(frame))]
    in_collective = bool(waits) and not _ASKS.fullmatch(_parts(waits[-1])[2])
    return Place(frames, in_collective, in_rendezvous=any(_MEETING.search(frame) for frame in near))


# Asking, and answers.


@dataclass(frozen=True)
class Request:
    """What a request file holds. An empty ``key``: nobody has asked."""

    key: str
    looks: int = 1
    """How often each rank is to be looked at, two seconds apart."""
    ends: bool = False
    """The ranks are to be ended: the watchdog has seen enough."""


@dataclass(frozen=True)
class Wait:
    """An exchange between ranks that one of them waits in."""

    op: str
    group: str
    """As ``torch.distributed`` names it; empty if that is not known."""
    number: int | None = None
    peer: int | None = None
    """Of a send or receive the other rank of the job."""


@dataclass(frozen=True)
class Mark:
    """What a process group is for, as its program or a library calls it, and its ranks; empty if that is not told."""

    name: str
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """One rank at one moment."""

    unix_ns: int
    stack: str = ""
    step: int | None = None
    """Of ``hpcmm.annotate``."""
    groups: dict[str, int] = field(default_factory=dict)
    """The number of the latest collective in each process group, by the group's name."""
    own_s: float = 0.0
    """Processor time of the rank."""
    children_s: float = 0.0
    """Processor time of all processes that the rank has started."""
    io_bytes: int = 0
    """Read and written by the rank and those processes."""
    wakes: int = 0
    """How often its main thread has gone to sleep so far."""
    spins: bool = False
    """It uses a GPU, for which a wait may keep a processor busy."""
    waits: list[Wait] = field(default_factory=list)
    """What it waits in, as far as it tells: one exchange, or the oldest one of each group that is not over."""
    marks: dict[str, Mark] = field(default_factory=dict)
    """Of groups that have a name, or that it waits in, by the name that ``torch.distributed`` gives them."""
    mixed: list[str] = field(default_factory=list)
    """Groups in whose numbers sends and receives count, which not all members take part in."""


@dataclass(frozen=True)
class Worker:
    """One of the processes that a launched process has started, or that these have."""

    pid: int
    parent: int = 0
    """The nearest one above it that is a worker, too; 0: the launched process."""
    name: str = ""
    """As multiprocessing, else the kernel, calls it."""
    looks: list[Look] = field(default_factory=list)
    why: str = ""
    """As of an answer; of a program that is asked nothing, what it does."""
    rank: int | None = None
    world: int | None = None
    """How many ranks there are, by this process."""
    joined: bool = False
    """It tells of its rank as one of a process group, not by the environment, which its own children inherit."""


AT_END = "at the end"
"""The key of an answer that nobody has asked for: the process in front of a rank gives it when that has ended badly."""


@dataclass(frozen=True)
class Answer:
    """What the process in front of a rank says of it."""

    rank: int
    node: str
    key: str
    looks: list[Look]
    why: str = ""
    """Why there is no stack, or what keeps it: it is stopped, in an uninterruptible state, or does not listen."""
    workers: list[Worker] = field(default_factory=list)
    """A worker comes before what it has started."""
    world: int | None = None
    joined: bool = False


@dataclass(frozen=True)
class HangNote:
    """What the watchdog notes before it ends a job."""

    unix_ns: int
    still_s: float
    """How long no rank had moved."""


def stacks_folder(run: RunDir, environ: Mapping[str, str] = os.environ) -> Path:
    return run.stacks / attempt_folder(run, environ).name


def newest_folder(run: RunDir, raw_id: str) -> Path | None:
    """Where the ranks of the newest start of job ``raw_id`` answer; None if none has made it."""
    found = [(_ATTEMPT.fullmatch(name), run.stacks / name) for name in names_in(run.stacks, within=run.root)]
    mine = [(int(match[2]), folder) for match, folder in found if match and match[1] == raw_id]
    return max(mine)[1] if mine else None


def request_file(folder: Path) -> Path:
    return folder / "request"


def answer_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:04d}.json"


def hang_file(attempt: Path) -> Path:
    return attempt / "hang.json"


def post(folder: Path, *, looks: int = 1, ends: bool = False) -> str:
    """Ask all ranks; returns the request's key. Raises OSError."""
    request = Request(secrets.token_hex(8), looks, ends)
    write_json(request_file(folder), asdict(request))
    return request.key


def read_request(run: RunDir, folder: Path) -> Request:
    found = read_json_object(request_file(folder), within=run.root)
    key, looks, ends = found.get("key"), found.get("looks"), found.get("ends")
    if not isinstance(key, str) or not isinstance(looks, int) or not isinstance(ends, bool):
        return Request("")
    return Request(key[:_MOST_NAME], max(1, min(looks, 2)), ends)


def write_answer(folder: Path, answer: Answer) -> None:
    """Raises OSError."""
    write_json(answer_file(folder, answer.rank), asdict(answer), indent=None)


def read_answers(run: RunDir, folder: Path, *, is_mine: bool = True) -> dict[int, Answer]:
    """All that lie there, whichever request they answer; of another user's run so much as one's own ranks would say."""
    numbers = sorted(int(match[1]) for name in names_in(folder, within=run.root) if (match := _ANSWER.fullmatch(name)))
    numbers = [number for number in numbers if number <= MAX_RANK]
    most_bytes = _MOST_BYTES if is_mine else min(_MOST_BYTES, _MOST_OF_OTHERS // max(1, len(numbers)))
    found = {}
    for rank in numbers:
        values = read_json_object(answer_file(folder, rank), most_bytes, within=run.root)
        if (answer := _as_answer(rank, values)) is not None:
            found[rank] = answer
    return found


def ask(
    run: RunDir, folder: Path, ranks: int, patience_s: float, sleep: Callable[[float], None] = time.sleep
) -> dict[int, Answer]:
    """Ask all ranks for two looks, and wait until all have answered or ``patience_s`` is over. Raises OSError.

    Somebody else may ask meanwhile; what is answered to them is as good.
    """
    asked = {post(folder, looks=2)}
    until_s = time.monotonic() + patience_s
    found: dict[int, Answer] = {}
    while len(found) < ranks and time.monotonic() < until_s:
        sleep(0.2)
        asked.add(read_request(run, folder).key)
        found = {rank: answer for rank, answer in read_answers(run, folder).items() if answer.key in asked}
    return found


def ranks_of(answers: Mapping[int, Answer]) -> dict[int, Answer]:
    """An answer of each rank: of workers, if a launched process has started them and they are the ranks."""
    of_each = [_ranks_among(answer) or {number: answer} for number, answer in answers.items()]
    found = {rank: answer for ranks in of_each for rank, answer in ranks.items()}
    is_one_group = len(found) == sum(map(len, of_each))  # else each launched process counts its own from 0
    return found if is_one_group else dict(answers)


def _ranks_among(answer: Answer) -> dict[int, Answer]:
    """The ranks that are workers. A rank's own children, such as those of its loader, may tell the same rank."""
    joins = any(worker.joined for worker in answer.workers)
    differ = any(worker.rank not in {None, answer.rank} for worker in answer.workers)
    if answer.joined or not (joins or differ):
        return {}
    found: dict[int, Answer] = {}
    for worker in answer.workers:
        inherited = joins and not worker.joined and worker.rank == answer.rank
        if worker.rank is not None and worker.rank not in found and not inherited:
            helpers = _below(worker.pid, answer.workers)
            found[worker.rank] = Answer(
                worker.rank, answer.node, answer.key, worker.looks, worker.why, helpers, worker.world, worker.joined
            )
    return found


def _below(pid: int, workers: Iterable[Worker]) -> list[Worker]:
    found = {pid: Worker(pid)}
    for worker in workers:
        if worker.parent in found:
            found[worker.pid] = worker
    return list(found.values())[1:]


def note_hang(attempt: Path, still_s: float) -> None:
    """Raises OSError."""
    attempt.mkdir(parents=True, exist_ok=True)
    write_json(hang_file(attempt), asdict(HangNote(time.time_ns(), still_s)))


def read_hang(run: RunDir, attempt: Path) -> HangNote | None:
    found = read_json_object(hang_file(attempt), within=run.root)
    unix_ns, still_s = found.get("unix_ns"), found.get("still_s")
    return HangNote(_count(unix_ns), still_s) if _is_count(unix_ns) and isinstance(still_s, float) else None


def _as_answer(rank: int, given: Mapping[str, Any]) -> Answer | None:
    node, key, workers, known = given.get("node"), given.get("key"), given.get("workers"), _of_both(given)
    if not (isinstance(node, str) and isinstance(key, str) and known is not None):
        return None
    workers = workers[:MOST_WORKERS] if isinstance(workers, list) else []
    found = [worker for each in workers if isinstance(each, dict) and (worker := _as_worker(each))]
    return Answer(rank, node[:_MOST_NAME], key, workers=found, **known)


def _as_worker(given: Mapping[str, Any]) -> Worker | None:
    name, known = given.get("name"), _of_both(given)
    if not isinstance(name, str) or known is None:
        return None
    pid, parent, rank = _count(given.get("pid")), _count(given.get("parent")), _rank_in(given.get("rank"))
    return Worker(pid, parent, name[:_MOST_NAME], rank=rank, **known)


def _of_both(given: Mapping[str, Any]) -> dict[str, Any] | None:
    why, looks, world = given.get("why"), given.get("looks"), given.get("world")
    if not (isinstance(why, str) and isinstance(looks, list)):
        return None
    read = [_as_look(each) for each in looks[-2:] if isinstance(each, dict)]
    joined = given.get("joined") is True
    return {"looks": read, "why": why[:_MOST_NAME], "world": _rank_in(world, 1), "joined": joined}


def _rank_in(value: Any, more: int = 0) -> int | None:
    return int(value) if _is_count(value) and value <= MAX_RANK + more else None


def _as_look(given: Mapping[str, Any]) -> Look:
    """What has another type than expected counts as not said."""
    step, stack, groups = given.get("step"), given.get("stack"), given.get("groups")
    groups = groups.items() if isinstance(groups, dict) else ()
    numbers = {str(name)[:_MOST_NAME]: number for name, number in groups if _is_count(number)}
    numbers = dict(list(numbers.items())[:_MOST_GROUPS])
    own_s, children_s = (each if isinstance(each, float) else 0.0 for each in map(given.get, ("own_s", "children_s")))
    unix_ns, io_bytes, wakes = map(_count, map(given.get, ("unix_ns", "io_bytes", "wakes")))
    stack = stack[:MOST_STACK] if isinstance(stack, str) else ""
    step, spins = step if _is_count(step) else None, given.get("spins") is True
    return Look(unix_ns, stack, step, numbers, own_s, children_s, io_bytes, wakes, spins, **exchanges_in(given))


def exchanges_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """``waits``, ``marks`` and ``mixed`` of a look, as a rank or an answer tells them; without what is damaged."""
    waits, marks, found, known = given.get("waits"), given.get("marks"), [], {}
    for each in (waits if isinstance(waits, list) else [])[:_MOST_GROUPS]:
        op, group, number, peer = _fields(each, 4)
        if isinstance(op, str) and isinstance(group, str):
            counted = number if _is_count(number) else None
            found.append(Wait(op[:_MOST_NAME], group[:_MOST_NAME], counted, _rank_in(peer)))
    for group, each in list((marks if isinstance(marks, dict) else {}).items())[:_MOST_GROUPS]:
        name, ranks = _fields(each, 2)
        if isinstance(name, str):
            ranks = [rank for rank in _fields(ranks) if _rank_in(rank) is not None]
            known[str(group)[:_MOST_NAME]] = Mark(name[:_MOST_NAME], ranks[:_MOST_MEMBERS])
    names = [each[:_MOST_NAME] for each in _fields(given.get("mixed"))[:_MOST_GROUPS] if isinstance(each, str)]
    return {"waits": found, "marks": known, "mixed": names}


def _fields(given: Any, count: int | None = None) -> list[Any]:
    """The values of a list or a record; ``count`` times None if there are not so many."""
    values = (
        list(given.values()) if isinstance(given, dict) else list(given) if isinstance(given, (list, tuple)) else []
    )
    return values if count in {None, len(values)} else [None] * (count or 0)


def _count(value: Any) -> int:
    return int(value) if _is_count(value) else 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def frames_in(stack: str) -> list[str]:
    place = main_place(stack)
    return place.frames[:_MOST_FRAMES] if place is not None else []
