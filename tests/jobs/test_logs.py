"""Logs with their rank in front, as they are and as they grow."""

import os

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.jobs import logs
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
    assert log.tail(3) == ["0099998", "0099999", "half"]
    with path.open("a") as file:
        file.write(" a line\nnext\nunfin")
    assert log.new_lines() == ["half a line", "next"]
    assert list(log.rest()) == ["unfin"]
    assert list(log.rest()) == []


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

    followed = follow(lambda: logs_of(run, None), logs, over)
    assert list(followed) == [("1", "more"), ("3", "a fourth rank"), ("1", "and the end")]


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
    assert printable(b"\x1b(B\x1b[mplain\x1b") == "plain"
    assert printable(b"\xc2\x9b31m c1 \x9b \xe2\x80\xae") == "\ufffd31m c1 \ufffd \ufffd"


def written(tmp_path, *parts):
    path = tmp_path / "log"
    path.write_bytes(b"".join(parts))
    return Log("0", path)


def test_the_last_line_counts_though_no_newline_ends_it(tmp_path):
    assert written(tmp_path, b"one\ntwo").tail(1) == ["two"]
    assert written(tmp_path, b"one\ntwo\n").tail(1) == ["two"]
    assert written(tmp_path, b"one\n\n").tail(2) == ["one", ""]
    assert written(tmp_path, b"two").tail(5) == ["two"]
    assert written(tmp_path, b"").tail(5) == []


def test_a_newline_that_comes_later_does_not_repeat_the_line(tmp_path):
    log = written(tmp_path, b"one\ntwo")
    assert log.tail(5) == ["one", "two"]
    log.path.open("a").write("\nthree\n")
    assert log.new_lines() == ["three"]
    log = written(tmp_path, b"one\ntwo")
    log.tail(5)
    assert list(log.rest()) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"10%\r20%\r30%", ["30%"]),
        (b"10%\r20%\r", ["20%"]),
        (b"\r10%\r\x1b[K\r20%\x1b[K\rthe loss is NaN", ["the loss is NaN"]),
        (b"10%\r     \r", ["10%"]),
        (b"10%\r     \rdone\nnext", ["done", "next"]),
        (b"windows\r\nlines\r\n", ["windows", "lines"]),
        (b"spin |\x08/\x08-\n", ["spin -"]),
        (
            b"outer 0\n\rinner 0\x1b[A\n\rinner 1\x1b[A\router 1\n\rinner 2\x1b[A\n\nend\n",
            ["outer 1", "inner 2", "end"],
        ),
        (b"a\r\x1b[2K\x1b[1A\x1b[2Kb\n", ["b"]),
    ],
)
def test_what_is_drawn_over_itself_shows_its_last_state(tmp_path, text, lines):
    assert written(tmp_path, text).tail(10) == lines
    log = written(tmp_path, b"")
    log.tail(10)
    seen = []
    for at in range(len(text)):  # however the file grows, its end is the same
        log.path.open("ab").write(text[at : at + 1])
        seen += log.new_lines()
    assert [*seen, *log.rest()][-1] == lines[-1]


def test_an_hour_of_a_progress_bar_is_one_line_and_does_not_hide_those_before(tmp_path):
    bar = b"".join(b"\r%6d/36000 %s" % (step, b"#" * 200) for step in range(36_000))
    log = written(tmp_path, b"before\nstarts\n", bar, b"\rstopped")
    assert log.tail(3) == ["before", "starts", "stopped"]
    log = written(tmp_path, b"")
    log.tail(3)
    log.path.write_bytes(bar)
    assert log.new_lines() == []
    assert list(log.rest()) == [f" 35999/36000 {'#' * 200}"]


def test_as_many_real_lines_as_asked_for_come_though_two_bars_draw_over_each_other(tmp_path):
    bars = b"".join(b"\router %d\n\rinner %d\x1b[A" % (step, step) for step in range(20_000))
    assert written(tmp_path, b"first\nsecond\n", bars).tail(4) == ["first", "second", "outer 19999", "inner 19999"]


def test_a_line_of_many_megabytes_is_cut(tmp_path):
    line, last = written(tmp_path, b"x" * 5_000_000, b"\nlast\n").tail(2)
    assert (len(line), line[-10:], last) == (64 * 1024 + 11, "x … and more"[-10:], "last")


def test_a_character_that_is_half_written_is_waited_for(tmp_path):
    log = written(tmp_path, "Größ".encode()[:-1])
    assert log.tail(1) == ["Grö"]
    log.path.open("ab").write("ße\n".encode()[1:])
    assert log.new_lines() == ["Größe"]


def test_what_a_hole_in_a_file_reads_as_is_not_shown(tmp_path):
    assert written(tmp_path, b"\0" * 5000, b"after\0 a log was cut\n").tail(5) == ["after a log was cut"]


def test_all_logs_together_are_looked_through_up_to_a_bound(run, monkeypatch):
    monkeypatch.setattr("hpcmm.jobs.logs._MOST_SOUGHT_BYTES", 8 * 64 * 1024)
    sought = []
    begin = logs._start_of_lines
    monkeypatch.setattr(
        "hpcmm.jobs.logs._start_of_lines",
        lambda file, end, *more: sought.append(end - (found := begin(file, end, *more))) or found,
    )
    os.truncate(run.rank_log(0), 1 << 40)
    for rank in range(3, 99):
        run.rank_log(rank).hardlink_to(run.rank_log(0))
    last_lines_of_all = list(last_lines(logs_of(run, None), 5))
    assert ("1", "line 4 of 1") in last_lines_of_all
    assert max(sought) <= 64 * 1024
    assert len(sought) == 100


def test_a_log_that_grows_for_ever_ends_where_it_ended_when_its_job_did(run):
    grown = []

    class Growing(Log):
        def new_lines(self, *most):
            grown.append(1)
            with self.path.open("a") as file:
                file.write("more\n")
            return super().new_lines(*most)

    log = Growing("0", run.rank_log(0))
    assert [line for _, line in follow(lambda: [], [log], lambda: True)][:5] == [f"line {n} of 0" for n in range(5)]
    assert len(grown) <= 2


def test_of_a_log_without_end_a_line_tells_that_there_is_more(run):
    os.truncate(run.rank_log(0), 1 << 40)
    *_, last = Log("0", run.rank_log(0)).rest(most_bytes=128 * 1024)
    assert last == f"… and {(1 << 40) - 128 * 1024} bytes more, which are in the file alone"
