"""Process groups of a mesh are named by who is in them."""

from hpcmm.config.mesh import Mesh
from hpcmm.train.group_names import _axes_by_ranks


def test_a_group_is_named_by_the_axes_along_which_its_ranks_lie() -> None:
    assert _axes_by_ranks(Mesh(pipeline=2, data=2, tensor=2), rank=0) == {
        (0, 4): "pipeline",
        (0, 2): "data",
        (0, 1): "tensor",
        (0, 2, 4, 6): "pipeline x data",
        (0, 1, 4, 5): "pipeline x tensor",
        (0, 1, 2, 3): "data x tensor",
    }, "all ranks together do not say what for"


def test_gradients_are_averaged_over_data_and_sequence_though_these_are_all_ranks() -> None:
    named = _axes_by_ranks(Mesh(data=2, sequence=2), rank=3)
    assert named == {(1, 3): "data", (2, 3): "sequence", (0, 1, 2, 3): "data x sequence"}


def test_a_mesh_of_one_axis_has_one_group() -> None:
    assert _axes_by_ranks(Mesh(data=4), rank=2) == {(0, 1, 2, 3): "data"}
    assert _axes_by_ranks(Mesh(data=1), rank=0) == {}


def test_experts_lie_within_the_data_axis() -> None:
    assert _axes_by_ranks(Mesh(data=4, expert=2), rank=3) == {(0, 1, 2, 3): "data", (2, 3): "expert"}
    assert _axes_by_ranks(Mesh(data=2, expert=2), rank=0) == {(0, 1): "data"}, "DeepSpeed's tables tell which is which"


def test_what_shares_the_ranks_of_the_only_sequence_averages_gradients():
    assert _axes_by_ranks(Mesh(sequence=2), rank=1) == {(0, 1): "data x sequence"}
