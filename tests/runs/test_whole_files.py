"""A file under its final name is whole, and what stood there before stays until then."""

import os

import pytest

from hpcmm.files import read_json_object, read_tail, read_text, write_json, write_whole
from hpcmm.runs.metrics import finished_step, read_scores, write_scores
from hpcmm.runs.run_dir import RunDir


def broken(file):
    file.write(b"half")
    raise OSError("full")


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="full"):
        write_whole(path, broken)
    assert read_json_object(path) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


def test_the_umask_rules_unless_permissions_are_given(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", "x")
        write_whole(tmp_path / "b", "x", mode=0o600)
        write_whole(tmp_path / "c", "x", mode=0o644)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "abc"] == [0o640, 0o600, 0o644]


def test_a_file_that_is_too_large_is_not_read_but_its_end_can_be(tmp_path):
    (tmp_path / "a").write_text("x" * 99 + "y")
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        read_text(tmp_path / "a", 50)
    assert read_tail(tmp_path / "a", 2) == "xy"
    assert read_tail(tmp_path / "none", 2) == ""
    assert read_tail(tmp_path, 2) == ""


def test_scores_come_back_as_they_were_without_what_is_none(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    assert read_scores(run) == {}
    write_scores(run, {"image_auroc_after": 0.5})
    assert read_scores(run) == {"image_auroc_after": 0.5}
    run.evaluation.write_text('{"a": 0.25, "b": "x", "c": null, "d": [1]}')
    assert read_scores(run) == {"a": 0.25}


@pytest.mark.parametrize(
    "line", ["", "[]", '{"event": "start"}', '{"event": "step", "step": 1}', '{"event": "step", "step": [], "loss": 1}']
)
def test_a_line_that_is_no_step_s_is_passed_over(line):
    assert finished_step(line) is None
