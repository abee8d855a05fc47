"""Which steps a capture covers."""

from __future__ import annotations

import re

from hpcmm.errors import HpcmmError


def step_window(choice: str | None, steps: int) -> range | None:
    """The steps named by ``choice``, such as ``100:110``, whose end is not among them; None for all.

    Raises HpcmmError for anything else, and for a window that holds none of the run's ``steps``.
    """
    if choice is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,12})\s*:\s*([0-9]{1,12})\s*", choice)
    if match is None:
        raise HpcmmError(
            f"profile.steps is {choice!r}: write the first step and the one after the last, as in 100:110."
        )
    window = range(int(match[1]), int(match[2]))
    if not window or window.start >= steps:
        raise HpcmmError(f"profile.steps is {choice!r}, which holds none of this run's steps 0 to {steps - 1}.")
    return window
