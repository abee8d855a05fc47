import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.osrt import blocked_intervals, calls_by_phase, summarise

calls = st.lists(
    st.tuples(
        st.integers(0, 80), st.integers(0, 30), st.sampled_from([7, 8]), st.sampled_from([7, 9]), st.sampled_from("pq")
    ),
    min_size=1,
    max_size=25,
)


def frame(rows: list[tuple]) -> pd.DataFrame:
    """Rows of (start, length, pid, tid, function)."""
    made = pd.DataFrame(rows, columns=["start_ns", "length", "pid", "tid", "function"])
    made["end_ns"] = made["start_ns"] + made.pop("length")
    return made.astype({"function": "category", "pid": np.int32, "tid": np.int32})


@given(calls)
def test_the_table_against_brute_force(rows) -> None:
    steps = IntervalSet.union_of([20, 50], [40, 60])
    in_step = {*range(20, 40), *range(50, 60)}
    table = summarise(frame(rows), {7: "worker", 8: "launcher"}, (7, 7), steps)
    for row in table.itertuples():
        pid = 7 if row.process_role == "worker" else 8
        mine = [
            r
            for r in rows
            if r[2] == pid and r[4] == row.function and ((r[2], r[3]) == (7, 7)) == (row.thread_role == "step")
        ]
        lengths = [r[1] for r in mine]
        union = {moment for r in mine for moment in range(r[0], r[0] + r[1])}
        assert row.calls == len(mine)
        assert row.total_s * 1e9 == pytest.approx(sum(lengths))
        assert row.union_s * 1e9 == pytest.approx(len(union))
        assert row.in_step_s * 1e9 == pytest.approx(len(union & in_step))
        assert row.p95_s * 1e9 == pytest.approx(np.quantile(lengths, 0.95))
        assert row.max_s * 1e9 == pytest.approx(max(lengths))
    assert table["calls"].sum() == len(rows)


def test_only_waits_for_threads_and_network_count_as_blocked() -> None:
    rows = [
        (0, 10, 7, 7, "pthread_cond_wait"),
        (20, 5, 7, 7, "clock_nanosleep"),
        (30, 5, 7, 9, "poll"),
        (40, 2, 7, 7, "recv"),
    ]
    blocked = blocked_intervals(frame(rows), 7, 7)
    assert blocked is not None
    assert blocked.start_ns.tolist() == [0, 40]
    assert blocked_intervals(frame(rows), 7, 99) is None


def test_calls_count_in_the_phase_where_they_began() -> None:
    segments = pd.DataFrame(
        [(0, "data", 0, 10), (0, "forward", 10, 20)], columns=["step", "phase", "start_ns", "end_ns"]
    )
    found = calls_by_phase(frame([(5, 8, 7, 7, "read"), (15, 1, 7, 7, "read"), (25, 1, 7, 7, "read")]), 7, 7, segments)
    assert found.to_numpy().tolist() == [[0, "data", "read", 8], [0, "forward", "read", 1]]
