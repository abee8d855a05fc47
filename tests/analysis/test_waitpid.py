import numpy as np
import pandas as pd

from hpcmm.analysis.waitpid import find_waits, process_roles, windows

SEGMENTS = pd.DataFrame(
    [(0, "forward", 100, 200), (1, "forward", 200, 300)], columns=["step", "phase", "start_ns", "end_ns"]
)
PROCESSES = {1: "torchrun", 7: "python", 20: "python", 30: "g++"}


def frame(rows: list[tuple]) -> pd.DataFrame:
    """Rows of (start, end, pid, tid, function)."""
    made = pd.DataFrame(rows, columns=["start_ns", "end_ns", "pid", "tid", "function"])
    return made.astype({"function": "category", "pid": np.int32, "tid": np.int32})


CALLS = frame(
    [
        (0, 400, 1, 1, "wait4"),
        (10, 11, 7, 7, "read"),
        (50, 90, 7, 7, "waitpid"),
        (60, 85, 30, 30, "read"),
        (120, 150, 7, 7, "waitpid"),
        (125, 130, 7, 8, "waitpid"),
        (160, 170, 20, 20, "read"),
        (310, 320, 7, 7, "waitid"),
    ]
)


def test_roles_follow_from_names_and_order() -> None:
    assert process_roles(CALLS, PROCESSES, frozenset({7})) == {
        7: "worker",
        1: "launcher",
        20: "data_loader",
        30: "other",
    }


def test_without_steps_the_busiest_process_that_launches_nothing_is_the_worker() -> None:
    assert process_roles(CALLS, PROCESSES, frozenset())[7] == "worker"


def test_verdicts_in_context() -> None:
    roles = process_roles(CALLS, PROCESSES, frozenset({7}))
    waits = find_waits(CALLS, PROCESSES, roles, (7, 7), SEGMENTS)
    assert list(zip(waits["start_ns"], waits["verdict"], waits["step"], strict=True)) == [
        (0, "benign supervision", -1),
        (50, "op build", -1),
        (120, "within step", 0),
        (125, "other", 0),
        (310, "other", -1),
    ]
    assert list(waits["child"])[1] == "g++"


def test_waits_close_together_are_one_window() -> None:
    second = 1_000_000_000
    waits = pd.DataFrame(
        [
            ("worker", "op build", 0, second),
            ("worker", "op build", second // 2, 2 * second),
            ("worker", "op build", 9 * second, 10 * second),
        ],
        columns=["process_role", "verdict", "start_ns", "end_ns"],
    )
    found = windows(waits)
    assert found[["start_ns", "end_ns", "calls", "union_ns"]].to_numpy().tolist() == [
        [0, 2 * second, 2, 2 * second],
        [9 * second, 10 * second, 1, second],
    ]
