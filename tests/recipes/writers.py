"""Which ranks write which file of a checkpoint. On the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def written_twice(save: Callable[[], None]) -> tuple[str, ...]:
    """Save, and tell which files more than one rank has written."""
    mine: list[str] = []
    write = torch.save

    def noted(state: Any, file: Any, *rest: Any, **options: Any) -> None:
        mine.append(str(file))
        write(state, file, *rest, **options)

    with patch.object(torch, "save", noted):
        save()
    by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, mine)
    assert all(by_rank), "each rank writes its random state at least"
    count = Counter(name for names in by_rank for name in names)
    return tuple(sorted(Path(name).name for name, writers in count.items() if writers > 1))
