"""Logs of a run's ranks, with the rank in front of each line, as they are or as they grow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import names_in, open_regular
from hpcmm.ranges import write_ranges
from hpcmm.runs.run_dir import RunDir
from hpcmm.text import visible

_READ_S = 0.5
_BLOCK_BYTES = 64 * 1024
_MOST_TAIL_BYTES = 16 * 1024**2
_MOST_LINE_BYTES = 64 * 1024
_RANK_LOG = re.compile(r"rank_(\d+)\.log")
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")


@dataclass
class Log:
    """One rank's log, or the batch script's, and how far it was read."""

    label: str
    path: Path
    """In a folder of the run directory."""
    _offset: int = 0
    _half: bytes = field(default=b"", repr=False)

    def tail(self, lines: int) -> list[str]:
        """Its last whole lines, and the position from which ``new_lines`` goes on."""
        self._offset, self._half = 0, b""
        try:
            with open_regular(self.path, within=self.path.parent.parent) as file:
                end = file.seek(0, 2)
                begin, data = end, b""
                while begin > 0 and data.count(b"\n") <= lines and end - begin < _MOST_TAIL_BYTES:
                    begin = max(0, begin - _BLOCK_BYTES)
                    file.seek(begin)
                    data = file.read(end - begin)
        except OSError:
            return []
        self._offset = end
        whole, _, self._half = data.rpartition(b"\n")
        return [printable(line) for line in whole.split(b"\n")[-lines:]] if lines and whole else []

    def new_lines(self) -> list[str]:
        """The lines that became whole since the last look. A log that was cut short is read from its start."""
        try:
            with open_regular(self.path, within=self.path.parent.parent) as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self._half = 0, b""
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *whole, self._half = (self._half + new).split(b"\n")
        if len(self._half) > _MOST_LINE_BYTES:
            whole.append(self._half)
            self._half = b""
        return [printable(line) for line in whole]

    def rest(self) -> list[str]:
        """What stands after the last line break, once nothing more will come."""
        half, self._half = self._half, b""
        return [printable(half)] if half else []


def printable(line: bytes) -> str:
    """A line without what a terminal would obey; of a progress bar that was drawn over itself, the last state."""
    text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
    text = _ESCAPE.sub("", text)
    return "\t".join(visible(part) for part in text.split("\t"))


def logs_of(run: RunDir, ranks: frozenset[int] | None) -> list[Log]:
    """The logs of these ranks (None: of all, and the batch script's), whether or not they exist yet.

    Raises HpcmmError for a rank that left no log, while others did.
    """
    there = sorted(
        int(match[1]) for name in names_in(run.logs, within=run.root) if (match := _RANK_LOG.fullmatch(name))
    )
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
    for log in logs:
        for line in log.tail(lines):
            yield log.label, line


def follow(
    run: RunDir, ranks: frozenset[int] | None, logs: list[Log], is_over: Callable[[], bool]
) -> Iterator[tuple[str, str]]:
    """Label and line as they come, until ``is_over`` says so and all is read. Logs that appear later join in."""
    while True:
        over = is_over()
        known = {log.label for log in logs}
        logs += [log for log in logs_of(run, ranks) if log.label not in known]
        for log in logs:
            for line in log.new_lines() + (log.rest() if over else []):
                yield log.label, line
        if over:
            return
        time.sleep(_READ_S)
