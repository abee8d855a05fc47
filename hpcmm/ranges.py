"""Which ranks and which steps a capture covers: number ranges as users write them."""

from __future__ import annotations

import re

from hpcmm.errors import HpcmmError


def profiled_ranks(choice: str, world_size: int, ranks_per_node: int) -> frozenset[int]:
    """The ranks named by ``choice``: ``all``, ``one_per_node`` (the first of each), or a list such as ``0,3-5``.

    Raises HpcmmError for anything else, and for ranks that the run does not have.
    """
    if choice == "all":
        return frozenset(range(world_size))
    if choice == "one_per_node":
        return frozenset(range(0, world_size, ranks_per_node))
    ranks: set[int] = set()
    for part in choice.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*", part)
        if match is None:
            raise HpcmmError(f"profile.ranks is {choice!r}: write all, one_per_node, or ranks such as '0,3-5'.")
        first = int(match[1])
        ranks.update(range(min(first, world_size), min(int(match[2] or first), world_size) + 1))
    if not ranks or max(ranks) >= world_size:
        raise HpcmmError(f"profile.ranks is {choice!r}, but the ranks of this run are 0 to {world_size - 1}.")
    return frozenset(ranks)


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
