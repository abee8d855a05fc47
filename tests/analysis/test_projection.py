"""The projection against a brute force, which looks at every pair of a range and an activity."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.analysis import projection
from hpcmm.analysis.projection import REST, aggregate, innermost, project
from hpcmm.reports.report import UNKNOWN, CudaEvents

TIMES = st.integers(0, 40)


def frame(rows: list[tuple], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns)).astype(np.int64)


RANGES = st.lists(st.tuples(TIMES, TIMES, st.integers(1, 2), st.integers(1, 2)), max_size=12).map(
    lambda rows: frame(
        [(min(a, b), max(a, b), pid, tid) for a, b, pid, tid in rows], "start_ns", "end_ns", "pid", "tid"
    )
)
ACTIVITIES = st.lists(
    st.tuples(TIMES, st.integers(0, 20), st.integers(1, 2), st.integers(1, 2), st.one_of(TIMES, st.just(UNKNOWN))),
    max_size=15,
).map(
    lambda rows: frame(
        [(start, start + length, pid, launch, tid) for start, length, pid, tid, launch in sorted(rows)],
        "start_ns", "end_ns", "pid", "launch_ns", "launch_tid",
    )
)  # fmt: skip


def union(spans: list[tuple[int, int]]) -> int:
    return len({at for start, end in spans for at in range(start, end)})


@given(RANGES, ACTIVITIES, st.booleans())
def test_projection_is_what_a_brute_force_finds(
    ranges: pd.DataFrame, activities: pd.DataFrame, by_thread: bool
) -> None:
    found = project(ranges, activities, by_thread=by_thread)
    owned = [
        [
            index
            for index, launch in enumerate(activities.itertuples())
            if launch.launch_ns != UNKNOWN
            and launch.pid == own.pid
            and (launch.launch_tid == own.tid or not by_thread)
            and own.start_ns <= launch.launch_ns <= own.end_ns
        ]
        for own in ranges.itertuples()
    ]
    spans = list(zip(activities["start_ns"], activities["end_ns"], strict=True))
    # Of the ranges that own an activity the innermost began last; of those the one that ended first.
    inner: dict[int, int] = {}
    for index in range(len(spans)):
        owners = [own for own in range(len(ranges)) if index in owned[own]]
        if owners:
            inner[index] = max(owners, key=lambda own: (ranges["start_ns"][own], -ranges["end_ns"][own], own))
    for own, mine in enumerate(owned):
        assert found.owned[own] == len(mine)
        assert found.start_ns[own] == min((spans[index][0] for index in mine), default=0)
        assert found.end_ns[own] == max((spans[index][1] for index in mine), default=0)
        assert found.union_ns[own] == union([spans[index] for index in mine])
        assert found.self_ns[own] == union([spans[index] for index in mine if inner[index] == own])


def test_the_innermost_range_of_crossing_domains_began_last() -> None:
    ranges = frame([(0, 10, 1, 1), (5, 15, 1, 1)], "start_ns", "end_ns", "pid", "tid")
    activities = frame([(at, at, 1, at, 1) for at in (2, 7, 12, 20)],
                       "start_ns", "end_ns", "pid", "launch_ns", "launch_tid")  # fmt: skip
    stretches = project(ranges, activities).stretches
    inner = innermost(ranges["start_ns"].to_numpy(), ranges["end_ns"].to_numpy(), stretches)
    assert inner.tolist() == [0, 1, 1, -1]


@pytest.fixture(scope="module")
def deep() -> tuple[pd.DataFrame, pd.DataFrame]:
    """200 thousand ranges in five levels, 300 thousand activities of which most overlap others; seed 0."""
    random = np.random.default_rng(0)
    levels = [np.sort(random.integers(0, 20_000_000_000, 2 * 200_000 // 2**depth)) for depth in range(1, 6)]
    ranges = pd.DataFrame(
        {
            "start_ns": np.concatenate([edges[::2] for edges in levels]),
            "end_ns": np.concatenate([edges[1::2] for edges in levels]),
            "pid": 7,
            "tid": 7,
        }
    )
    launch = np.sort(random.integers(0, 20_000_000_000, 300_000))
    start = launch + random.integers(5_000, 200_000, len(launch))
    activities = pd.DataFrame(
        {
            "start_ns": start,
            "end_ns": start + random.integers(1_000, 100_000, len(launch)),
            "pid": 7,
            "launch_ns": launch,
            "launch_tid": 7,
        }
    )
    return ranges, activities.sort_values("start_ns", ignore_index=True)


def test_hundreds_of_thousands_take_less_than_a_second(deep: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    begin = time.process_time()
    found = project(*deep)
    # Processor time: other work on the machine must not fail it.
    assert time.process_time() - begin < 1.0
    assert found.owned.sum() > 500_000


def test_pieces_of_the_expansion_give_what_the_whole_gives(
    deep: tuple[pd.DataFrame, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges, activities = deep[0].iloc[-2000:], deep[1]
    whole = project(ranges, activities).union_ns
    monkeypatch.setattr(projection, "PAIRS_AT_ONCE", 5000)
    np.testing.assert_array_equal(project(ranges, activities).union_ns, whole)
    monkeypatch.setattr(projection, "MAX_PAIRS", 100)
    bounded = project(ranges, activities).union_ns
    assert np.isnan(bounded).any()
    np.testing.assert_array_equal(bounded[~np.isnan(bounded)], whole[~np.isnan(bounded)])


def events(names: list[str]) -> CudaEvents:
    """A range of 10 ns a name, one after another, each of which launches one kernel of 4 ns."""
    count = len(names)
    at = np.arange(count, dtype=np.int64) * 10
    ranges = pd.DataFrame(
        {
            "start_ns": at,
            "end_ns": at + 9,
            "closed": True,
            "pid": 1,
            "tid": 1,
            "domain": pd.Categorical([""] * count),
            "name": pd.Categorical(names),
        }
    )
    activities = pd.DataFrame({"start_ns": at + 100, "end_ns": at + 104, "pid": 1, "device": 0, "stream": 7})
    activities = activities.assign(
        kind=pd.Categorical(["kernel"] * count), name=pd.Categorical(["k"] * count), launch_ns=at + 1, launch_tid=1
    )
    return CudaEvents(activities, ranges, pd.DataFrame(), pd.DataFrame())


def test_calls_of_one_operator_are_summed_whatever_pytorch_appends() -> None:
    table = aggregate(events(["aten::mm, seq = 1, op_id = 5", "aten::mm, seq = 2, op_id = 9", "step"]), 1)
    mm = table.set_index("range").loc["aten::mm"]
    assert (mm["calls"], mm["kernels"], mm["copies"]) == (2, 2, 0)
    assert (mm["host_ns"], mm["gpu_union_ns"], mm["gpu_self_ns"], mm["gpu_envelope_ns"]) == (18, 8, 8, 8)


def test_the_number_of_names_is_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "MAX_NAMES", 3)
    table = aggregate(events([f"part {letter}" for letter in "abcdefghijklmnopqrst"]), 1)
    assert len(table) == 4
    assert table["range"].iloc[-1] == REST
    assert (table["calls"].sum(), table["gpu_union_ns"].sum()) == (20, 80)


def test_a_process_without_ranges_has_no_rows() -> None:
    assert aggregate(events(["step"]), 2).empty
