"""Which ranks a capture covers."""

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
