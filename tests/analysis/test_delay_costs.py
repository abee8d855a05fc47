"""Charges against brute force: every second of waiting is charged once."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import MS, make_trace, simulate_run

from hpcmm.analysis import collectives, delay_costs, wait_chains
from hpcmm.analysis.delay_costs import BETWEEN_STEPS, GroupArrivals
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.trace import DeviceWork


def arrivals_of(starts: list[float], exposed_share: float = 1.0) -> GroupArrivals:
    start = np.array([starts])
    wait = start.max() - start
    return GroupArrivals(
        members=np.arange(len(starts)),
        start=start,
        end=np.full_like(start, start.max() + 5),
        wait=wait,
        exposed=wait * exposed_share,
        step=np.zeros_like(start, dtype=np.int64),
        blamable=np.array([True]),
    )


def brute_force(starts: list[float]) -> np.ndarray:
    """Who is charged by whom, moment by moment between arrivals."""
    count = len(starts)
    matrix = np.zeros((count, count))
    times = sorted(starts)
    for begin, end in itertools.pairwise(times):
        here = [rank for rank in range(count) if starts[rank] <= begin]
        missing = [rank for rank in range(count) if starts[rank] > begin]
        for waiter in here:
            for late in missing:
                matrix[waiter, late] += (end - begin) / len(missing)
    return matrix


times = st.lists(st.integers(0, 1000).map(float), min_size=2, max_size=7, unique=True)


@given(times)
def test_charges_are_shared_among_those_who_are_missing(starts) -> None:
    arrivals = arrivals_of(starts)
    expected = brute_force(starts)
    assert delay_costs.waited_for(arrivals, len(starts)) == pytest.approx(expected, abs=1e-6)
    assert delay_costs.attribute_wait(arrivals).caused[0] == pytest.approx(expected.sum(axis=0), abs=1e-6)


@given(times, st.floats(0, 1))
def test_no_more_is_charged_than_was_exposed(starts, share) -> None:
    arrivals = arrivals_of(starts, share)
    assert delay_costs.attribute_wait(arrivals).caused.sum() == pytest.approx(arrivals.exposed.sum(), abs=1e-6)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_straggler_costs_its_delay_whatever_the_number_of_ranks(count: int) -> None:
    charges = delay_costs.attribute_wait(arrivals_of([0.0] * (count - 1) + [60.0]))
    assert (charges.caused + charges.own)[0, -1] / count == pytest.approx(60.0)
    assert (charges.caused + charges.own)[0, :-1].sum() == 0


def test_the_window_of_an_arrival_begins_at_the_last_common_synchronisation() -> None:
    arrivals = GroupArrivals(
        members=np.arange(2),
        start=np.array([[0.0, 1.0], [10.0, 11.0], [12.0, 13.0]]),
        end=np.array([[5.0, 5.5], [20.0, 20.5], [21.0, 21.5]]),
        wait=np.zeros((3, 2)),
        exposed=np.zeros((3, 2)),
        step=np.zeros((3, 2), dtype=np.int64),
        blamable=np.ones(3, dtype=bool),
    )
    begins = delay_costs.window_starts(arrivals, np.ones(len(arrivals.start), dtype=bool))
    assert np.isnan(begins[0]).all()
    assert begins[1].tolist() == [5.0, 5.5]
    assert begins[2].tolist() == [5.0, 5.5]


def test_a_delay_is_charged_to_the_phase_that_took_longer() -> None:
    traces = simulate_run(lambda rank, _step, phase: 60.0 if (rank, phase) == (3, "data") else 5.0, noise_ms=0.0)
    rows = collectives.match_with_waits(traces, 1000)
    parts = delay_costs.work_parts(traces)
    groups = wait_chains.charged_groups(rows, parts)
    losses = wait_chains.losses_by_step(groups, len(traces), parts, np.arange(1, 30)).total
    data = parts.names.index("data")
    assert losses[:, 3, data] == pytest.approx(55.0 * MS, rel=0.01)
    assert losses.sum() == pytest.approx(losses[:, 3, data].sum(), rel=0.01)


def test_waiting_for_a_child_process_is_a_part_of_its_own() -> None:
    trace = make_trace(0, "n", [(0, "forward", 0, 100)], [])
    waits = trace.waits.reindex(range(1)).assign(verdict="within step", start_ns=10, end_ns=40)
    parts = delay_costs.work_parts([make_trace(0, "n", [(0, "forward", 0, 100)], [], waits=waits)])
    time = dict(zip(parts.names, parts.between(0, np.array([0.0]), np.array([100.0]))[0], strict=True))
    assert time == {"forward": 70, "subprocess in forward": 30, "between steps": 0}


def test_what_a_gpu_runs_is_the_work_of_the_phase_that_launched_it() -> None:
    """The host waits in the optimizer for what the forward pass has launched, and loads while the GPU computes."""
    segments = [(0, "data", 0, 20 * MS), (0, "forward", 20 * MS, 30 * MS), (0, "optimizer", 30 * MS, 100 * MS)]
    trace = make_trace(0, "node1", [*segments, (1, "data", 110 * MS, 120 * MS)], [])

    def between(*milliseconds: int) -> IntervalSet:
        return IntervalSet.union_of(*([each * MS] for each in milliseconds))

    device = DeviceWork({"forward": between(10, 80), "": between(102, 104)}, between(80, 90))
    parts = delay_costs.work_parts([replace(trace, device_work=device)])
    work = dict(zip(parts.names, parts.between(0, np.array([0.0]), np.array([110.0 * MS]))[0] / MS, strict=True))
    expected = {"data": 10.0, "forward": 70.0, "optimizer": 10.0, BETWEEN_STEPS: 10.0}
    assert {name: taken for name, taken in work.items() if taken} == expected


@pytest.mark.parametrize("missing", [{"device_work": None}, {"gpu_missing": "GPU records end after step 0"}])
def test_ranks_are_compared_by_their_hosts_if_records_of_one_gpu_are_missing(missing: dict) -> None:
    device = DeviceWork({"forward": IntervalSet.union_of([0], [100 * MS])}, IntervalSet.empty())
    traces = [
        replace(make_trace(rank, "node1", [(0, "data", 0, 50 * MS), (0, "forward", 50 * MS, 100 * MS)], []), **known)
        for rank, known in enumerate(({"device_work": device}, {"device_work": device, **missing}))
    ]
    parts = delay_costs.work_parts(traces)
    data = parts.names.index("data")
    assert [sets[data].total_ns / MS for sets in parts.sets] == [50.0, 50.0]


def test_ranks_are_in_step_after_what_their_gpus_waited_for() -> None:
    start = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]) * MS
    arrivals = GroupArrivals(
        np.arange(2), start, start + MS, start * 0, start * 0, start.astype(np.int64), np.ones(3, dtype=bool)
    )

    def parts(*alone: IntervalSet | None) -> delay_costs.WorkParts:
        return delay_costs.WorkParts((), ((), ()), communication=alone)

    first, most = (IntervalSet.union_of([0], [end]) for end in (MS, 2 * MS))
    assert delay_costs.awaited(arrivals, parts(most, first)).tolist() == [True, False, False]
    assert delay_costs.awaited(arrivals, parts(most, None)).tolist() == [True, True, False]
    nothing = IntervalSet.empty()
    assert delay_costs.awaited(arrivals, parts(most, nothing)).all(), "no step tells more than another"
    begins = delay_costs.window_starts(arrivals, np.array([True, False, True]))
    assert np.nan_to_num(begins[:, 0], nan=-1).tolist() == [-1, MS, MS]
