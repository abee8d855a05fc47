"""What a rank tells of the exchange that it waits in, while it waits."""

import pytest
from real_ranks import run_ranks
from waiting_cases import SLEEPS, told_of_a_wait_in_vain, told_of_each_wait

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("compiled_ops")]

EXPECTED = {
    "a call": [("all_reduce", "tensor", False, None)],
    "a group without a name": [("barrier", "", False, None)],
    "a receive": [("recv", "", False, 1)],
    "a work": [("all_reduce", "tensor", True, None)],
    "passed on": [("recv", "tensor", False, 1)],
    "a tensor": [("all_reduce", "tensor", True, None)],
    "backward": [("all_reduce", "tensor", True, None)],
    SLEEPS: [],
}


def test_a_rank_tells_in_which_group_and_for_whom_it_waits():
    assert run_ranks(2, told_of_each_wait, EXPECTED)[0] == EXPECTED


def test_a_rank_whose_collective_fails_records_in_which_group():
    assert run_ranks(2, told_of_a_wait_in_vain)[0] == "all_reduce of the tensor group of ranks 0-1"
