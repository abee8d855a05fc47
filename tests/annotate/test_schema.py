"""The names that ranks write and the analysis reads."""

from hypothesis import example, given
from hypothesis import strategies as st

from hpcmm.annotate.schema import CollectiveName, GroupMark, axis_of, format_expert_tokens, parse_expert_tokens


@given(
    st.sampled_from(["all_reduce", "barrier"]),
    st.text(min_size=1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 9_999_999),
    st.just(()) | st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)),
)
@example("all_reduce", "0", 10**18, 2**63 - 1, None, ())
def test_a_name_reads_back_as_it_was_written(op, group, sequence, size, peer, exchanged):
    name = CollectiveName(op, group, sequence, size, peer, *exchanged)
    assert CollectiveName.parse(name.format()) == name


def test_other_names_are_none():
    for text in (
        "",
        "step",
        "all_reduce",
        "all_reduce group= seq=1 bytes=2",
        "all_reduce group=0 seq=x bytes=2",
        f"all_reduce group=0 seq={2**63} bytes=2",
        "send group=0 seq=1 bytes=2 peer=",
    ):
        assert CollectiveName.parse(text) is None


@given(st.text(min_size=1, max_size=10), st.text(min_size=1, max_size=10), st.sets(st.integers(0, 50), min_size=1))
@example("3", "data x sequence", set(range(0, 65_536, 4)))
@example("3", "tensor", {0, 1})
def test_a_groups_mark_reads_back_as_it_was_written(group, name, ranks):
    mark = GroupMark(group, name, tuple(sorted(ranks)))
    assert len(mark.format()) < 256
    assert GroupMark.parse(mark.format()) in {mark, GroupMark(group, name, ())}


def test_ranks_along_an_axis_of_a_mesh_take_few_characters():
    assert GroupMark("3", "data", tuple(range(0, 4096, 8))).format() == "process group=3 name=data ranks=0-4088:8"


def test_a_mark_of_more_ranks_than_there_can_be_is_none():
    for ranks in ("0-9999999", "0-131071,0-131071", "4-x", ","):
        assert GroupMark.parse(f"process group=3 name=data ranks={ranks}") is None


def test_tokens_of_experts_read_back():
    assert parse_expert_tokens(format_expert_tokens(12, "layer 1")) == 12
    assert parse_expert_tokens("process rank=1") is None


def test_names_of_other_libraries_stand_for_axes():
    named = {
        "mesh_tp": "tensor",
        "mesh_dp_shard_cp": "data x sequence",
        "mesh_dp_replicate": "data",
        "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
        "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
        "EXPERT_MODEL_PARALLEL_GROUP": "expert",
        "EXPERT_DATA_PARALLEL_GROUP": "replicas of experts",
        "DATA_PARALLEL_GROUP_WITH_CP": "data x sequence",
        "data x tensor": "data x tensor",
        "undefined": "",
        "default_pg": "",
        "EMBEDDING_GROUP": "",
    }
    assert {name: axis_of(name) for name in named} == named
