"""Several reports of one process, as --capture-range-end=repeat leaves them: windows of one rank, not duplicates."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analyze import analyze
from hpcmm.page.headlines import coverage_line

INPUTS = Path(__file__).parent / "inputs"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return shutil.copytree(INPUTS / "capture_repeat", tmp_path / "reports")


def edit(report: Path, statement: str) -> None:
    with sqlite3.connect(report) as connection:
        connection.execute(statement)
    connection.close()


def test_two_windows_are_one_rank_and_the_time_between_them_is_nobodys(reports: Path) -> None:
    analysis = analyze(reports)
    coverage = analysis.coverage()
    assert list(coverage["rank"]) == [0, 0]
    assert list(coverage["report"]) == ["report.1.sqlite", "report.2.sqlite"]
    assert "duplicate" not in set(coverage["status"])
    assert coverage_line(analysis.study).startswith("0 of 1 ranks")
    (gpu,) = analysis.gpu().to_dict("records")
    assert gpu["span_s"] == pytest.approx(0.989 + 0.997)
    assert gpu["compute_s"] + gpu["idle_s"] == pytest.approx(gpu["span_s"])
    assert analysis.bottlenecks().iloc[0]["lost_s_per_step"] < 1.0


def test_a_report_of_the_same_time_stays_a_duplicate(reports: Path) -> None:
    edit(reports / "report.2.sqlite", "UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs - 59500000000")
    assert "duplicate" in set(analyze(reports).coverage()["status"])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET globalPid = globalPid + (1 << 24)",
        "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT_VARIABLE', 'SLURM_JOB_ID=\"9\"')",
        "DROP TABLE TARGET_INFO_SESSION_START_TIME",
    ],
    ids=["process", "job", "time"],
)
def test_another_process_or_job_or_a_report_that_does_not_tell_its_time_is_no_window(
    reports: Path, statement: str
) -> None:
    edit(reports / "report.2.sqlite", statement)
    assert set(analyze(reports).coverage()["status"]) & {"duplicate", "wrong_job"}


def test_windows_of_a_process_whose_rank_nothing_tells_are_one(reports: Path) -> None:
    for number in (1, 2):
        edit(reports / f"report.{number}.sqlite", "DELETE FROM META_DATA_CAPTURE WHERE value LIKE 'RANK%'")
    assert list(analyze(reports).coverage()["rank"]) == [-1, -1]
