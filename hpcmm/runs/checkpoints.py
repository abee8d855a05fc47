"""The names of a run's checkpoints, and ``checkpoints/latest``, which names the newest that is whole."""

from __future__ import annotations

import re

from hpcmm.files import read_text, write_whole
from hpcmm.runs.run_dir import RunDir

_NAME = re.compile(r"step_([0-9]{1,15})")


def checkpoint_name(steps_done: int) -> str:
    """The folder, in ``checkpoints/``, of the checkpoint after so many steps."""
    return f"step_{steps_done:06d}"


def steps_of_checkpoint(name: str) -> int | None:
    """How many steps were done at a checkpoint of this name; None if it is another's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def note_newest_checkpoint(run: RunDir, name: str) -> None:
    """Write down that checkpoint ``name`` is whole, and the newest. Raises OSError."""
    write_whole(run.newest_checkpoint, name)


def newest_checkpoint(run: RunDir) -> str:
    """The name of the newest checkpoint that is whole; empty if it cannot be read. Raises OSError if there is none."""
    try:
        return read_text(run.newest_checkpoint, within=run.root).strip()
    except ValueError:
        return ""


def steps_in_newest_checkpoint(run: RunDir) -> int | None:
    """How many steps were done at the newest checkpoint; None if there is none."""
    try:
        return steps_of_checkpoint(newest_checkpoint(run))
    except OSError:
        return None
