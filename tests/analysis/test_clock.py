"""The clock against simulated nodes whose true offsets are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.analysis.clock import Arrivals, common_clock, robust_line

EPOCH = 1_700_000_000_000_000_000


def simulate(offsets_ns, drifts, *, instances=400, span_s=60.0, seed=0, straggler=3):
    """Arrivals and ends of collectives of two ranks a node, each as its own clock sees them."""
    noise = np.random.default_rng(seed)
    ranks = 2 * len(offsets_ns)
    true_start = np.sort(noise.uniform(0, span_s * 1e9, instances))[:, None] + noise.exponential(
        3e6, (instances, ranks)
    )
    true_start[:, straggler] += 5e6
    transfer = noise.uniform(0.3e6, 3e6, (instances, 1))
    true_end = true_start.max(axis=1, keepdims=True) + transfer * noise.uniform(0.9, 1.0, (instances, ranks))
    offset, drift = np.repeat(offsets_ns, 2), np.repeat(drifts, 2)
    return Arrivals(true_start * (1 + drift) + offset, true_end * (1 + drift) + offset), true_end


def corrected_ends(clocks, arrivals):
    columns = [clock(arrivals.end[:, index].astype(np.int64)) for index, clock in enumerate(clocks.clocks)]
    return np.column_stack(columns)


NODES = ["a", "a", "b", "b", "c", "c"]


def test_offset_and_drift_of_nodes_are_taken_out() -> None:
    arrivals, truth = simulate([0.0, 4.1e6, -80e6], [0.0, -13e-6, 40e-6])
    clocks = common_clock([EPOCH] * 6, NODES, EPOCH, arrivals)
    error = corrected_ends(clocks, arrivals) - truth
    assert np.abs(np.median(error, axis=0)).max() < 0.1e6
    assert np.abs(error).max() < clocks.error_ns
    table = clocks.table.set_index("node")
    assert table.loc["b", "offset_s"] == pytest.approx(4.1e-3, abs=0.2e-3)
    assert table.loc["c", "drift_ppm"] == pytest.approx(40, abs=3)
    assert list(table["corrected"]) == [False, True, True]


def test_clocks_that_agree_are_left_alone() -> None:
    arrivals, _ = simulate([0.0, 0.0, 20e3], [0.0, 0.0, 0.0])
    clocks = common_clock([EPOCH] * 6, NODES, EPOCH, arrivals)
    assert not clocks.table["corrected"].any()
    assert all(clock.offset_ns == 0 and clock.drift == 0 for clock in clocks.clocks)


def test_an_hour_s_difference_within_a_node_that_drifts_is_put_right() -> None:
    arrivals, truth = simulate([0.0, 0.0], [0.0, 60e-6])
    hour = np.array([0, 3600e9, 0, 3600e9])
    arrivals = Arrivals(arrivals.start + hour, arrivals.end + hour)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, arrivals)
    error = corrected_ends(clocks, arrivals) - truth
    assert np.ptp(np.median(error, axis=0)) < 0.3e6


def test_one_report_with_a_wrong_epoch_is_put_right_among_its_host() -> None:
    arrivals, truth = simulate([0.0, 0.0], [0.0, 0.0])
    late = arrivals.end + np.array([0, 7e6, 0, 0])
    arrivals = Arrivals(arrivals.start + np.array([0, 7e6, 0, 0]), late)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, arrivals)
    error = corrected_ends(clocks, arrivals) - truth
    assert np.ptp(np.median(error, axis=0)) < 0.3e6


def test_ranks_that_leave_a_slow_collective_apart_each_time_are_on_one_clock() -> None:
    """Behind a slow link one rank of a node has its bytes long before its neighbour, in every collective."""
    arrivals, _ = simulate([0.0, 0.0], [0.0, 0.0])
    start, end = arrivals.start[:40], arrivals.end[:40] + 800e6
    at = np.arange(len(end))[:, None] * 1e9  # one a second
    start, end = start - start.min(axis=1, keepdims=True) + at, end - arrivals.end[:40].min(axis=1, keepdims=True) + at
    end[:, 1] += 170e6
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, Arrivals(start, end))
    assert clocks.clocks[1].offset_ns == clocks.clocks[0].offset_ns
    assert not clocks.table["corrected"].any()


def test_a_wrong_epoch_is_put_right_if_a_rank_leaves_before_another_has_arrived() -> None:
    arrivals, _ = simulate([0.0], [0.0], straggler=1)
    start, end = arrivals.start.copy(), arrivals.end + 20e6  # 20 ms of transfer hide an epoch that is wrong by 7 ms ...
    start[::10, 0] = end[::10].min(axis=1) - 1e6  # ... but for those that came just before the end
    wrong = np.array([7e6, 0.0])
    clocks = common_clock([EPOCH] * 2, NODES[:2], EPOCH, Arrivals(start + wrong, end + wrong))
    assert clocks.clocks[0].offset_ns - clocks.clocks[1].offset_ns == pytest.approx(7e6, rel=0.1)


def test_a_report_without_an_epoch_is_placed_by_its_collectives() -> None:
    arrivals, truth = simulate([0.0, 0.0], [0.0, 0.0])
    shift = np.array([0, -3e9, 0, 0])
    arrivals = Arrivals(arrivals.start + shift, arrivals.end + shift)
    clocks = common_clock([EPOCH, None, EPOCH, EPOCH], NODES[:4], EPOCH, arrivals)
    error = corrected_ends(clocks, arrivals) - truth
    assert np.ptp(np.median(error, axis=0)) < 0.3e6


def test_without_shared_collectives_the_error_is_that_of_unsynchronised_nodes() -> None:
    nothing = Arrivals(np.empty((0, 2)), np.empty((0, 2)))
    assert common_clock([EPOCH, EPOCH], ["a", "b"], EPOCH, nothing).error_ns == 10e6
    assert common_clock([EPOCH, EPOCH], ["a", "a"], EPOCH, nothing).error_ns == 0.1e6


def test_nodes_that_share_groups_only_in_a_chain_are_aligned() -> None:
    arrivals, truth = simulate([0.0, 9e6, 30e6], [0.0, 0.0, 0.0])
    start, end = arrivals.start.copy(), arrivals.end.copy()
    for values in (start, end):
        values[::2, 4:] = np.nan
        values[1::2, :2] = np.nan
    clocks = common_clock([EPOCH] * 6, NODES, EPOCH, Arrivals(start, end))
    error = np.nanmedian(corrected_ends(clocks, arrivals) - truth, axis=0)
    assert np.ptp(error) < 0.6e6


def test_a_robust_line_bears_a_quarter_of_outliers() -> None:
    noise = np.random.default_rng(1)
    t = np.linspace(0, 1e11, 300)
    y = 5e5 + 2e-5 * t + noise.normal(0, 1e3, 300)
    y[::4] += 1e8
    line = robust_line(t, y)
    assert line.slope == pytest.approx(2e-5, rel=0.02)
    assert line.offset == pytest.approx(5e5, rel=0.05)


def test_a_drift_within_its_noise_is_not_used() -> None:
    noise = np.random.default_rng(2)
    line = robust_line(np.linspace(0, 1e9, 50), noise.normal(0, 1e5, 50))
    assert line.slope == 0.0


def spread(clocks, arrivals, truth) -> float:
    """Largest difference between any two ranks' corrected clocks and the truth, over the collectives."""
    error = corrected_ends(clocks, arrivals) - truth
    return float(np.abs(np.median(error, axis=0)[:, None] - np.median(error, axis=0)[None, :]).max())


@given(
    st.floats(-50e6, 50e6),
    st.floats(-60e-6, 60e-6),
    st.integers(20, 300),
    st.floats(20.0, 600.0),
    st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_stated_error_holds(offset_ns, drift, instances, span_s, seed) -> None:
    arrivals, truth = simulate([0.0, offset_ns], [0.0, drift], instances=instances, span_s=span_s, seed=seed)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, arrivals)
    error = corrected_ends(clocks, arrivals) - truth
    between = np.abs(np.median(error[:, :2], axis=1) - np.median(error[:, 2:], axis=1))
    assert np.median(between) <= clocks.error_ns
    assert np.quantile(between, 0.9) <= clocks.error_ns + 0.5e6  # the ends themselves differ by as much


def test_a_clock_that_was_slewed_in_mid_run_has_a_large_error() -> None:
    arrivals, _ = simulate([0.0, 1e6], [0.0, 0.0], span_s=300.0)
    slewed = [
        values + np.where(np.arange(4) >= 2, 1.0, 0.0) * np.clip(values - 100e9, 0, 40e9) * 500e-6
        for values in (arrivals.start, arrivals.end)
    ]
    steady = common_clock([EPOCH] * 4, NODES[:4], EPOCH, arrivals)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, Arrivals(*slewed))
    assert steady.error_ns < 2e6
    assert clocks.error_ns > 3e6
    assert clocks.table.set_index("node").loc["b", "residual_s"] > 1e-3


def test_collectives_that_end_late_by_milliseconds_do_not_move_the_clock() -> None:
    arrivals, truth = simulate([0.0, 4.1e6], [0.0, -13e-6])
    dice = np.random.default_rng(3)
    late = dice.uniform(6e6, 9e6, arrivals.end.shape) * (dice.random(arrivals.end.shape) < 0.15)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, Arrivals(arrivals.start, arrivals.end + late))
    node = clocks.table.set_index("node").loc["b"]
    assert node["offset_s"] == pytest.approx(4.1e-3, abs=0.5e-3)
    assert spread(clocks, arrivals, truth) < 0.5e6


def test_few_noisy_collectives_still_bound_an_offset_that_is_there() -> None:
    arrivals, truth = simulate([0.0, 40e6], [0.0, 0.0], instances=6, span_s=20.0)
    clocks = common_clock([EPOCH] * 4, NODES[:4], EPOCH, arrivals)
    assert clocks.table["corrected"].tolist() == [False, True]
    assert spread(clocks, arrivals, truth) <= clocks.error_ns + 1e6


def test_an_error_passes_on_along_a_chain() -> None:
    arrivals, _ = simulate([0.0, 9e6, 30e6], [0.0, 0.0, 0.0])
    start, end = arrivals.start.copy(), arrivals.end.copy()
    for values in (start, end):
        values[::2, 4:] = np.nan
        values[1::2, :2] = np.nan
    table = common_clock([EPOCH] * 6, NODES, EPOCH, Arrivals(start, end)).table.set_index("node")
    assert table.loc["c", "error_s"] > table.loc["b", "error_s"]
