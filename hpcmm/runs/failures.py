"""The small JSON files by which a rank, and the process in front of it, tell how the rank ended.

They lie in ``RUN/failures/JOB.RESTART/``: ``rank_0003.error.json`` is the rank's own word of its exception,
``rank_0003.exit.json`` the word of the process in front of it, which also sees signals that a rank cannot survive, and
``rank_0003.stacks`` the threads' stacks when the rank was told to end. A rank that ends well leaves none of them.
Programs that leave no record tell in their logs.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from hpcmm.files import MOST_BYTES, names_in, read_json_object, read_tail, write_json, write_whole
from hpcmm.runs.run_dir import RunDir

MOST_LINES = 60
"""Lines of a traceback that are kept, its last ones."""

MOST_CHARACTERS = 4000
"""Characters of a message that are kept."""

_ORDERED_TO_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals by which somebody else ends a rank."""

_STATUS_BYTES = 16
_ATTEMPT = re.compile(r"([0-9]{1,12})\.([0-9]{1,9})")
_RANK_FILE = re.compile(r"rank_([0-9]{1,6})\.(error\.json|exit\.json|stacks)")


@dataclass(frozen=True)
class RankError:
    """An exception that ended a rank, written by the rank itself."""

    rank: int
    node: str
    unix_ns: int
    """The node's clock when the exception arrived at the rank's outermost frame."""
    kind: str
    """The exception's class, with its module unless that is ``builtins``."""
    message: str
    traceback: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    """Nodes of the job that this node could not reach when a peer was lost or a collective timed out."""
    step: int | None = None
    """The step of ``hpcmm.annotate`` that it was in, or had been in last."""
    exchange: str = ""
    """What between ranks failed, such as ``all_reduce of the tensor group of ranks 2-3``, if a peer was lost or a
    collective timed out."""


def cut_off_nodes(errors: Iterable[RankError], nodes: Collection[str], states: Mapping[str, str]) -> list[str]:
    """The nodes of a job that the others could not reach, by the word of ranks on nodes that reached somebody.

    ``nodes`` are those whose ranks are known, ``states`` Slurm's of each node.
    """
    reports = {error.node: set(error.unreachable) for error in errors if error.unreachable}
    known = {*nodes, *(node for missing in reports.values() for node in missing)}
    trusted = {node: missing for node, missing in reports.items() if len(missing) < len(known) - 1}
    votes = Counter(missing for given in (trusted or reports).values() for missing in given)
    if not votes:
        return []
    most = max(votes.values())
    found = sorted(node for node, count in votes.items() if count == most)
    answering = [node for node in found if not states.get(node, "*").partition(" ")[0].endswith("*")]
    return sorted(set(found) - set(answering)) or found


@dataclass(frozen=True)
class RankExit:
    """How a rank's process ended, other than with status 0, written by its parent."""

    rank: int
    node: str
    unix_ns: int
    status: int | None
    """Exit status; None if a signal ended it."""
    signal: int | None
    said: str = ""
    """The last words of a script that ended itself, as by ``sys.exit("no data")``."""


def attempt_folder(run: RunDir, environ: Mapping[str, str] = os.environ) -> Path:
    """Where this run of the job leaves its records: a requeued job has a folder for each time it ran."""
    return run.failures / _attempt_name(environ)


def _attempt_name(environ: Mapping[str, str]) -> str:
    job = environ.get("SLURM_JOB_ID") or environ.get("SUBMITIT_LOCAL_JOB_ID") or "0"
    return f"{job}.{environ.get('SLURM_RESTART_COUNT') or 0}"


def error_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank_{rank:04d}.error.json"


def exit_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank_{rank:04d}.exit.json"


def stacks_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank_{rank:04d}.stacks"


def status_file(attempt: Path) -> Path:
    """The exit status that the job is to have, as the batch script reads it: that of the rank that failed first."""
    return attempt / "status"


def failed_file(attempt: Path) -> Path:
    """An empty file: some rank has left a record. One look at it costs the same however many ranks there are."""
    return attempt / "failed"


def write(record: RankError | RankExit, path: Path) -> None:
    """Write so that ``path`` never exists half-written. Raises OSError if there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failed_file(path.parent).touch()
    write_json(path, asdict(record), indent=1)


def note_status(record: RankExit, attempt: Path) -> None:
    """Note the rank's status as the job's, unless a rank that failed before has one. Raises OSError.

    Ranks that were told to end do not count. 1, with which Python ends for any exception, stands only if no rank has
    another: an exception is often that of a lost peer, and its rank may be faster to say so.
    """
    if record.signal in _ORDERED_TO_END:
        return
    path = status_file(attempt)
    if read_tail(path, _STATUS_BYTES, within=_root_of(attempt)).strip() in {"", "1"}:
        write_whole(path, f"{128 + record.signal if record.signal is not None else record.status}\n")


def note_good_end(run: RunDir, rank: int, environ: Mapping[str, str] = os.environ) -> None:
    """Leave a mark, ``3_of_4``, that the rank ended well, if the job's script has made the folder for it.

    Raises OSError.
    """
    folder = run.ended / _attempt_name(environ)
    mark = folder / f"{rank}_of_{environ.get('SLURM_NTASKS') or 1}"
    if not folder.is_dir() or mark.exists():
        return
    try:
        os.link(folder / "mark", mark)  # which a full disk has room for
    except OSError:  # a file system without links
        mark.touch()


Record = TypeVar("Record", RankError, RankExit)


def read(path: Path, kind: type[Record], most_bytes: int = MOST_BYTES) -> Record | None:
    """The record in a file that others could write to; None if there is none, or it is not one."""
    return _typed(read_json_object(path, most_bytes, within=_root_of(path.parent)), kind)


def newest_attempt(run: RunDir, raw_id: str) -> tuple[Path, int] | None:
    """The newest folder of records that job ``raw_id`` left, and which time the job ran then, counted from 0."""
    found = [(restart, folder) for job, restart, folder in _attempts(run) if job == raw_id]
    if not found:
        return None
    restart, folder = max(found)
    return folder, restart


def ranks_with_records(attempt: Path) -> set[int]:
    """The ranks that left a record or stacks in an attempt's folder."""
    return {
        int(match[1]) for name in names_in(attempt, within=_root_of(attempt)) if (match := _RANK_FILE.fullmatch(name))
    }


def last_record_ns(run: RunDir, raw_id: str, since_restart: int = 0) -> int | None:
    """When a rank of job ``raw_id`` last left a record of a bad end, by its file system; None if none did.

    Since the job was started for the ``since_restart``-th time, counted from 0.
    """
    times = [
        (folder / name).lstat().st_mtime_ns
        for job, restart, folder in _attempts(run)
        if job == raw_id and restart >= since_restart
        for name in names_in(folder, within=run.root)
        if (match := _RANK_FILE.fullmatch(name)) and match[2] != "stacks"
    ]
    return max(times, default=None)


def jobs_with_records(run: RunDir) -> tuple[str, ...]:
    """Slurm's own numbers of the jobs whose ranks left records, the newest last."""
    return tuple(str(job) for job in sorted({int(job) for job, _, _ in _attempts(run)}))


def _attempts(run: RunDir) -> list[tuple[str, int, Path]]:
    found = [(_ATTEMPT.fullmatch(name), run.failures / name) for name in names_in(run.failures, within=run.root)]
    return [(match[1], int(match[2]), folder) for match, folder in found if match]


def _root_of(attempt: Path) -> Path:
    """The run directory of an attempt's folder."""
    return attempt.parent.parent


def _short(value: Any) -> Any:
    """As much of it as a rank would have written, so that nobody who looks at it has to fear its size."""
    if isinstance(value, list):
        return [_short(each) for each in value[-2 * MOST_LINES :]]  # what it was raised from, and the end
    return value[:MOST_CHARACTERS] if isinstance(value, str) else value


def _typed(given: dict[str, Any], kind: type[Record]) -> Record | None:
    names = {each.name for each in fields(kind)}
    values = {name: _short(value) for name, value in given.items() if name in names}
    integers = {"rank": False, "unix_ns": False, "status": True, "signal": True, "step": True}
    for name, value in values.items():
        if name in integers:
            right = (integers[name] and value is None) or (isinstance(value, int) and not isinstance(value, bool))
        elif name in {"traceback", "unreachable"}:
            right = isinstance(value, list) and all(isinstance(line, str) for line in value)
        else:
            right = isinstance(value, str)
        if not right:
            return None
    try:
        return kind(**values)
    except TypeError:  # a field is missing
        return None


@dataclass(frozen=True)
class LoggedError:
    """An exception as Python, or a C++ program that it ended, printed it. ``kind`` is its class with its module."""

    kind: str
    message: str
    lines: list[str]
    lines_after: int = 0
    """Lines with text that stand behind it in the log, but for those that are written while a program ends."""
    worker: int | None = None
    """The rank of the process that said it, if that is a worker of the log's own."""


LINES_THAT_TELL = 3
"""Of a log, from its end: what stands before need not be why the program ended."""
_LOG_PREFIX = re.compile(r"^\[rank\d+\]:? ?")
_LAST_LINE = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_TRACEBACK = "Traceback (most recent call last):"
_BESIDE = re.compile(r"Exception in thread |Exception ignored in|Error in (?:atexit|sys\.excepthook)")
"""In front of a traceback that does not end its process."""
_WHILE_IT_ENDS = re.compile(
    rf"{_BESIDE.pattern}|During handling of the above|The above exception was|\[[WI]\d{{4}} |submitit "
    r"|sys:1: \w*Warning|\S+\.py:\d+: \w*Warning: |wandb: (?!ERROR)|srun: |slurmstepd[\w.-]*: (?:error: )?\*\*\* "
    r"|hpcmm: .* cannot be (?:written|removed)|(?:\S+: line \d+: +\d+ )?Terminated\b"
)
"""What Python, PyTorch's and NCCL's threads, submitit, Slurm and hpcmm say after an exception that ends its process."""
_THROWN = re.compile(r"terminate called after throwing an instance of '(?P<kind>[^']+)'")
_WHAT = re.compile(r"\s*what\(\):\s*(?P<message>.*)")
_MOST_THROWN = 8
_MOST_TRACEBACKS = 100
"""Looked at, from a log's end."""


def exception_line(kind: str, message: str) -> str:
    """As Python prints it; of hpcmm's own errors the sentence alone."""
    if kind == "hpcmm.errors.HpcmmError":
        return message
    return f"{kind}: {message}" if message else kind


def last_logged_error(text: str) -> LoggedError | None:
    """The last traceback, or the last sentence of hpcmm's own, in a rank's log.

    A traceback that ends its process is the last thing that the process says, apart from what threads, clean-up and
    destructors add: so the last one that is not theirs counts, if nothing else follows it.
    """
    whole = [line[:MOST_CHARACTERS] for line in text.splitlines()]
    rank, said_by_worker = _before_torchrun(whole)
    if said_by_worker and (error := _last_error(said_by_worker)) is not None:
        return replace(error, worker=rank)
    return _last_error(whole)


WORKER_FAILED = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
"""What torchrun raises for one of its workers."""
_ROOT_CAUSE = re.compile(r"\s*rank\s*: (?P<rank>\d{1,7}) \(local_rank: \d+\)")
_OF_TORCHRUN = re.compile(r"[WEI]\d{4} \S+ \d+ torch/distributed/elastic/")


def _before_torchrun(lines: Sequence[str]) -> tuple[int | None, list[str]]:
    """Rank and words of the worker that failed first, where torchrun says at a log's end that one has."""
    ends = [at for at, line in enumerate(lines) if line.startswith(WORKER_FAILED)]
    if not ends:
        return None, []
    # The last one of its table is the first that failed.
    ranks = [int(found["rank"]) for line in lines[ends[-1] :] if (found := _ROOT_CAUSE.fullmatch(line))]
    rank = ranks[-1] if ranks else None
    begin = max((at for at in range(ends[-1]) if lines[at] == _TRACEBACK), default=0)
    before = [line for line in lines[:begin] if not _OF_TORCHRUN.match(line)]
    return rank, [line for line in before if line.startswith(f"[rank{rank}]:")] or before


def _last_error(logged: Sequence[str]) -> LoggedError | None:
    lines = [_LOG_PREFIX.sub("", line) for line in logged]
    last: LoggedError | None = None
    for start, error in islice(_tracebacks(lines), _MOST_TRACEBACKS):
        last = last or error
        if error.lines_after > LINES_THAT_TELL:  # so many or more follow those before it, too
            break
        if not _beside(lines, start):
            return error
    if last is not None:
        return last
    said = [index for index, line in enumerate(lines) if line.startswith("hpcmm: ")]
    if not said:
        return None
    sentence = lines[said[-1]]
    after = _with_text(lines[said[-1] + 1 :])
    return LoggedError("hpcmm.errors.HpcmmError", sentence.removeprefix("hpcmm: "), [sentence], after)


def thrown_error(lines: Sequence[str]) -> LoggedError | None:
    """The C++ exception that ended a program, as its runtime prints it before it aborts."""
    for start in range(len(lines) - 1, -1, -1):
        if match := _THROWN.search(lines[start]):
            shown = [line[:MOST_CHARACTERS] for line in lines[start : start + _MOST_THROWN]]
            said = next((found["message"] for line in shown if (found := _WHAT.match(line))), "")
            return LoggedError(match["kind"][:MOST_CHARACTERS], said, shown)
    return None


def _tracebacks(lines: Sequence[str]) -> Iterator[tuple[int, LoggedError]]:
    """Where each begins, and what it tells; the last one first."""
    end: int | None = None
    """The first line after ``start`` that is not indented."""
    for start in range(len(lines) - 1, -1, -1):
        match = _LAST_LINE.match(lines[end]) if _TRACEBACK in lines[start] and end is not None else None
        if match is not None and end is not None:
            # A progress bar may stand before the first.
            shown = [_TRACEBACK, *lines[max(start + 1, end + 1 - MOST_LINES) : end + 1]]
            after = _with_text(lines[end + 1 :])
            yield start, LoggedError(match["kind"], match["message"] or "", shown, after)
        end = start if lines[start][:1].strip() else end


def _end_of_traceback(lines: Sequence[str], start: int) -> int | None:
    """The first line that is not indented."""
    return next((index for index in range(start + 1, len(lines)) if lines[index][:1].strip()), None)


def _beside(lines: Sequence[str], start: int) -> bool:
    return start > 0 and _BESIDE.match(lines[start - 1]) is not None


def _with_text(lines: Sequence[str]) -> int:
    """Lines that are not written while a program ends."""
    count, index, goes_on = 0, 0, False
    while index < len(lines):
        line = lines[index]
        if _TRACEBACK in line:
            index, goes_on = _end_of_traceback(lines, index) or len(lines), False
        elif line.strip() and not (goes_on and line[0].isspace()):  # an indented line belongs to the one before
            goes_on = not says_why(line)
            count += not goes_on
        index += 1
    return count


def says_why(line: str) -> bool:
    """Whether a log's line may tell why its program ended, rather than be written while it did."""
    return bool(line.strip()) and not _WHILE_IT_ENDS.match(_LOG_PREFIX.sub("", line))
