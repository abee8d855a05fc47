"""Logs of a run's ranks, with the rank in front of each line, as they are or as they grow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, names_in, open_regular
from hpcmm.ranges import MAX_RANK, ranks_in, write_ranges
from hpcmm.runs.run_dir import RunDir
from hpcmm.text import visible

_READ_S = 0.5
_PAUSE_PER_LOOK = 4
_BLOCK_BYTES = 64 * 1024
_MOST_NEW_BYTES = 16 * 1024**2
"""Read at one look; what is left is for the next."""
_MOST_SOUGHT_BYTES = 512 * 1024**2
"""Looked through for the last lines from the end of logs, and read of them once their job is over; of each its share,
a block at least."""
_MOST_LINE_BYTES = 64 * 1024
_MOST_ROWS_BACK = 256
"""A program may go back over as many lines."""
_RANK_LOG = re.compile(r"rank_([0-9]{1,9})\.log")
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~]|)")
_MOVE = re.compile(rb"(\n|\x1b\[[0-9]{0,4}[AF])")
_CUT_MOVE = re.compile(rb"\x1b(?:\[[0-9]{0,4})?\Z")
_CONTROLS = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x20]")
_CUT_CHARACTER = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


class _Rows:
    """Lines as a terminal would show them: of what is drawn over itself, such as a progress bar, the last state.

    Programs draw over a line after a carriage return, and over lines above after they moved the cursor up. Of a line
    that is longer than 64 KiB the rest is left out, so that memory is bounded.
    """

    def __init__(self) -> None:
        self._rows = [b""]
        self._at = 0
        self._is_over = False
        """What comes next is drawn over the row."""
        self._cut = b""

    def feed(self, data: bytes) -> None:
        data = self._cut + data
        cut = _CUT_MOVE.search(data[-8:])
        self._cut = cut[0] if cut else b""
        text, *others = _MOVE.split(data[: len(data) - len(self._cut)])
        self._draw(text)
        for move, text in zip(others[::2], others[1::2], strict=True):
            if move == b"\n":
                self._down()
            else:
                self._at = max(0, self._at - int(move[2:-1] or 1))
                self._is_over = True
            self._draw(text)

    def _down(self) -> None:
        self._at += 1
        self._is_over = self._at < len(self._rows)
        if not self._is_over:
            self._rows.append(b"")

    def _draw(self, text: bytes) -> None:
        if not text:
            return
        first, *states = text.split(b"\r")
        if not _is_blank(first) or not self._is_over:
            self._rows[self._at] = (b"" if self._is_over else self._rows[self._at]) + first[:_MOST_LINE_BYTES]
            self._is_over = False
        last = next((state for state in reversed(states) if not _is_blank(state)), None)
        if last is not None:
            self._rows[self._at] = last
        self._rows[self._at] = self._rows[self._at][:_MOST_LINE_BYTES]
        self._is_over = self._is_over or (bool(states) and _is_blank(states[-1]))

    def take(self) -> list[bytes]:
        """The rows above the cursor, which are gone from here then."""
        taken, self._rows = self._rows[: self._at], self._rows[self._at :]
        self._at = 0
        return taken

    def forget(self, rows: int) -> None:
        """Keep so many rows above the cursor."""
        dropped = max(0, self._at - rows)
        del self._rows[:dropped]
        self._at -= dropped

    def pending(self) -> list[bytes]:
        """The rows from the cursor on, which may still be drawn over; without empty ones at the end."""
        rows = list(self._rows[self._at :])
        while rows and not rows[-1]:
            rows.pop()
        return rows


def _is_blank(text: bytes) -> bool:
    left = text.strip(b" \t\r\0\x08")
    return not left or (left.startswith(b"\x1b") and not _CONTROLS.sub(b"", left))


@dataclass
class Log:
    """One rank's log, or the batch script's, and how far it was read."""

    label: str
    path: Path
    """In a folder of the run directory."""
    _offset: int = 0
    _rows: _Rows = field(default_factory=_Rows, repr=False)
    _told: list[str] = field(default_factory=list, repr=False)
    """Unfinished lines as they were shown."""

    def tail(self, lines: int, most_bytes: int = _MOST_SOUGHT_BYTES) -> list[str]:
        """Its last lines, also one that no line break ends yet. ``new_lines`` goes on from there."""
        self._offset, self._rows, self._told = 0, _Rows(), []
        wanted = lines
        try:
            with open_regular(self.path, within=self.path.parent.parent) as file:
                end = file.seek(0, 2)
                while True:
                    begin = _start_of_lines(file, end, wanted, most_bytes)
                    rows = self._read_rows(file, begin, end, lines)
                    # Lines that were drawn over each other are fewer than line breaks.
                    if len(rows) >= lines or begin == 0 or end - begin >= most_bytes:
                        break
                    wanted *= 8
        except OSError:
            return []
        self._told = [_shown(row) for row in self._rows.pending()] if lines else []
        return [*map(_shown, rows), *self._told][-lines:] if lines else []

    def _read_rows(self, file: IO[bytes], begin: int, end: int, lines: int) -> list[bytes]:
        """The rows above the cursor, as many as are wanted."""
        self._rows = _Rows()
        file.seek(begin)
        while begin < end and (block := file.read(min(_BLOCK_BYTES, end - begin))):
            self._rows.feed(block)
            self._rows.forget(lines + _MOST_ROWS_BACK)
            begin += len(block)
        self._offset = begin
        return self._rows.take()[-lines:] if lines else self._rows.take()[:0]

    def new_lines(self, most_bytes: int = _MOST_NEW_BYTES) -> list[str]:
        """The lines that became whole since the last look. A log that was cut short is read from its start."""
        try:
            with open_regular(self.path, within=self.path.parent.parent) as file:
                end = file.seek(0, 2)
                if end < self._offset:
                    self._offset, self._rows, self._told = 0, _Rows(), []
                return self._new_lines(file, min(end, self._offset + most_bytes))
        except OSError:
            return []

    def _new_lines(self, file: IO[bytes], end: int) -> list[str]:
        found: list[str] = []
        file.seek(self._offset)
        while self._offset < end and (block := file.read(min(_BLOCK_BYTES, end - self._offset))):
            self._offset += len(block)
            self._rows.feed(block)
            found += self._not_told(map(_shown, self._rows.take()))
        return found

    def _not_told(self, lines: Iterable[str]) -> list[str]:
        """Without those that stood there before a line break ended them."""
        told = self._told
        return [line for line in lines if not (told and told.pop(0) == line)]

    def rest(self, most_bytes: int = _MOST_SOUGHT_BYTES) -> Iterator[str]:
        """What is left, also a line that no line break ends: for a log to which nothing more will come.

        Its owner may go on to write for ever: it ends where it ends now.
        """
        size = _size_of(self.path)
        unread = size - self._offset if size >= self._offset else size
        left = min(unread, most_bytes)
        while left > 0:
            before = self._offset
            yield from self.new_lines(min(_MOST_NEW_BYTES, left))
            if self._offset == before:
                break
            left -= self._offset - (before if before < self._offset else 0)
        rows, self._rows = self._rows.pending(), _Rows()
        yield from self._not_told(_shown(row, is_whole=True) for row in rows)
        if unread > most_bytes:
            yield f"… and {unread - most_bytes} bytes more, which are in the file alone"


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _start_of_lines(file: IO[bytes], end: int, lines: int, most_bytes: int) -> int:
    """From where to read for the last lines: the place of a line break that stands before them, or the file's start."""
    begin, found = end, 0
    while begin > 0 and found <= lines and end - begin < most_bytes:
        begin = max(0, begin - _BLOCK_BYTES)
        file.seek(begin)
        found += file.read(min(_BLOCK_BYTES, end - begin)).count(b"\n")
    return begin


_SRUN_WAITED = re.compile(r"srun: First task exited (\d+)s ago")
_SRUN_EXITED = re.compile(r"srun: .*\btasks? (?P<ranks>[\d,-]+): exited")
_SRUN_TASKS = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? (?P<ranks>[\d,-]+): (?P<what>.+)")


def srun_words(lines: list[str]) -> dict[int, tuple[str, str]]:
    """Node and srun's word, such as ``Killed``, of each rank that srun named."""
    found: dict[int, tuple[str, str]] = {}
    matches = [match for line in lines if (match := _SRUN_TASKS.fullmatch(f"srun: error: {line}"))]
    for match, rank in _ranks_named(matches):
        found.setdefault(rank, (match["node"], match["what"]))
    return found


def _ranks_named(matches: Iterable[re.Match[str]]) -> Iterator[tuple[re.Match[str], int]]:
    """No more than a job can have, for a log may name all of them in each line."""
    return islice(((match, rank) for match in matches for rank in ranks_in(match["ranks"])), MAX_RANK + 1)


def early_ends(batch_lines: Sequence[str]) -> tuple[str, list[int]]:
    """Ranks that ended with status 0 while others went on, and the seconds after which srun therefore ended those."""
    waited_s = next((match[1] for line in batch_lines if (match := _SRUN_WAITED.match(line))), "")
    exited = [match for line in batch_lines if (match := _SRUN_EXITED.fullmatch(line.strip()))]
    return waited_s, [rank for _, rank in _ranks_named(exited)] if waited_s else []


_SAID_BY_NSYS = re.compile(
    r"(?:Importer error status: |Unable to retrieve the importer version|Generating '|Generated:\s*$|Processing events|"
    r"Saved report file to |Capture range (?:started|ended)|Collecting data|\[\d+/\d+\] \[|"
    r"\s+/\S+\.(?:qdstrm|nsys-rep|sqlite)\s*$).*"
)
_AFTER_A_BAR = re.compile(r"(?:Importer error status: |Generating '/|Processing events\.\.\.|Capture range ended).*")
"""nsys' first line, where the program's last one has no line break, as that of a progress bar."""


def without_nsys(lines: Sequence[str]) -> list[str]:
    """A rank's log without the last lines, which are nsys' own words of its report and not the program's."""
    end = len(lines)
    while end and (not lines[end - 1].strip() or _SAID_BY_NSYS.match(lines[end - 1])):
        end -= 1
    return [*lines[: end - 1], _AFTER_A_BAR.sub("", lines[end - 1])] if end else []


_OTHER_JOB = re.compile(r"(?:StepId=|\bJOB )(\d+)\b")
_WENT_BACK = re.compile(r"DUE TO (?:JOB REQUEUE|PREEMPTION|NODE FAILURE)|^hpcmm: .*\bqueue\b")
_OF_SLURM = re.compile(r"\s*(?:srun|slurmstepd[\w.-]*): ")


def log_ends(lines: Sequence[str]) -> str:
    return f'; its log ends: "{lines[-1].strip()}"' if lines else ""


def part_of_job(log: str, raw_id: str) -> str:
    """The part of a batch log, to which each job of the run appends, from this job's first mention on."""
    lines = log.split("\n")
    for index in range(len(lines) - 2, -1, -1):  # the last one is not whole
        match = _OTHER_JOB.search(lines[index])
        if match and match[1] != raw_id:
            return "\n".join(lines[index + 1 :])
    return log


def part_of_attempt(log: str) -> str:
    """The part of a job's log that is of its newest attempt: what follows after it went back into the queue."""
    lines = log.split("\n")
    told = False
    """Whether a line behind this one is not Slurm's."""
    for index in range(len(lines) - 1, -1, -1):
        if told and _WENT_BACK.search(lines[index]):
            return "\n".join(lines[index + 1 :])
        told = told or any(part.strip() and not _OF_SLURM.match(part) for part in lines[index].splitlines())
    return log


def lines_in(text: str) -> list[str]:
    """The lines of a log's text as a terminal would show them, without what a terminal would obey."""
    rows = _Rows()
    rows.feed(text.encode(errors="replace"))
    return [_shown(row, is_whole=True) for row in (*rows.take(), *rows.pending())]


def _shown(row: bytes, *, is_whole: bool = False) -> str:
    """``is_whole``: it does not grow any more. Else its last bytes may be the beginning of a character."""
    more = " … and more" if len(row) >= _MOST_LINE_BYTES else ""
    return printable(row if is_whole and not more else _CUT_CHARACTER.sub(b"", row)) + more


def printable(line: bytes) -> str:
    """A line without what a terminal would obey; of a progress bar that was drawn over itself, the last state."""
    states = line.replace(b"\0", b"").split(b"\r")
    state = next((each for each in reversed(states) if not _is_blank(each)), b"" if len(states) > 1 else states[0])
    text = _ESCAPE.sub("", state.decode(errors="replace"))
    if "\x08" in text:
        text = _without_deleted(text)
    return "\t".join(visible(part) for part in text.split("\t"))


def _without_deleted(text: str) -> str:
    """Without characters that a backspace takes back, as some progress bars do."""
    kept: list[str] = []
    for each in text:
        if each != "\x08":
            kept.append(each)
        elif kept:
            kept.pop()
    return "".join(kept)


def ranks_with_logs(run: RunDir) -> list[int]:
    names = names_in(run.logs, within=run.root)
    return sorted(int(match[1]) for name in names if (match := _RANK_LOG.fullmatch(name)))


def logs_of(run: RunDir, ranks: frozenset[int] | None) -> list[Log]:
    """The logs of these ranks (None: of all, and the batch script's), whether or not they exist yet.

    Raises HpcmmError for a rank that left no log, while others did.
    """
    there = ranks_with_logs(run)
    if ranks is None:
        return [Log("batch", run.batch_log)] + [Log(str(rank), run.rank_log(rank)) for rank in there]
    absent = sorted(ranks - set(there))
    if absent and there:
        raise HpcmmError(
            f"{run.logs} holds no log of rank {', '.join(map(str, absent))}: "
            f"there are logs of ranks {write_ranges(there)}."
        )
    return [Log(str(rank), run.rank_log(rank)) for rank in sorted(ranks)]


def last_lines(logs: Iterable[Log], lines: int) -> Iterator[tuple[str, str]]:
    """Label and line of the last lines of each log, log after log."""
    logs = list(logs)
    for log in logs:
        for line in log.tail(lines, _share(_MOST_SOUGHT_BYTES, logs)):
            yield log.label, line


def _share(most_bytes: int, logs: Sequence[Log]) -> int:
    return max(_BLOCK_BYTES, most_bytes // max(1, len(logs)))


def logs_of_points(points: Sequence[RunDir], ranks: frozenset[int] | None) -> list[Log]:
    """The logs of all points of a sweep that are there, with the point in the label: ``0003/0``.

    Raises HpcmmError for a rank of which no point has a log, while others have.
    """
    found: list[Log] = []
    complaint: HpcmmError | None = None
    for point in points:
        try:
            logs = logs_of(point, ranks)
        except HpcmmError as error:
            complaint = error
            continue
        found += [Log(f"{point.root.name}/{log.label}", log.path) for log in logs if is_regular(log.path)]
    if complaint is not None and not found:
        raise complaint
    return found


def follow(find: Callable[[], list[Log]], logs: list[Log], is_over: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    """Label and line as they come, until ``is_over`` says so and all is read. Logs that are found later join in."""
    while True:
        began_s = time.monotonic()
        over = is_over()
        known = {log.label for log in logs}
        logs += [log for log in find() if log.label not in known]
        for log in logs:
            rest = log.rest(_share(_MOST_SOUGHT_BYTES, logs)) if over else ()
            for line in chain(log.new_lines(min(_MOST_NEW_BYTES, _share(_MOST_SOUGHT_BYTES, logs))), rest):
                yield log.label, line
        if over:
            return
        # A look at the logs of a large sweep takes long; the file server has others to serve.
        time.sleep(max(_READ_S, _PAUSE_PER_LOOK * (time.monotonic() - began_s)))
