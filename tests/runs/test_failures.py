"""The exit status that a job takes from its ranks."""

import signal

import pytest

from hpcmm.runs import failures
from hpcmm.runs.failures import RankExit, note_status


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([42], "42"),
        ([42, -signal.SIGTERM], "42"),
        ([-signal.SIGTERM, 42], "42"),
        ([42, 43], "42"),
        ([1, 42], "42"),  # the first may have lost the second
        ([42, 1], "42"),
        ([1, 1], "1"),
        ([1, -signal.SIGSEGV], "139"),
        ([-signal.SIGKILL, 1], "137"),
        ([-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT], None),
    ],
)
def test_a_job_ends_as_the_rank_that_failed_first(tmp_path, ends, status):
    for rank, end in enumerate(ends):
        number = -end if end < 0 else None
        note_status(RankExit(rank, "node1", 1, None if number else end, number), tmp_path)
    noted = failures.status_file(tmp_path)
    assert (noted.read_text() if noted.exists() else None) == (status and f"{status}\n")
