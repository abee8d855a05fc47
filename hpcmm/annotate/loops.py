"""Steps of a loop that is not hpcmm's own, by one line in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import TypeVar

from hpcmm.annotate.ranges import phase, step

Batch = TypeVar("Batch")


def steps(batches: Iterable[Batch], first: int = 0) -> Iterator[Batch]:
    """Iterate over ``batches``, each iteration a step.

    >>> for batch in annotate.steps(loader):
    ...     loss = model(batch)

    A step is the loop's body and then, as phase ``data``, the fetching of the next batch; it ends too when the body
    leaves the loop. ``first`` is the number of the first step: a loop over several epochs goes on counting with
    ``first=epoch * len(loader)``.
    """
    iterator = iter(batches)
    try:
        batch = next(iterator)
        for number in count(first):
            with step(number):
                yield batch
                with phase("data"):
                    batch = next(iterator)
    except StopIteration:
        return
