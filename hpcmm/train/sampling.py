"""Which examples a rank sees in which step: a function of seed, step and rank, so a resumed run goes on in order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def even_share(length: int, rank: int, world_size: int) -> list[int]:
    """The indices below ``length`` that ``rank`` scores: every ``world_size``-th, and as many for each rank.

    A rank whose share is one short gets the last index once more at the end, to be dropped by the caller: ranks must
    run through the model equally often, since under ZeRO stage 3 each run is a collective of all.
    """
    share = list(range(rank, length, world_size))
    return share + [length - 1] * (-(-length // world_size) - len(share))


class EndlessSampler(Sampler[list[int]]):
    """Micro-batches of one rank, without end, each epoch in its own random order.

    Yields lists of ``micro_batch_size`` numbers ``epoch * length + index``. The ranks' micro-batches of one round are
    disjoint parts of one order, which runs on over the end of an epoch, so no example is left out.
    """

    def __init__(
        self, length: int, micro_batch_size: int, rank: int, world_size: int, seed: int, first: int = 0
    ) -> None:
        """``length``: examples of an epoch. ``first``: rounds (micro-batches a rank) that earlier runs have done."""
        super().__init__()
        self._length = length
        self._size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._first = first

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, np.ndarray] = {}
        position = (self._first * self._world_size + self._rank) * self._size
        while True:
            batch = []
            for place in range(position, position + self._size):
                epoch, index = divmod(place, self._length)
                if epoch not in orders:
                    orders = {e: o for e, o in orders.items() if e == epoch - 1}
                    orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._length)
                batch.append(epoch * self._length + int(orders[epoch][index]))
            yield batch
            position += self._world_size * self._size
