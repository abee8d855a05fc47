"""Rules on the OS calls of main threads: on simulated loops, whose workers wait for the last one in each iteration."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from simulated import make_trace

from hpcmm.analysis.host_calls import find, find_loop, kind_of
from hpcmm.analysis.osrt import main_thread
from hpcmm.analysis.process_groups import Unseen
from hpcmm.analysis.trace import RankTrace

NOBODY = Unseen(0, 2)
WAIT, SLEEP, SEND = "pthread_cond_wait", "nanosleep", "sendmsg"


@dataclass
class Worker:
    """Seconds of an iteration, and by how much the code's vary."""

    code_s: float = 0.02
    sleep_s: float = 0.0
    noise_s: float = 0.0


def simulated(
    workers: list[Worker], iterations: int = 60, *, seed: int = 0, every: int = 1, imports_s: float = 5.0
) -> list[RankTrace]:
    """Traces of workers that exchange data 8 times, import, and run a loop; they sleep in ``every`` such iteration."""
    generator = np.random.default_rng(seed)
    calls: list[tuple[float, float, int, int, str]] = []
    time = 1.0
    for iteration in range(-8, iterations):
        arrivals = []
        for pid, worker in enumerate(workers, start=1):
            at = time + worker.code_s + worker.noise_s * generator.random()
            if worker.sleep_s and iteration >= 0 and iteration % every == 0:
                calls.append((at, at + worker.sleep_s, pid, pid, SLEEP))
                at += worker.sleep_s
            arrivals.append(at)
        over = max(arrivals) + 0.001
        for pid, at in enumerate(arrivals, start=1):
            calls += [(at, over, pid, pid, WAIT), (over - 1e-4, over, pid, 100 + pid, SEND)]
        time = over + (imports_s if iteration == -1 else 0.0)
    start, end, pid, tid, function = zip(*sorted(calls), strict=True)
    osrt = pd.DataFrame(
        {
            "start_ns": (np.array(start) * 1e9).astype(np.int64),
            "end_ns": (np.array(end) * 1e9).astype(np.int64),
            "pid": pid,
            "tid": tid,
            "function": pd.Categorical(function),
        }
    )
    return [
        replace(make_trace(pid - 1, "node1", [], []), main_thread=main_thread(osrt, pid))
        for pid in range(1, len(workers) + 1)
    ]


def named(traces: list[RankTrace], unseen: Unseen = NOBODY) -> list[tuple[int, str, str]]:
    return [(each.rank, each.kind, each.confidence) for each in find(traces, unseen)[0] if each.rank is not None]


def test_the_late_worker_is_named_for_what_it_does_and_the_rest_is_waiting() -> None:
    traces = simulated([Worker(), Worker(sleep_s=0.02), Worker()])
    assert named(traces) == [(1, "host_sleep", "medium")]
    late, waiting = find(traces, NOBODY)[0]
    whole_s = find(traces, NOBODY)[1]
    assert late.lost_s == pytest.approx(0.02 / 0.041 * whole_s, rel=0.02)
    assert (waiting.kind, waiting.rank) == ("host_wait", None)
    assert waiting.lost_s == pytest.approx(0.001 / 0.041 * whole_s, rel=0.1)
    assert late.lost_s + waiting.lost_s < whole_s


def test_longer_code_is_named_with_low_confidence() -> None:
    assert named(simulated([Worker(), Worker(code_s=0.04, noise_s=0.01), Worker()])) == [(1, "host_code", "low")]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_are_late_by_turns_are_not_named(seed: int, workers: int) -> None:
    assert named(simulated([Worker(noise_s=0.04)] * workers, seed=seed)) == []


def test_two_late_workers_are_not_named() -> None:
    assert named(simulated([Worker(sleep_s=0.03), Worker(sleep_s=0.03), Worker(), Worker()])) == []


def test_what_comes_now_and_then_needs_a_tenth_of_the_loop() -> None:
    assert named(simulated([Worker(), Worker(sleep_s=0.5)], every=25)) == [(1, "host_sleep", "low")]
    assert named(simulated([Worker(), Worker(sleep_s=0.06)], every=25)) == []


def test_a_rank_without_a_report_may_be_the_one_that_is_waited_for() -> None:
    traces = simulated([Worker(), Worker(sleep_s=0.03)])
    assert named(traces, Unseen(2, 4)) == [(1, "host_sleep", "low")]
    assert all("2 of 4 ranks have no report" in each.evidence for each in find(traces, Unseen(2, 4))[0])


@pytest.mark.parametrize("iterations", [20, 60, 400])
def test_the_loop_begins_after_the_imports(iterations: int) -> None:
    traces = simulated([Worker(), Worker()], iterations)
    loop = find_loop([trace.main_thread for trace in traces if trace.main_thread is not None])
    assert loop is None if iterations == 20 else loop is not None
    if loop is not None:
        begin_s = 1.0 + 8 * 0.021 + 5.0
        assert begin_s <= loop.start_ns / 1e9 <= begin_s + 0.2 * iterations * 0.021
        assert loop.length_s == pytest.approx(iterations * 0.021, rel=0.2)


def test_without_a_main_thread_of_each_worker_nothing_is_said() -> None:
    traces = simulated([Worker(), Worker(sleep_s=0.03)])
    assert find([*traces, make_trace(2, "node1", [], [])], NOBODY) == ([], 0.0)
    assert find([], NOBODY) == ([], 0.0)


@pytest.mark.parametrize(
    ("function", "alone", "with_children"),
    [
        ("poll", "host_wait", "host_pipe"),
        ("connect", "host_wait", "host_pipe"),
        ("pthread_cond_clockwait", "host_wait", "host_wait"),
        ("recvmsg", "host_wait", "host_wait"),
        ("sendto", "host_wait", "host_wait"),
        ("pthread_cond_signal", "host_code", "host_code"),
        ("usleep", "host_sleep", "host_sleep"),
        ("readv", "host_read", "host_read"),
        ("preadv", "host_read", "host_read"),
        ("readlink", "host_open", "host_open"),
        ("fopen64", "host_open", "host_open"),
        ("fdatasync", "host_write", "host_write"),
        ("pwrite64", "host_write", "host_write"),
        ("wait4", "host_child", "host_child"),
        ("vfork", "host_child", "host_child"),
        ("madvise", "host_other", "host_other"),
    ],
)
def test_calls_by_what_they_are(function: str, alone: str, with_children: str) -> None:
    assert kind_of(function, has_children=False) == alone
    assert kind_of(function, has_children=True) == with_children
