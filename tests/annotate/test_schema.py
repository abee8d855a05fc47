"""The names that ranks write and the analysis reads."""

from hypothesis import example, given
from hypothesis import strategies as st

from hpcmm.annotate.schema import CollectiveName


@given(
    st.sampled_from(["all_reduce", "barrier"]),
    st.text(min_size=1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 9_999_999),
)
@example("all_reduce", "0", 10**18, 2**63 - 1, None)
def test_a_name_reads_back_as_it_was_written(op, group, sequence, size, peer):
    name = CollectiveName(op, group, sequence, size, peer)
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
