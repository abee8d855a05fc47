"""Logs with their rank in front, as they are and as they grow."""

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.jobs.logs import Log, follow, last_lines, logs_of, printable
from hpcmm.runs.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    run.batch_log.write_text("prepared\n")
    for rank in range(3):
        run.rank_log(rank).write_text("".join(f"line {number} of {rank}\n" for number in range(5)))
    return run


def test_the_last_lines_of_all_ranks_or_of_some(run):
    assert list(last_lines(logs_of(run, None), 1)) == [
        ("batch", "prepared"),
        ("0", "line 4 of 0"),
        ("1", "line 4 of 1"),
        ("2", "line 4 of 2"),
    ]
    assert [line for _, line in last_lines(logs_of(run, frozenset({1})), 2)] == ["line 3 of 1", "line 4 of 1"]
    assert list(last_lines(logs_of(run, frozenset({1})), 0)) == []
    with pytest.raises(HpcmmError, match="no log of rank 7: there are logs of ranks 0-2"):
        logs_of(run, frozenset({7}))


def test_a_long_log_is_read_from_its_end(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"{number:07d}\n" for number in range(100_000)) + "half")
    log = Log("0", path)
    assert log.tail(3) == ["0099997", "0099998", "0099999"]
    with path.open("a") as file:
        file.write(" a line\nnext\nunfin")
    assert log.new_lines() == ["half a line", "next"]
    assert log.rest() == ["unfin"]


def test_following_takes_up_new_logs_and_ends_with_the_job(run):
    logs = logs_of(run, None)
    list(last_lines(logs, 0))
    looks = []

    def over():
        looks.append(1)
        if len(looks) == 1:
            run.rank_log(1).open("a").write("more\nand")
            run.rank_log(3).write_text("a fourth rank\n")
            return False
        run.rank_log(1).open("a").write(" the end")
        return True

    assert list(follow(run, None, logs, over)) == [("1", "more"), ("3", "a fourth rank"), ("1", "and the end")]


def test_a_log_that_was_cut_short_is_read_anew(run):
    log = Log("0", run.rank_log(0))
    log.tail(1)
    run.rank_log(0).write_text("new\n")
    assert log.new_lines() == ["new"]


def test_what_a_terminal_would_obey_is_not_printed():
    assert printable(b"\x1b[31mred\x1b[0m \x1b]0;title\x07x") == "red x"
    assert printable(b"10%\r50%\r100%\r") == "100%"
    assert "\x07" not in printable(b"bell\x07")
    assert printable(b"tab\tstays \xff") == "tab\tstays \ufffd"
