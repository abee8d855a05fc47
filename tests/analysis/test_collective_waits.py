from dataclasses import replace

import numpy as np
import pytest
from simulated import make_trace

from hpcmm.analysis.clock import SAME_HOST_ERROR_NS
from hpcmm.analysis.collectives import bus_bandwidth, estimate_waits, expose, match, match_with_waits
from hpcmm.analysis.intervals import IntervalSet


def ranks(*arrivals: tuple[int, int], op: str = "all_reduce", size: int = 1000):
    """One collective of ranks given as (start, end)."""
    return [
        make_trace(rank, "n", [(0, "backward", 0, 1000)], [(op, 5, size, start, end, 0, "backward")])
        for rank, (start, end) in enumerate(arrivals)
    ]


def test_both_estimators_and_the_late_arriver() -> None:
    rows = estimate_waits(match(ranks((100, 500), (150, 510), (400, 505))), 10)
    assert rows["wait_b_ns"].tolist() == [300, 250, 0]
    assert rows["wait_a_ns"].tolist() == [400 - 105, 360 - 105, 0]
    assert rows["wait_ns"].tolist() == [300, 250, 0]
    assert rows["late_rank"].tolist() == [2, 2, 2]
    assert rows["lateness_ns"].tolist() == [250, 250, 250]


def test_nobody_is_blamed_when_the_clock_is_worse_than_the_wait() -> None:
    rows = estimate_waits(match(ranks((100, 500), (150, 510), (400, 505))), 1000)
    assert not rows["blamable"].any()
    assert rows["late_rank"].isna().all()
    assert rows["wait_ns"].tolist() == rows["wait_a_ns"].tolist()


@pytest.mark.parametrize(
    ("error_ns", "transfer_ns"),
    [(40, [305, 105, 100]), (1000, [100, 100, 100])],
)
def test_no_more_is_called_transfer_than_the_shortest_part_unless_the_clock_contradicts_it(
    error_ns: int, transfer_ns: list[int]
) -> None:
    """The first rank's clock is 200 ahead, so that by the clocks it hardly waited."""
    rows = estimate_waits(match(ranks((300, 710), (150, 510), (405, 505))), error_ns)
    assert rows["transfer_ns"].tolist() == transfer_ns


def test_ranks_of_one_node_arrive_at_exact_times_whatever_the_clocks_of_the_nodes_are() -> None:
    traces = ranks((100, 500), (150, 510), (400, 505))
    apart = match_with_waits(traces, 1000.0, ["a", "b", "a"])
    assert not apart["blamable"].any()
    here = match_with_waits(traces, 10_000_000.0, ["a", "a", "a"])
    assert here["clock_error_ns"].tolist() == [SAME_HOST_ERROR_NS] * 3


def test_of_what_the_clock_alone_tells_from_waiting_it_is_said_how_much_may_be_either() -> None:
    """Of an all-to-all no more is sure than that the shortest part is transfer."""
    rows = estimate_waits(match(ranks((100, 500), (150, 900), op="all_to_all")), 1000)
    assert rows["unsure_ns"].tolist() == [0, 350]
    assert estimate_waits(match(ranks((100, 500), (150, 900))), 1000)["unsure_ns"].tolist() == [0, 0]
    assert estimate_waits(match(ranks((100, 500), (150, 900), op="all_to_all")), 10)["unsure_ns"].tolist() == [0, 10]


@pytest.mark.parametrize("op", ["broadcast", "reduce", "gather", "scatter", "send", "recv"])
def test_operations_in_which_not_every_rank_needs_all_have_no_wait(op: str) -> None:
    rows = estimate_waits(match(ranks((100, 500), (150, 510), op=op)), 10)
    assert rows[["wait_ns", "wait_a_ns", "wait_b_ns", "clock_error_ns"]].isna().all(axis=None)
    assert rows["transfer_ns"].tolist() == [400, 360]
    assert not rows["blamable"].any()


def test_an_all_to_all_waits_for_the_last_by_the_clock_alone() -> None:
    rows = estimate_waits(match(ranks((100, 500), (150, 900), op="all_to_all")), 10)
    assert rows["wait_a_ns"].isna().all()
    assert rows["wait_ns"].tolist() == rows["wait_b_ns"].tolist() == [50, 0]
    assert rows["late_rank"].tolist() == [1, 1]
    assert not rows["estimators_disagree"].any()
    unknown = estimate_waits(match(ranks((100, 500), (150, 900), op="all_to_all")), 1000)
    assert unknown["wait_ns"].isna().all()
    assert unknown["transfer_ns"].tolist() == [400, 750]


def test_lateness_is_told_against_the_second_last_and_against_the_median() -> None:
    rows = estimate_waits(match(ranks((100, 500), (150, 500), (300, 500), (400, 500))), 10)
    assert rows["lateness_ns"].tolist() == [100] * 4
    assert rows["lateness_to_median_ns"].tolist() == [400 - 225] * 4


def test_it_is_said_where_the_estimators_disagree_by_more_than_the_clocks_error() -> None:
    good = estimate_waits(match(ranks((100, 500), (400, 505))), 10)
    assert not good["estimators_disagree"].any()
    assert good["clock_error_ns"].tolist() == [10, 10]
    # The second rank's clock is 250 late: by durations it came 50 after the first, by the clock 300.
    shifted = estimate_waits(match(ranks((100, 500), (400, 750))), 10)
    assert shifted["estimators_disagree"].tolist() == [True, False]


def test_an_instance_that_lacks_a_rank_is_incomplete() -> None:
    traces = ranks((100, 500), (150, 510))
    more = make_trace(
        1, "n", [(0, "backward", 0, 2000)], [("all_reduce", s, 8, 150 * s, 160 * s, 0, "b") for s in (5, 6)]
    )
    rows = estimate_waits(match([traces[0], more]), 1)
    assert rows.groupby("sequence")["complete"].first().to_dict() == {5: True, 6: False}


def test_an_instance_without_an_end_is_incomplete_and_counts_for_nothing() -> None:
    traces = ranks((100, 500), (150, 510))
    opened = replace(traces[1], collectives=traces[1].collectives.assign(closed=False))
    rows = expose(estimate_waits(match([traces[0], opened]), 1), [traces[0], opened])
    assert not rows["complete"].any()
    assert rows.loc[rows["rank"] == 1, "exposed_transfer_ns"].tolist() == [0]


def test_bus_bandwidth_as_nccl_tests_define_it() -> None:
    rows = estimate_waits(match(ranks((0, 500), (400, 500), size=1000)), 1)
    assert bus_bandwidth(rows) == pytest.approx([1000 * (2 * 1 / 2) / 100e-9] * 2)


def test_overlapping_collectives_are_exposed_once_and_only_while_the_thread_is_blocked() -> None:
    comm = [("all_reduce", 0, 8, 0, 100, 0, "b"), ("all_reduce", 1, 8, 50, 140, 0, "b")]
    trace = make_trace(0, "n", [(0, "b", 0, 200)], comm, blocked=IntervalSet(np.array([80]), np.array([130])))
    rows = expose(estimate_waits(match([trace]), 1), [trace])
    assert rows["exposed_transfer_ns"].tolist() == [20, 30]


def test_no_collectives_at_all() -> None:
    assert estimate_waits(match([make_trace(0, "n", [(0, "b", 0, 9)], [])]), 1).empty
