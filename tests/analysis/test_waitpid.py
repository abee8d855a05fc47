import numpy as np
import pandas as pd

from hpcmm.analysis.waitpid import Family, busiest_alike, find_waits, process_roles, windows

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


def test_the_busiest_process_that_launches_nothing_stands_for_the_worker() -> None:
    assert busiest_alike(CALLS, PROCESSES) == [7]
    assert busiest_alike(CALLS, {1: "torchrun", 7: "pt_data_worker", 20: "mpirun", 30: "sh"}) == []


def calls_of(pid: int, start_ns: int, functions: str) -> list[tuple]:
    return [(start_ns + 1000 * at, start_ns + 1000 * at + 10, pid, pid, name) for at, name in enumerate(functions)]


def test_processes_of_one_program_that_were_started_together_and_do_the_same_are_workers() -> None:
    late_ns = 10**10
    rows = [
        *calls_of(1, 0, "rrrrrrrrrrr"),
        *calls_of(2, 0, "rwrwrwrwrw"),
        *calls_of(3, 500, "wrwrwrwrw"),
        *calls_of(4, 0, "ssssssssss"),  # does something else
        *calls_of(5, 0, "rw"),  # hardly does anything
        *calls_of(6, late_ns, "rwrwrwrwrw"),  # came later
        *calls_of(7, 0, "rwrwrwrwrw"),  # another program
    ]
    names = dict.fromkeys(range(1, 7), "python") | {1: "torchrun", 7: "java"}
    assert busiest_alike(frame(rows), names) == [2, 3]
    assert busiest_alike(frame(rows), {}) == [1]


def test_verdicts_in_context() -> None:
    roles = process_roles(CALLS, PROCESSES, frozenset({7}))
    waits = find_waits(CALLS, Family(CALLS, roles, PROCESSES), (7, 7), SEGMENTS)
    assert list(zip(waits["start_ns"], waits["verdict"], waits["step"], strict=True)) == [
        (0, "benign supervision", -1),
        (50, "op build", -1),
        (120, "within step", 0),
        (125, "other", 0),
        (310, "other", -1),
    ]
    assert list(waits["child"])[1] == "g++"


def test_a_build_tool_that_waits_for_a_compiler_before_the_steps_builds_an_op() -> None:
    names = {1: "torchrun", 7: "python", 25: "ninja", 30: "cc1plus", 40: "git", 50: "ld"}
    rows = [
        (0, 400, 1, 1, "wait4"),
        (10, 11, 7, 7, "read"),
        (20, 21, 25, 25, "open"),
        (22, 91, 25, 25, "waitpid"),
        (30, 85, 30, 30, "read"),
        (40, 44, 40, 40, "waitpid"),
        (95, 96, 50, 50, "read"),
        (310, 320, 25, 25, "waitpid"),
    ]
    calls = frame(rows)
    roles = process_roles(calls, names, frozenset({7}))
    waits = find_waits(calls, Family(calls, roles, names), (7, 7), SEGMENTS)
    assert list(zip(waits["start_ns"], waits["verdict"], strict=True)) == [
        (0, "benign supervision"),
        (22, "op build"),
        (40, "other"),
        (310, "other"),
    ]


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


UNNAMED = frame(
    [
        (0, 5, 1, 1, "open"),
        (20, 500, 1, 1, "waitpid"),
        (30, 480, 7, 7, "poll"),
        (31, 470, 8, 8, "poll"),
        (150, 190, 7, 7, "waitpid"),
        (155, 185, 30, 30, "read"),
        (160, 260, 40, 40, "read"),
    ]
)


def test_processes_without_names_have_the_roles_that_their_lives_tell() -> None:
    roles = process_roles(UNNAMED, {40: "pt_data_worker"}, frozenset({7, 8}))
    assert roles == {1: "launcher", 7: "worker", 8: "worker", 30: "other", 40: "data_loader"}


def test_a_child_is_called_by_its_rank_else_by_its_name_else_by_its_number() -> None:
    roles = process_roles(UNNAMED, {}, frozenset({7, 8}))
    waits = find_waits(UNNAMED, Family(UNNAMED, roles, {7: "rank 0", 8: "rank 1"}), (7, 7), SEGMENTS)
    assert list(waits["child"]) == ["rank 0", "process 30"]
    assert list(waits["verdict"]) == ["benign supervision", "within step"]


def test_what_another_s_child_waited_for_is_not_taken_for_the_child() -> None:
    calls = frame(
        [
            (0, 5, 1, 1, "open"),
            (20, 500, 1, 1, "waitpid"),  # for rank 0, whose last call was before that of rank 1's child
            (30, 480, 7, 7, "poll"),
            (31, 140, 8, 8, "poll"),
            (150, 492, 8, 8, "waitpid"),
            (155, 490, 30, 30, "read"),
            (493, 600, 8, 8, "poll"),
        ]
    )
    roles = process_roles(calls, {}, frozenset({7, 8}))
    family = Family(calls, roles, {7: "rank 0", 8: "rank 1"})
    assert list(find_waits(calls, family, (8, 8), SEGMENTS)["child"]) == ["rank 0", "process 30"]
    assert list(find_waits(calls[calls["pid"] != 8], family, (7, 7), SEGMENTS)["child"]) == ["rank 0"]


def test_a_wait_that_ends_long_after_a_process_did_is_not_for_it() -> None:
    second = 1_000_000_000
    calls = frame([(0, 1, 7, 7, "read"), (5, 6, 30, 30, "read"), (4, 2 * second, 7, 7, "waitpid")])
    waits = find_waits(calls, Family(calls, {7: "worker"}, {30: "g++"}), (7, 7), SEGMENTS)
    assert list(waits["child"]) == [""]
