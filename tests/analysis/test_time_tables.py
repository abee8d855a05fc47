import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, make_trace, simulate_run

from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.time_tables import phases_summary, phases_table


def phases_of(traces) -> pd.DataFrame:
    rows = match_with_waits(traces, 10.0)
    return phases_table(traces, rows, step_times(traces).warmup_number)


def test_each_communication_is_apart_and_the_rest_is_useful() -> None:
    traces = [
        make_trace(
            rank,
            "n",
            [(0, "forward", 0, 40 * MS), (0, "backward", 40 * MS, 100 * MS)],
            [
                ("all_reduce", 0, 8, start * MS, 90 * MS, 0, "backward"),
                ("broadcast", 1, 8, 92 * MS, 100 * MS, 0, "backward"),
            ],
            blocked=IntervalSet(np.array([60 * MS]), np.array([100 * MS])),
        )
        for rank, start in enumerate((50, 80))
    ]
    table = phases_of(traces).set_index(["rank", "phase", "within"])
    assert table.loc[(0, "all_reduce", "backward"), ["wait_s", "transfer_s"]].tolist() == pytest.approx([0.02, 0.01])
    assert table.loc[(1, "all_reduce", "backward"), ["wait_s", "transfer_s"]].tolist() == pytest.approx([0.0, 0.01])
    assert table.loc[(0, "broadcast", "backward"), ["wait_s", "transfer_s"]].tolist() == pytest.approx([0.0, 0.008])
    own = table.loc[(0, "backward", "")]
    assert own[["useful_s", "overlapped_comm_s", "exposed_comm_s"]].tolist() == pytest.approx([0.022, 0.01, 0.0])
    assert table.loc[(0, "forward", ""), "duration_s"] == pytest.approx(0.04)


def test_communication_counts_in_the_phase_that_it_keeps_waiting_not_in_the_one_that_began_it() -> None:
    segments = [(0, "backward", 0, 50), (0, "optimizer", 50, 100)]
    trace = make_trace(
        0,
        "n",
        segments,
        [("all_reduce", 0, 8, 20, 80, 0, "backward")],
        blocked=IntervalSet(np.array([60]), np.array([80])),
    )
    table = phases_of([trace]).set_index(["phase", "within"])
    assert table.loc[("all_reduce", "optimizer"), "duration_s"] == pytest.approx(20e-9)
    assert ("all_reduce", "backward") not in table.index
    assert table.loc[("backward", ""), "overlapped_comm_s"] == pytest.approx(30e-9)


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 80), st.sampled_from(["all_reduce", "all_gather"])), max_size=8
    ),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=6),
    st.booleans(),
)
def test_the_rows_of_a_step_add_up_to_it_whatever_is_in_flight(collectives, blocked, traced) -> None:
    segments = [
        (step, name, 100 * step + at, 100 * step + at + 50) for step in range(3) for name, at in (("f", 0), ("b", 50))
    ]
    comm = [(op, number, 8, start, start + length, 0, "f") for number, (start, length, op) in enumerate(collectives)]
    blocked_set = IntervalSet.union_of([b[0] for b in blocked], [b[0] + b[1] for b in blocked]) if traced else None
    table = phases_of([make_trace(0, "n", segments, comm, blocked=blocked_set)])
    assert (table.groupby("step")["duration_s"].sum() * 1e9).round(3).tolist() == [100, 100, 100]
    parts = table["useful_s"] + table["wait_s"] + table["transfer_s"]
    assert parts.to_numpy() == pytest.approx(table["duration_s"].to_numpy())
    assert (table[["useful_s", "wait_s", "transfer_s", "overlapped_comm_s"]] >= 0).all(axis=None)
    apart = table["within"] != ""
    assert (table.loc[apart, "useful_s"] == 0).all()
    assert (table.loc[~apart, "exposed_comm_s"] == 0).all()


def test_the_summary_keeps_the_warm_up_apart_and_counts_the_steps_that_have_the_phase() -> None:
    lengths = [500, 10, 20, 30, 40]
    segments, at = [], 0
    for step, length in enumerate(lengths):
        segments.append((step, "forward", at, at + length * MS))
        at += length * MS
        if step == 4:
            segments.append((step, "checkpoint", at, at + 100 * MS))
    trace = make_trace(0, "n", segments, [])
    table = phases_summary(phases_of([trace]), step_times([trace])).set_index("phase")
    forward, checkpoint = table.loc["forward"], table.loc["checkpoint"]
    assert forward[["mean_s", "p50_s", "max_s", "warmup_s"]].tolist() == pytest.approx([0.025, 0.025, 0.04, 0.5])
    assert forward["variation"] == pytest.approx(np.std([10, 20, 30, 40], ddof=1) / 25)
    assert forward["p95_s"] == pytest.approx(np.quantile([10, 20, 30, 40], 0.95) / 1e3)
    assert (checkpoint["steps"], checkpoint["mean_s"], checkpoint["s_per_step"]) == (
        1,
        pytest.approx(0.1),
        pytest.approx(0.025),
    )
    assert np.isnan(checkpoint["warmup_s"])


def test_shares_of_the_step_add_up_to_one_rank_by_rank() -> None:
    traces = simulate_run(lambda *_: 10.0, ranks=4)
    table = phases_summary(phases_of(traces), step_times(traces))
    assert table.groupby("rank")["step_share"].sum().to_numpy() == pytest.approx([1.0] * 4, rel=0.05)


def test_no_segments_no_rows() -> None:
    trace = make_trace(0, "n", [], [])
    table = phases_of([trace])
    assert table.empty
    assert phases_summary(table, step_times([trace])).empty
