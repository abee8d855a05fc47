"""What lies in a run directory is opened once, and never through a link, a pipe or another user's file."""

import os
import socket
import threading
from pathlib import Path

import another_user
import pytest

from hpcmm.files import names_in, open_checked, open_regular, read_json_object, read_tail, read_text
from hpcmm.jobs.logs import logs_of
from hpcmm.runs.attempts import attempts_of
from hpcmm.runs.exit_status import newest_outcome
from hpcmm.runs.metrics import progress_of, starts_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import job_ids_of, read_job_record

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "runs" / "demo-1")
    made.create()
    return made


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def listener(path: Path) -> None:
    here = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # the whole path may be too long for a socket
    os.close(here)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_file(path: Path) -> None:
    target = path.parent / "elsewhere"
    target.write_text('{"job_id": "12"}')
    path.symlink_to(target)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def another_user_s(path: Path) -> None:
    path.write_text('{"job_id": "12"}')
    another_user.give(path)


TRAPS = [pipe, folder, listener, link_to_zeros, link_to_a_file, link_to_itself, another_user_s]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_the_place_of_a_file_counts_as_absent(run, trap):
    trap(run.submission)
    with pytest.raises(OSError):
        open_regular(run.submission, within=run.root)
    with pytest.raises(OSError):
        read_text(run.submission)
    assert read_tail(run.submission, 100, within=run.root) == ""
    assert read_json_object(run.submission, within=run.root) == {}


@pytest.mark.parametrize("trap", TRAPS)
def test_whoever_reads_a_run_gets_past_a_trap(run, trap):
    for place in (run.submission, run.job_record, run.exit_status, run.attempts, run.rank_metrics(0), run.rank_log(0)):
        trap(place)
    assert job_ids_of(run) == ()
    assert read_job_record(run) is None
    assert newest_outcome(run) is None
    assert attempts_of(run) == []
    assert progress_of(run) == {}
    assert starts_of(run) == []
    assert [line for log in logs_of(run, None) for line in log.tail(5)] == []


def test_no_link_between_the_run_s_folder_and_the_file_is_followed(run, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "rank_0000.log").write_text("password\n")
    run.logs.rmdir()
    run.logs.symlink_to(tmp_path / "secrets")
    assert logs_of(run, None)[0].label == "batch"
    assert len(logs_of(run, None)) == 1
    assert read_tail(run.rank_log(0), 100, within=run.root) == ""
    assert names_in(run.logs, within=run.root) == []
    assert read_tail(tmp_path / "secrets" / "rank_0000.log", 100) == "password\n"


def test_the_run_s_own_folder_may_be_named_by_a_link(run):
    run.submission.write_text('{"job_id": "12"}')
    latest = run.root.parent / "latest"
    latest.symlink_to(run.root.name)
    assert job_ids_of(RunDir(latest)) == ("12",)


def test_a_file_that_does_not_lie_in_the_run_is_not_read(run, tmp_path):
    (tmp_path / "other").write_text("x")
    for path in (tmp_path / "other", run.root / ".." / ".." / "other"):
        with pytest.raises(OSError, match="does not lie in"):
            read_text(path, within=run.root)


def test_a_folder_of_another_user_between_is_not_entered(run):
    run.rank_log(0).write_text("theirs\n")
    another_user.give(run.logs)
    assert read_tail(run.rank_log(0), 100, within=run.root) == ""
    assert names_in(run.logs, within=run.root) == []


def test_another_user_s_run_is_read_as_theirs_and_says_who_wrote_it(run):
    run.submission.write_text('{"job_id": "12"}')
    assert open_checked(run.submission, within=run.root).writer is None
    another_user.give(run.root)
    assert job_ids_of(run) == ("12",)
    assert open_checked(run.submission, within=run.root).writer == run.root


@pytest.mark.parametrize("place", ["", "logs", "logs/batch.log"])
def test_who_else_could_have_written_is_told_of_each_folder_and_the_file(run, place):
    run.batch_log.write_text("x")
    assert open_checked(run.batch_log, within=run.root).writer is None
    (run.root / place).chmod(0o777)
    assert open_checked(run.batch_log, within=run.root).writer == run.root / place


def test_a_sparse_file_of_8_gb_is_not_read_whole(run):
    with run.rank_log(0).open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(ValueError, match="larger than"):
        read_text(run.rank_log(0))
    assert len(read_tail(run.rank_log(0), 1000)) == 1000


def test_a_file_that_grows_while_it_is_read_comes_to_an_end(run):
    path, over = run.rank_metrics(0), threading.Event()
    start = b'{"event": "start", "rank": 0, "node": "n", "pid": 1, "job_id": "1"}\n'
    path.write_bytes(start * 1000)

    def grow() -> None:
        with path.open("ab") as file:
            while not over.is_set() and file.tell() < 1 << 25:
                file.write(start * 100)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        assert [each.last.rank for each in starts_of(run)] == [0]
    finally:
        over.set()
        writer.join()


def test_of_a_folder_with_very_many_names_only_so_many_are_looked_at(tmp_path):
    for number in range(20):
        (tmp_path / str(number)).touch()
    assert len(names_in(tmp_path, most=5)) == 5


def test_of_very_many_job_numbers_the_newest_are_asked_for(run):
    for number in range(1, 1200):
        (run.submitit / f"{number}_submitted.pkl").touch()
    run.submission.write_text('{"job_id": "5000"}')
    assert len(job_ids_of(run)) == 1000
    another_user.give(run.root)
    assert len(job_ids_of(run)) == 5
