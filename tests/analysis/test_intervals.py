"""Interval algebra against brute force on a small axis of single nanoseconds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.analysis.intervals import IntervalSet, first_claims

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def make(intervals: list[tuple[int, int]]) -> IntervalSet:
    return IntervalSet.union_of([start for start, _ in intervals], [end for _, end in intervals])


def moments(intervals: list[tuple[int, int]]) -> set[int]:
    return {moment for start, end in intervals for moment in range(start, end)}


def covered(intervals: IntervalSet) -> set[int]:
    return moments(list(zip(intervals.start_ns.tolist(), intervals.end_ns.tolist(), strict=True)))


def assert_disjoint_and_sorted(intervals: IntervalSet) -> None:
    assert (intervals.end_ns > intervals.start_ns).all()
    assert (intervals.start_ns[1:] >= intervals.end_ns[:-1]).all()


@given(pairs)
def test_union(a) -> None:
    union = make(a)
    assert covered(union) == moments(a)
    assert union.total_ns == len(moments(a))
    assert_disjoint_and_sorted(union)


@given(pairs, pairs)
def test_intersection_and_difference(a, b) -> None:
    both, without = make(a).intersect(make(b)), make(a).subtract(make(b))
    assert covered(both) == moments(a) & moments(b)
    assert covered(without) == moments(a) - moments(b)
    assert_disjoint_and_sorted(both)
    assert_disjoint_and_sorted(without)


@given(pairs, pairs)
def test_coverage_of_windows(a, windows) -> None:
    starts, ends = [start for start, _ in windows], [end for _, end in windows]
    found = make(a).covered_within(starts, ends)
    expected = [len(moments(a) & moments([window])) for window in windows]
    assert found.tolist() == expected


@given(pairs)
def test_first_claims_share_out_the_union(a) -> None:
    ordered = sorted((start, end) for start, end in a if end > start)
    starts = np.array([start for start, _ in ordered], dtype=np.int64)
    ends = np.array([end for _, end in ordered], dtype=np.int64)
    begin, finish = first_claims(starts, ends)
    seen: set[int] = set()
    for index, (left, right) in enumerate(zip(begin.tolist(), finish.tolist(), strict=True)):
        piece = moments([(left, right)])
        assert piece == moments([ordered[index]]) - seen
        seen |= piece
    assert seen == moments(a)


def test_real_epochs_keep_their_nanoseconds() -> None:
    start = 1_795_302_103_506_078_667
    union = IntervalSet.union_of([start, start + 3], [start + 2, start + 5])
    assert union.covered_within([start + 1], [start + 4]).tolist() == [2]
