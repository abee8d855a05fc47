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

from hpcmm.bootstrap.environment import RankEnvironment


class MetricsWriter:
    """Appends records; a job that is requeued goes on in the same file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()

    def start(self, place: RankEnvironment) -> None:
        """Who writes here: what the analysis falls back on where a report does not tell."""
        self._write(
            "start",
            rank=place.rank,
            local_rank=place.local_rank,
            node=place.node,
            world_size=place.world_size,
            job_id=place.job_id,
            pid=os.getpid(),
        )

    @contextmanager
    def startup(self, part: str) -> Iterator[None]:
        """Record how long a part of the start took, as ``duration_s``."""
        began = time.perf_counter()
        yield
        self._write("startup", part=part, duration_s=time.perf_counter() - began)

    def step(self, step: int, **values: float) -> None:
        """One training step. ``values`` in the units of their names (``step_s``)."""
        self._write("step", step=step, **values)

    def end(self, **values: float) -> None:
        self._write("end", **values)

    def _write(self, event: str, **values: object) -> None:
        self._file.write(json.dumps({"event": event, **values, "unix_ns": time.time_ns()}) + "\n")
