"""A rank's metrics file: one JSON object a line, each line whole as soon as it is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hpcmm.errors import HpcmmError

_STEP = b'{"event": "step"'
_LOST_STEP = b'{"event": "lost"'
"""As long as ``_STEP``, so that it can be written over it under the eyes of who follows the file."""


class MetricsWriter:
    """Appends records; a job that is requeued goes on in the same file, under the next attempt's number."""

    def __init__(self, path: Path, attempt: int = 1) -> None:
        """Raises HpcmmError where the file cannot be written, as every method here that writes."""
        self._path = path
        self._attempt = attempt
        with self._clear_errors():
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._end = _end_of_the_last_whole_line(self._fd)
            os.ftruncate(self._fd, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def start(self, *, rank: int, local_rank: int, world_size: int, node: str, job_id: str) -> None:
        """Who writes here: what the analysis falls back on where a report does not tell."""
        self._write(
            "start",
            rank=rank,
            local_rank=local_rank,
            node=node,
            world_size=world_size,
            job_id=job_id,
            pid=os.getpid(),
        )

    @contextmanager
    def startup(self, part: str) -> Iterator[None]:
        """Record how long a part of the start took, as ``duration_s``."""
        began = time.perf_counter()
        yield
        self.startup_part(part, time.perf_counter() - began)

    def startup_part(self, part: str, duration_s: float) -> None:
        """A part of the start that was measured otherwise."""
        self._write("startup", part=part, duration_s=duration_s)

    def resume(self, step: int) -> None:
        """Training goes on with ``step``. Later steps of earlier attempts become ``lost`` records: they come again."""
        with self._clear_errors():
            offset = 0
            for line in os.pread(self._fd, self._end, 0).splitlines(keepends=True):
                if line.startswith(_STEP) and json.loads(line)["step"] >= step:
                    os.pwrite(self._fd, _LOST_STEP, offset)
                offset += len(line)
        self._write("resume", step=step)

    def step(self, step: int, **values: float) -> None:
        """One training step. ``values`` in the units of their names (``step_s``)."""
        self._write("step", step=step, **values)

    def end(self, **values: float) -> None:
        self._write("end", **values)

    def _write(self, event: str, **values: object) -> None:
        record = {"event": event, **values, "attempt": self._attempt, "unix_ns": time.time_ns()}
        line = (json.dumps(record) + "\n").encode()
        with self._clear_errors():
            written = 0
            try:
                while written < len(line):
                    written += os.pwrite(self._fd, line[written:], self._end + written)
            except OSError:
                os.ftruncate(self._fd, self._end)  # half a line is none
                raise
            self._end += len(line)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HpcmmError(
                f"{self._path} cannot be written ({error.strerror}): what is there is whole. Make room there, then "
                f"submit the run's submission.sh again; it goes on from the last checkpoint."
            ) from error


def _end_of_the_last_whole_line(fd: int) -> int:
    """In bytes. A rank that was killed may have left half a line after it."""
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).rfind(b"\n") + 1
