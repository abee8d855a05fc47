"""Number ranges and untrusted text: each has one module that reads and writes it."""

from hypothesis import given
from hypothesis import strategies as st

from hpcmm.ranges import parse_ranges, ranks_in, write_ranges
from hpcmm.text import printable, visible


@given(st.lists(st.integers(0, 999), min_size=1), st.sampled_from([",", ", "]))
def test_what_is_written_is_read_as_the_same_numbers(numbers: list[int], separator: str) -> None:
    written = write_ranges(numbers, separator)
    assert ranks_in(written) == sorted(set(numbers))


def test_neighbours_are_joined_and_the_order_does_not_matter() -> None:
    assert write_ranges([7, 3, 0, 1, 2, 3]) == "0-3,7"
    assert write_ranges([5, 6], ", ") == "5-6"
    assert write_ranges([]) == ""


def test_a_part_that_is_no_range_is_told_apart() -> None:
    assert parse_ranges("4 - 6,x,,-1,9") == [range(4, 7), None, None, None, range(9, 10)]


def test_a_huge_range_costs_no_memory() -> None:
    assert parse_ranges("0-999999999999") == [range(1_000_000_000_000)]
    assert ranks_in("0-999999999999,3") == [3]


def test_untrusted_text_is_escaped_replaced_or_left_out() -> None:
    text = "red\x1b[31m\n"
    assert printable(text) == "red\\x1b[31m\\n"
    assert visible(text) == "red\ufffd[31m\ufffd"
    assert visible(text, " ") == "red [31m "
    assert visible(text, "") == "red[31m"
