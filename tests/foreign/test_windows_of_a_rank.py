"""Several reports of one process, as --capture-range-end=repeat leaves them: windows of one rank, not duplicates."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analyze import Choice, analyze
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
    assert set(analyze(reports).coverage()["status"]) & {"duplicate", "wrong_job", "other_run"}


def test_windows_of_a_process_whose_rank_nothing_tells_are_one(reports: Path) -> None:
    for number in (1, 2):
        edit(reports / f"report.{number}.sqlite", "DELETE FROM META_DATA_CAPTURE WHERE value LIKE 'RANK%'")
    assert list(analyze(reports).coverage()["rank"]) == [-1, -1]


RANGES = """
    CREATE TABLE NVTX_EVENTS
    (start INTEGER, "end" INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER, domainId INTEGER)
"""
STEPS = """
    INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 3)
    SELECT first + i * length / 4, first + (i + 1) * length / 4 - 1000, 59, 'step ' || (i + {first}), thread, 0
    FROM n, (SELECT MIN(start) AS first, MAX("end") - MIN(start) AS length, MIN(globalTid) AS thread
             FROM CUPTI_ACTIVITY_KIND_RUNTIME)
"""
"""Four steps that cover a window."""


def name_steps(report: Path, first: int) -> None:
    edit(report, RANGES)
    edit(report, STEPS.format(first=first))


@pytest.mark.parametrize("first", [0, 10], ids=["counting again", "counting on"])
def test_the_first_step_of_the_first_window_alone_is_warm_up(reports: Path, first: int) -> None:
    for number, begin in ((1, 0), (2, first)):
        name_steps(reports / f"report.{number}.sqlite", begin)
    analysis = analyze(reports)
    steps = analysis.steps()
    assert list(steps["warmup"]) == [True] + [False] * 7
    assert len(analysis.study.steps.numbers) == 7
    gpu, idle = analysis.gpu(), analysis.idle()
    for scope, chosen in (("warmup", gpu["warmup"]), ("steps", gpu["step"].notna() & ~gpu["warmup"])):
        assert idle.loc[idle["scope"] == scope, "idle_s"].sum() == pytest.approx(gpu.loc[chosen, "idle_s"].sum())
    keys = ["device", "scope", "cause", "what", "range", "loading"]
    assert not idle.duplicated(keys).any()


def test_a_later_window_alone_is_warm(reports: Path) -> None:
    for number in (1, 2):
        name_steps(reports / f"report.{number}.sqlite", 0)
    steps = analyze(reports, choice=Choice(from_s=30.0)).steps()
    assert list(steps["warmup"]) == [False] * 4


def test_that_several_windows_were_read_is_said(reports: Path) -> None:
    told = coverage_line(analyze(reports).study)
    assert told.endswith("; 2 reports of rank 0 are windows of one capture, read together")
    (reports / "report.2.sqlite").unlink()
    assert "windows" not in coverage_line(analyze(reports).study)
