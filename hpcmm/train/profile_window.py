"""The capture window: the range that a profiler records within, and nothing else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import nvtx

from hpcmm.annotate.ranges import profiler_attached

DOMAIN = "hpcmm.capture"
RANGE = "window"
"""``nsys profile --capture-range=nvtx --nvtx-capture=window@hpcmm.capture`` waits for this one."""


class CaptureWindow:
    """Opens before the window's first step that this attempt does, and closes after its last, or when training ends."""

    def __init__(self, steps: range | None) -> None:
        self._steps = steps if profiler_attached() else None
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._open:
            self._close()

    def before(self, step: int) -> None:
        """Call between the steps, with the one that comes."""
        if self._steps is None:
            return
        if self._open and step not in self._steps:
            self._close()
            self._steps = None
        elif not self._open and step in self._steps:
            nvtx.push_range(RANGE, domain=DOMAIN)
            self._open = True

    def _close(self) -> None:
        nvtx.pop_range(domain=DOMAIN)
        self._open = False
