"""The mesh of a job: how its ranks are laid out along the axes that a model and its data are cut along.

A rank's number counts through the axes like the digits of a clock: the last axis of :data:`AXES` changes first, so that
the ranks that exchange most (tensor, then sequence) are neighbours on one node, and pipeline stages lie farthest apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcmm.errors import HpcmmError

PIPELINE, DATA, SEQUENCE, TENSOR, EXPERT = "pipeline", "data", "sequence", "tensor", "expert"
AXES = (PIPELINE, DATA, SEQUENCE, TENSOR)
"""The axes whose sizes multiply to the number of ranks, outermost first."""
SIZES = (*AXES, EXPERT)
"""What ``parallel.mesh`` may name. ``expert`` is taken out of the data axis: its ranks see different examples."""
REST = -1
"""The size of the one axis that takes the ranks which the others leave."""


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes. Their product, without ``expert``, is the number of ranks."""

    pipeline: int = 1
    """Stages that the layers are divided into."""
    data: int = 1
    """Parts of the global batch."""
    sequence: int = 1
    """Parts of each sequence of tokens."""
    tensor: int = 1
    """Parts of each linear map."""
    expert: int = 1
    """Parts of the experts of a mixture-of-experts model: a divisor of ``data``."""

    @classmethod
    def of(cls, sizes: Mapping[str, int], world_size: int) -> Mesh:
        """The mesh of ``world_size`` ranks that ``parallel.mesh`` describes. An axis that it does not name has size 1,
        except ``data``, which takes the ranks that the others leave.

        Raises HpcmmError if there is no such axis, or the sizes do not fit the number of ranks.
        """
        if unknown := sorted(set(sizes) - set(SIZES)):
            raise HpcmmError(f"parallel.mesh has {unknown[0]!r}, which is not an axis; the axes: {', '.join(SIZES)}.")
        for axis, size in sizes.items():
            if size < 1 and not (size == REST and axis != EXPERT):
                or_rest = "" if axis == EXPERT else ", or -1 for the ranks that the others leave"
                raise HpcmmError(f"parallel.mesh.{axis} is {size}, but must be at least 1{or_rest}.")
        rest = [axis for axis in AXES if sizes.get(axis) == REST] or [DATA] * (DATA not in sizes)
        if len(rest) > 1:
            raise HpcmmError(f"parallel.mesh gives -1 to {' and '.join(rest)}: one axis can take the rest.")
        known = {axis: sizes.get(axis, 1) for axis in AXES if axis not in rest}
        product = math.prod(known.values())
        written = " x ".join(f"{axis} {size}" for axis, size in known.items() if size > 1) or "the mesh"
        left, over = divmod(world_size, product)
        if over or (left != 1 and not rest):
            raise HpcmmError(
                f"parallel.mesh does not fit: {written} is {product} ranks, but cluster.nodes x ranks_per_node is "
                f"{world_size}: "
                + ("change one of them." if rest else f"set parallel.mesh.{DATA}=-1, or change one of them.")
            )
        mesh = cls(**known, **dict.fromkeys(rest, left), expert=sizes.get(EXPERT, 1))
        if mesh.data % mesh.expert:
            raise HpcmmError(
                f"parallel.mesh.expert is {mesh.expert}, but must divide the data axis, which has {mesh.data} ranks."
            )
        return mesh

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.pipeline * self.data * self.sequence * self.tensor

    @property
    def model_parallel(self) -> int:
        """Ranks that work on one micro-batch together."""
        return self.pipeline * self.sequence * self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place along each of :data:`AXES`."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def _rank(self, place: Sequence[int]) -> int:
        """The rank at these coordinates, in the order of :data:`AXES`."""
        number = 0
        for axis, coordinate in zip(AXES, place):
            number = number * int(getattr(self, axis)) + coordinate
        return number

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups of ranks that differ along ``axes`` alone, each sorted; together they are all ranks.

        ``("tensor",)``: the parts of one model's linear maps; ``("data", "sequence")``: whose gradients are averaged.
        ``("expert",)`` gives the groups that hold each expert once between them: neighbours of the data axis.
        """
        if EXPERT in axes:
            return [data[i : i + self.expert] for data in self.groups(DATA) for i in range(0, self.data, self.expert)]
        places = itertools.product(*(range(1 if axis in axes else getattr(self, axis)) for axis in AXES))
        moves = list(itertools.product(*(range(getattr(self, axis) if axis in axes else 1) for axis in AXES)))
        return [sorted(self._rank([a + b for a, b in zip(place, move)]) for move in moves) for place in places]

    def group(self, rank: int, *axes: str) -> list[int]:
        """That one of :meth:`groups` which ``rank`` belongs to."""
        return next(group for group in self.groups(*axes) if rank in group)

    def __str__(self) -> str:
        """The axes of more than one rank: ``pipeline 2 x data 2 x tensor 2``."""
        axes = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1] or [f"{DATA} {self.data}"]
        return " x ".join(axes) + (f", expert {self.expert}" if self.expert > 1 else "")
