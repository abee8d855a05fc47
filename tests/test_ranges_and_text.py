"""Number ranges and untrusted text: each has one module that reads and writes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.errors import HpcmmError
from hpcmm.ranges import (
    count_tasks,
    is_task_of,
    parse_ranges,
    profiled_ranks,
    ranks_in,
    tasks_in,
    without_tasks,
    write_ranges,
)
from hpcmm.text import printable, visible


@given(st.lists(st.integers(0, 999), min_size=1), st.sampled_from([",", ", "]))
def test_what_is_written_is_read_as_the_same_numbers(numbers: list[int], separator: str) -> None:
    written = write_ranges(numbers, separator)
    assert ranks_in(written) == sorted(set(numbers))


TASKS = st.builds(lambda first, more, step: f"7_[{first}-{first + more}:{step}%4]", *[st.integers(1, 60)] * 3)


@given(TASKS, st.lists(st.one_of(TASKS, st.integers(0, 130).map("7_{}".format)), max_size=6))
def test_what_is_left_of_tasks_is_what_no_other_row_stands_for(tasks: str, others: list[str]) -> None:
    taken = {task for other in others for task in tasks_in(other)}
    left = without_tasks(tasks, others)
    assert (tasks_in(left) if left else []) == [task for task in tasks_in(tasks) if task not in taken]
    assert [task for task in tasks_in("7_[0-130]") if is_task_of(task, tasks)] == tasks_in(tasks)


def test_of_a_huge_range_no_task_is_written_out() -> None:
    assert without_tasks("7_[0-4000000%3]", ["7_0", "7_1", "7_5", "7_[3999990-4000000]"]) == "7_[2-4,6-3999989%3]"
    assert without_tasks("7_[0-4000000]", ["7", "8_1", "7_x"]) == "7_[0-4000000]"
    assert without_tasks("7_[0-3%3]", ["7_0", "7_1", "7_2"]) == "7_3"
    assert without_tasks("7_[0-3%3]", ["7_[0-9]"]) is None
    assert count_tasks("7_[2-4,6-3999989%3]") == 3999987
    assert not any(is_task_of(task, "7_[0-9]") for task in ("7", "8_1", "7_10", "7_" + "9" * 5000, "7_x"))


def test_neighbours_are_joined_and_the_order_does_not_matter() -> None:
    assert write_ranges([7, 3, 0, 1, 2, 3]) == "0-3,7"
    assert write_ranges([5, 6], ", ") == "5-6"
    assert write_ranges([]) == ""


def test_a_part_that_is_no_range_is_told_apart() -> None:
    assert parse_ranges("4 - 6,x,,-1,9") == [range(4, 7), None, None, None, range(9, 10)]


def test_a_huge_range_costs_no_memory() -> None:
    assert parse_ranges("0-999999999999") == [range(1_000_000_000_000)]
    assert ranks_in("0-999999999999,3") == [3]
    with pytest.raises(HpcmmError, match="names more ranks than a run can have"):
        profiled_ranks(",".join(["0-131071"] * 100_000), 131_072, 4)


def test_untrusted_text_is_escaped_replaced_or_left_out() -> None:
    text = "red\x1b[31m\n"
    assert printable(text) == "red\\x1b[31m\\n"
    assert visible(text) == "red\ufffd[31m\ufffd"
    assert visible(text, " ") == "red [31m "
    assert visible(text, "") == "red[31m"
