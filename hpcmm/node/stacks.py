"""Where a rank was when it was told to end, by the stacks that it left."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.+)')
_THREAD = re.compile(r"(?:Current t|T)hread 0x[0-9a-f]+.*\(most recent call first\):")
_WAITING = re.compile(r"/(?:torch/distributed/|deepspeed/comm/|hpcmm/annotate/collectives)")
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib/python\d|<frozen ")
_INNERMOST = 12
"""Frames from the top in which a wait for other ranks must show."""


@dataclass(frozen=True)
class Place:
    """The main thread's place."""

    frames: list[str]
    """Innermost first, such as ``File "train.py", line 3 in load``."""
    in_collective: bool

    @property
    def said(self) -> str:
        """The innermost frame, and the innermost of the user's own code where that is another."""
        if not self.frames:
            return "an unknown place"
        own = next((frame for frame in self.frames if not _LIBRARY.search(frame)), None)
        return self.frames[0] + (f" (called from {own})" if own and own != self.frames[0] else "")


def main_place(stacks: str) -> Place | None:
    """The place of the thread that runs the training, in the last dump; None where there is none."""
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
    return Place(frames, any(_WAITING.search(frame) for frame in frames[:_INNERMOST]))
