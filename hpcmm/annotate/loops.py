"""Steps of a loop that is not hpcmm's own, by one line in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from hpcmm.annotate.ranges import phase, step

Batch = TypeVar("Batch")


def steps(batches: Iterable[Batch], first: int = 0) -> Iterator[Batch]:
    """Iterate over ``batches``, each iteration a step with the fetching of its batch as phase ``data``.

    >>> for batch in annotate.steps(loader):
    ...     loss = model(batch)

    ``first`` is the number of the first step. A loop over several epochs goes on counting with
    ``first=epoch * len(loader)``. A step ends with the loop's body, also when that leaves the loop.
    """
    iterator = iter(batches)
    number = first
    while True:
        with step(number):
            with phase("data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch
        number += 1
