"""How ranks are laid out along the axes of a mesh."""

from __future__ import annotations

import pytest

from hpcmm.config.mesh import AXES, Mesh
from hpcmm.errors import HpcmmError


def test_an_axis_that_is_not_named_has_one_rank_and_data_takes_the_rest():
    assert Mesh.of({}, 8) == Mesh(data=8)
    assert Mesh.of({"tensor": 2}, 8) == Mesh(data=4, tensor=2)
    assert Mesh.of({"data": 2, "sequence": -1}, 8) == Mesh(data=2, sequence=4)


def test_ranks_that_exchange_most_are_neighbours():
    mesh = Mesh(pipeline=2, data=2, tensor=2)
    assert mesh.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.group(5, "data", "tensor") == [4, 5, 6, 7]
    assert mesh.coordinates(5) == {"pipeline": 1, "data": 0, "sequence": 0, "tensor": 1}


@pytest.mark.parametrize("mesh", [Mesh(2, 3, 1, 2), Mesh(1, 2, 4, 1), Mesh(data=8, expert=4), Mesh(3, 1, 2, 2)])
def test_the_groups_of_any_axes_hold_each_rank_once(mesh):
    for axes in [(), *((axis,) for axis in AXES), ("expert",), ("data", "sequence"), AXES]:
        groups = mesh.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size)), axes
        assert len({len(group) for group in groups}) == 1


def test_experts_are_shared_by_neighbours_of_the_data_axis():
    mesh = Mesh.of({"expert": 2, "tensor": 2}, 8)
    assert mesh.groups("expert") == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert str(mesh) == "data 4 x tensor 2, expert 2"


@pytest.mark.parametrize(
    ("sizes", "world", "words"),
    [
        ({"tensor": 3}, 8, "tensor 3 is 3 ranks, but cluster.nodes x ranks_per_node is 8"),
        ({"data": 2}, 4, "set parallel.mesh.data=-1"),
        ({"batch": 2}, 2, "'batch', which is not an axis; the axes: pipeline, data, sequence, tensor, expert"),
        ({"data": -1, "tensor": -1}, 4, "-1 to data and tensor: one axis can take the rest"),
        ({"expert": 3}, 4, "must divide the data axis, which has 4 ranks"),
        ({"expert": -1}, 4, "must be at least 1."),
        ({"tensor": 0}, 4, "must be at least 1, or -1 for the ranks that the others leave"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(sizes, world, words):
    with pytest.raises(HpcmmError) as refused:
        Mesh.of(sizes, world)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
