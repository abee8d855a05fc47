"""Idle gaps by what the host did in them: against a count of each nanosecond, and rules one by one."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.analysis.gpu_trace import HOST, device_time
from hpcmm.analysis.idle import Host, Idle, single_gaps, split
from hpcmm.analysis.range_names import part_of_a_step
from hpcmm.reports.report import CUDA_CALL, MPI, SYNCHRONISING, UNKNOWN

OS_CALL = "OS call"
NO_STEPS = pd.DataFrame(columns=["step", "start_ns", "end_ns"], dtype=np.int64)
Call = tuple[int, int, int, str, str]
"""start, end, tid, kind and function."""


def activities(*rows: tuple[int, int, int, int]) -> pd.DataFrame:
    """``rows``: start, end, launch, and the thread that launched it."""
    frame = pd.DataFrame(rows, columns=["start_ns", "end_ns", "launch_ns", "launch_tid"], dtype=np.int64)
    return frame.assign(
        launch_end_ns=frame["launch_ns"], kind=pd.Categorical(["kernel"] * len(rows)),
        name=pd.Categorical(["gemm"] * len(rows)),
    )  # fmt: skip


def host(*calls: Call, ranges: tuple[tuple[int, int, int, str], ...] = (), traces_os: bool = True) -> Host:
    columns = ["start_ns", "end_ns", "tid", "kind", "function"]
    whole = dict.fromkeys(columns[:3], np.int64)
    return Host(
        pd.DataFrame(list(calls), columns=columns).astype({**whole, "kind": "category", "function": "category"}),
        pd.DataFrame([(*each, each[-1]) for each in ranges], columns=[*columns[:3], "name", "whole_name"]).astype(
            {**whole, "name": "category", "whole_name": "category"}
        ),
        traces_os=traces_os,
    )


def idle_of(work: pd.DataFrame, known: Host, steps: pd.DataFrame = NO_STEPS) -> Idle:
    low, high = int(work["start_ns"].min()), int(work["end_ns"].max())
    return split(device_time(work, low, high).idle, HOST, work, known, steps)


def told(found: Idle) -> dict[tuple[str, str, str], int]:
    """Idle time by cause, function and range."""
    return found.rows.groupby(["cause", "what", "range"])["idle_ns"].sum().to_dict()


TWO = ((0, 10, 0, 1), (100, 110, 95, 1))
"""Two kernels, the second launched late by thread 1."""

intervals = st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 2))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 8), st.integers(-1, 60), st.integers(1, 2)), min_size=2),
    st.lists(st.tuples(intervals, st.sampled_from([MPI, SYNCHRONISING, CUDA_CALL, OS_CALL]))),
    st.lists(intervals),
)
def test_every_nanosecond_has_the_first_cause_that_holds_on_the_thread_that_launches_next(
    drawn: list[tuple[int, int, int, int]], calls: list[tuple[tuple[int, int, int], str]], spans: list[tuple]
) -> None:
    work = activities(*sorted((at, at + length, launch, tid) for at, length, launch, tid in drawn))
    known = host(
        *((at, at + length, tid, kind, "f") for (at, length, tid), kind in calls),
        ranges=tuple(
            (at, at + length, tid, f"range {'abcdefghij'[n % 10]}") for n, (at, length, tid) in enumerate(spans)
        ),
    )
    time = device_time(work, int(work["start_ns"].min()), int(work["end_ns"].max()))
    found = split(time.idle, HOST, work, known, NO_STEPS)
    expected: dict[tuple[str, str, str], int] = {}
    order = work.iloc[np.lexsort((work["launch_ns"], work["start_ns"]))]
    for cause, gaps in time.idle.items():
        for start, end in zip(gaps.start_ns.tolist(), gaps.end_ns.tolist(), strict=True):
            following = order[order["start_ns"] >= end].iloc[0]
            before = order[order["start_ns"] < end].iloc[-1]
            tids = [int(each["launch_tid"]) for each in (following, before) if each["launch_ns"] != UNKNOWN]
            for at in range(start, end):
                key = (cause, "", "") if cause != HOST else moment(known, at, tids)
                expected[key] = expected.get(key, 0) + 1
    assert told(found) == expected


def moment(known: Host, at: int, tids: list[int]) -> tuple[str, str, str]:
    """Cause, function and range at a time, counted the slow way."""
    calls = known.calls[(known.calls["start_ns"] <= at) & (known.calls["end_ns"] > at)]
    own = calls[calls["tid"] == tids[0]]
    kinds = [kind for kind in (MPI, SYNCHRONISING, CUDA_CALL, OS_CALL) if (own["kind"] == kind).any()]
    ranges = known.ranges[(known.ranges["start_ns"] <= at) & (known.ranges["end_ns"] > at)]
    name = ""
    for tid in tids:
        on = ranges[ranges["tid"] == tid].reset_index(drop=True)
        if len(on):
            order = np.lexsort((-on["end_ns"], on["start_ns"]))
            name = str(on["name"].iloc[order[-1]])
            break
    return (kinds[0], "f", name) if kinds else ("host code", "", name)


def test_a_call_counts_for_what_it_overlaps_of_a_gap_whatever_the_host_was_in_when_it_began() -> None:
    found = idle_of(
        activities(*TWO), host((5, 12, 1, SYNCHRONISING, "cudaStreamSynchronize"), (20, 80, 1, OS_CALL, "read"))
    )
    assert told(found) == {
        (SYNCHRONISING, "cudaStreamSynchronize", ""): 2,
        (OS_CALL, "read", ""): 60,
        ("host code", "", ""): 28,
    }
    assert found.synchronising.total_ns == 2
    assert found.rows.set_index("what").loc["read", "loading"]


def test_what_other_threads_do_explains_nothing() -> None:
    known = host(
        (5, 99, 2, OS_CALL, "read"), (5, 99, 3, SYNCHRONISING, "cudaDeviceSynchronize"), ranges=((5, 99, 2, "x"),)
    )
    assert told(idle_of(activities(*TWO), known)) == {("host code", "", ""): 90}


def test_a_thread_that_waits_for_another_one_passes_the_question_on() -> None:
    """Autograd's thread waits for work while the main thread, which launched last, synchronises and then writes."""
    backward = activities((0, 10, 0, 1), (100, 110, 95, 2))
    known = host(
        (0, 95, 2, OS_CALL, "pthread_cond_wait"),
        (5, 40, 1, SYNCHRONISING, "cudaStreamSynchronize"),
        (50, 80, 1, OS_CALL, "write"),
        ranges=((5, 90, 1, "forward"),),
    )
    assert told(idle_of(backward, known)) == {
        (SYNCHRONISING, "cudaStreamSynchronize", "forward"): 30,
        (OS_CALL, "write", "forward"): 30,
        (OS_CALL, "pthread_cond_wait", "forward"): 20,
        (OS_CALL, "pthread_cond_wait", ""): 5,
        ("host code", "", ""): 5,
    }


def test_without_os_calls_the_wait_for_another_thread_is_taken_for_granted() -> None:
    backward = activities((0, 10, 0, 1), (100, 110, 95, 2))
    known = host((5, 40, 1, SYNCHRONISING, "cudaStreamSynchronize"), traces_os=False)
    assert told(idle_of(backward, known)) == {
        (SYNCHRONISING, "cudaStreamSynchronize", ""): 30,
        ("host code or OS call", "", ""): 60,
    }


def test_after_the_last_launch_the_thread_that_launched_last_tells() -> None:
    work = activities((0, 10, 0, 1))
    found = split(device_time(work, 0, 50).idle, HOST, work, host((20, 50, 1, OS_CALL, "fsync")), NO_STEPS)
    assert told(found) == {("host code", "", ""): 10, (OS_CALL, "fsync", ""): 30}


def test_a_gap_belongs_to_the_steps_that_it_lies_in() -> None:
    work = activities((0, 10, 0, 1), (100, 110, 95, 1), (190, 200, 185, 1))
    steps = pd.DataFrame({"step": [5, 6], "start_ns": [20, 90], "end_ns": [90, 150]}, dtype=np.int64)
    rows = idle_of(work, host(), steps).rows.groupby("scope")["idle_ns"].sum()
    assert rows.to_dict() == {"warmup": 70, "steps": 10 + 40, "outside": 10 + 40}


@pytest.mark.parametrize(
    ("lengths", "single"),
    [
        ([60_000, 1, 1, 1, 1], [0]),
        ([1, 30_000, 1, 60_000, 1], [1, 3]),
        ([60_000], [0]),
        ([90, 90, 90, 1, 1, 1], []),  # three iterations that load
        ([60_000, 30_000, 10_000, 9_000, 8_000], []),
        ([100, 9, 9, 9, 9, 9, 9], [0]),
        ([], []),
    ],
)
def test_single_gaps_are_few_and_far_longer_than_all_others(lengths: list[int], single: list[int]) -> None:
    found = single_gaps(np.array(lengths, dtype=np.int64), sum(lengths))
    assert np.flatnonzero(found).tolist() == single


def test_a_short_gap_is_not_single_however_short_the_others_are() -> None:
    assert not single_gaps(np.array([100, 1, 1], dtype=np.int64), 1_000_000).any()


def test_the_range_after_a_single_gap_is_told() -> None:
    work = activities((0, 10, 0, 1), *((at, at + 99, at - 5, 1) for at in range(60_000, 62_000, 100)))
    ranges = ((59_990, 60_200, 1, "iteration 0"), (59_992, 60_100, 1, "forward"))
    rows = idle_of(work, host(ranges=ranges)).rows
    once = rows[rows["scope"] == "once"]
    assert set(once["before"]) == {"iteration 0"}
    assert (once["end_ns"] - once["start_ns"]).tolist() == [59_990] * len(once)
    assert set(rows.loc[rows["scope"] != "once", "before"]) == {""}


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("data_loading", True),
        ("DataLoader.__next__", True),
        ("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", True),
        ("get_batch", True),
        ("next batch", True),
        ("load_inputs", True),
        ("fetch-data", True),
        ("data", True),
        ("batch_generator", True),
        ("data_parallel all_reduce", False),
        ("load_checkpoint", False),
        ("get_batch_norm", False),
        ("FSDP::prefetch", False),
        ("metadata_load", False),
        ("forward", False),
        ("wait_stream", False),
    ],
)
def test_ranges_load_data_if_their_name_says_so(name: str, loads: bool) -> None:
    assert (part_of_a_step(name) == "data") == loads
