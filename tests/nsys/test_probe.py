"""What is said of an nsys that does not record, whatever it does instead."""

import sqlite3

import pytest

from hpcmm.nsys.probe import nsys_problem

TEXTS = {
    "in the table": "CREATE TABLE NVTX_EVENTS (text); INSERT INTO NVTX_EVENTS VALUES ('hpcmm probe');",
    "as shared strings": (
        "CREATE TABLE NVTX_EVENTS (text, textId); INSERT INTO NVTX_EVENTS VALUES (NULL, 3);"
        "CREATE TABLE StringIds (id, value); INSERT INTO StringIds VALUES (3, 'hpcmm probe');"
    ),
}


def fake_nsys(folder, profile, export):
    """An nsys whose two commands are these lines of shell; ``$report`` and ``$table`` are where its files belong."""
    nsys = folder / "nsys"
    nsys.write_text(
        "#!/bin/sh\nfor word; do case $word in --output=*) output=${word#--output=};; esac; done\n"
        f"report=$output.nsys-rep table=$output\ncase $1 in profile) {profile};; export) {export};; esac\n"
    )
    nsys.chmod(0o755)
    return str(nsys)


@pytest.mark.parametrize("where", TEXTS)
def test_a_range_is_found_wherever_its_text_stands(tmp_path, where):
    with sqlite3.connect(tmp_path / "table") as database:
        database.executescript(TEXTS[where])
    assert nsys_problem(fake_nsys(tmp_path, "touch $report", f"cp {tmp_path}/table $table")) is None


@pytest.mark.parametrize(
    ("profile", "export", "problem"),
    [
        ("echo Bus error", "", "nsys left no report (Bus error)"),
        ("", "", "nsys left no report (it said nothing)"),
        ("touch $report", "echo no such type", "nsys exports no SQLite (no such type)"),
        ("touch $report", "echo garbage, not a database > $table", "a capture of one range failed (file is not a "),
        ("touch $report; exit 1", "sqlite3", "nsys exports no SQLite ("),
    ],
)
def test_each_way_to_fail_has_its_sentence(tmp_path, profile, export, problem):
    assert problem in (nsys_problem(fake_nsys(tmp_path, profile or ":", export or ":")) or "")


def test_a_capture_without_ranges_names_the_package(tmp_path):
    sqlite3.connect(tmp_path / "table").execute("CREATE TABLE OTHER (x)").connection.commit()
    problem = nsys_problem(fake_nsys(tmp_path, "touch $report", f"cp {tmp_path}/table $table"))
    assert "it records nothing of nvtx" in problem


@pytest.mark.nsys
def test_the_installed_nsys_has_no_problem_and_says_nothing_aloud(nsys, capfd):
    assert nsys_problem(nsys) is None
    assert capfd.readouterr() == ("", "")


def test_an_nsys_that_cannot_be_started_is_a_problem_and_no_traceback(tmp_path):
    assert "No such file" in nsys_problem(str(tmp_path / "nowhere"))
