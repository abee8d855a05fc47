"""Reports of runs one after the other in one folder: one run is looked at, never ranks of both."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import coverage_line, gaps

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples" / "slow_data"
LATER_NS = 700_000_000_000
TABLES = ("NVTX_EVENTS", "OSRT_API")


def edit(report: Path, *statements: str) -> None:
    with sqlite3.connect(report) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def later(report: Path) -> None:
    """Make it of a run that was started later, whose processes are others."""
    ids = [f"UPDATE {table} SET globalTid = globalTid + (1000 << 24)" for table in TABLES]  # noqa: S608
    edit(report, f"UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + {LATER_NS}", *ids)  # noqa: S608


def forget_ranks(report: Path) -> None:
    edit(report, "DELETE FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'DeviceEnvironment'")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of four ranks each."""
    for rank in range(4):
        for run in ("a", "b"):
            shutil.copy(SAMPLES / f"rank_{rank:04d}.sqlite", tmp_path / f"{run}_{rank}.sqlite")
        later(tmp_path / f"b_{rank}.sqlite")
    return tmp_path


def used(analysis: Analysis) -> list[str]:
    coverage = analysis.coverage()
    return sorted(coverage.loc[coverage["status"] == "found", "report"])


def blamed(analysis: Analysis) -> float:
    return float(analysis.bottlenecks().iloc[0]["lost_s_per_step"])


@pytest.mark.parametrize("ranks", ["known", "unknown"])
def test_the_later_of_two_alike_is_looked_at_and_the_other_is_said(runs: Path, ranks: str, tmp_path: Path) -> None:
    if ranks == "unknown":
        for report in runs.iterdir():
            forget_ranks(report)
    alone = shutil.copytree(runs, tmp_path / "alone", ignore=shutil.ignore_patterns("a_*", "alone"))
    one, both = analyze(alone), analyze([*runs.glob("*.sqlite")])
    assert used(both) == used(one) == [f"b_{rank}.sqlite" for rank in range(4)]
    assert blamed(both) == blamed(one)
    looked_at = "looked at: b_0.sqlite, b_1.sqlite, b_2.sqlite, b_3.sqlite"
    told = coverage_line(both.study)
    assert told.startswith("4 of 4 ranks with steps (4 other run)")
    assert (
        all(name in told for name in used(both)) and "looked at: " in told if ranks == "unknown" else looked_at in told
    )
    ((who, _, reason),) = [gap for gap in gaps(both.coverage()) if gap[1] == "other run"]
    assert who == "a_0.sqlite and others"
    assert reason.startswith("4 processes: of another run, which ended 68")
    assert "s before the others began: give its reports alone" in reason


def test_ranks_of_both_are_never_mixed(runs: Path) -> None:
    """As the one with more steps of each rank would do."""
    edit(runs / "b_0.sqlite", 'DELETE FROM NVTX_EVENTS WHERE start > (SELECT MAX("end") * 3 / 4 FROM NVTX_EVENTS)')
    assert used(analyze(runs)) == [f"a_{rank}.sqlite" for rank in range(4)]


def test_the_run_with_the_most_processes_is_looked_at(runs: Path) -> None:
    (runs / "b_3.sqlite").unlink()
    analysis = analyze(runs)
    assert used(analysis) == [f"a_{rank}.sqlite" for rank in range(4)]
    assert set(analysis.coverage()["rank"].dropna()) == {0, 1, 2, 3}
    assert "after the others had ended and has fewer processes" in analysis.coverage()["reason"].str.cat()


def test_scripts_of_one_process_one_after_the_other_are_no_ranks_of_one(runs: Path) -> None:
    for report in runs.iterdir():
        if report.stem in {"a_0", "b_0"}:
            forget_ranks(report)
        else:
            report.unlink()
    analysis = analyze(runs)
    assert used(analysis) == ["b_0.sqlite"]
    assert coverage_line(analysis.study).startswith("1 of 1 ranks with steps")


def test_ranks_that_were_captured_at_different_times_are_still_of_one_run(runs: Path) -> None:
    for name in ("a_2", "a_3", "b_0", "b_1"):
        (runs / f"{name}.sqlite").unlink()
    assert used(analyze(runs)) == ["a_0.sqlite", "a_1.sqlite", "b_2.sqlite", "b_3.sqlite"]


def test_reports_that_tell_no_time_stay_duplicates(runs: Path) -> None:
    for report in runs.iterdir():
        edit(report, "DROP TABLE TARGET_INFO_SESSION_START_TIME")
    assert set(analyze(runs).coverage()["status"]) == {"found", "duplicate"}


def on_node(report: Path, node: str, shift_ns: int = 0) -> None:
    """Make it of another node, whose clock is fast by ``shift_ns``."""
    edit(
        report,
        f"UPDATE TARGET_INFO_SYSTEM_ENV SET value = '{node}' WHERE name = 'Hostname'",  # noqa: S608
        "UPDATE TARGET_INFO_SYSTEM_ENV SET value = replace(value, 'SLURMD_NODENAME', 'A') WHERE name LIKE 'Device%'",
        f"UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + {shift_ns}",  # noqa: S608
    )


@pytest.mark.parametrize("skew_ns", [LATER_NS, -LATER_NS, 3 * LATER_NS, LATER_NS // 2])
def test_nodes_whose_clocks_differ_by_more_than_the_pause_are_not_mixed(runs: Path, skew_ns: int) -> None:
    for report in runs.iterdir():
        on_node(report, "one" if report.stem[-1] in "01" else "two", skew_ns if report.stem[-1] in "01" else 0)
    assert used(analyze(runs)) == [f"b_{rank}.sqlite" for rank in range(4)]


def test_a_report_of_a_launcher_of_both_runs_joins_them_not(runs: Path) -> None:
    nanoseconds = 3 * LATER_NS
    shutil.copy(runs / "a_0.sqlite", runs / "launcher.sqlite")
    edit(
        runs / "launcher.sqlite",
        "DELETE FROM OSRT_API",
        f"UPDATE ANALYSIS_DETAILS SET duration = {nanoseconds}, stopTime = {nanoseconds}",  # noqa: S608
        "DELETE FROM NVTX_EVENTS WHERE rowid > (SELECT MIN(rowid) FROM NVTX_EVENTS WHERE eventType = 59)",
        f'UPDATE NVTX_EVENTS SET text = \'srun\', textId = NULL, domainId = 0, "end" = "end" + {2 * LATER_NS}',  # noqa: S608
        "DELETE FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'DeviceEnvironment'",
    )
    assert used(analyze(runs)) == [f"b_{rank}.sqlite" for rank in range(4)]


@pytest.mark.parametrize("unknown", ["a", "b"])
def test_runs_of_which_one_tells_its_ranks_are_two(runs: Path, unknown: str) -> None:
    for report in runs.glob(f"{unknown}_*.sqlite"):
        forget_ranks(report)
    for report in runs.iterdir():
        on_node(report, "one")
    assert used(analyze(runs)) == [f"b_{rank}.sqlite" for rank in range(4)]


@pytest.mark.parametrize("ranks", ["known", "unknown"])
def test_a_copy_of_a_report_is_no_further_rank(runs: Path, ranks: str) -> None:
    for report in runs.glob("b_*.sqlite"):
        report.unlink()
    if ranks == "unknown":
        for report in runs.iterdir():
            forget_ranks(report)
    before = blamed(analyze(runs))
    shutil.copy(runs / "a_2.sqlite", runs / "z_2.sqlite")
    analysis = analyze(runs)
    assert blamed(analysis) == before
    assert coverage_line(analysis.study) == "4 of 4 ranks with steps (1 duplicate)"
    assert "is a copy of a_2.sqlite" in set(analysis.coverage()["reason"])


def test_processes_of_one_number_whose_environments_differ_are_no_windows(runs: Path) -> None:
    """As those of containers: the first process of each is number 1."""
    for report in runs.glob("a_*.sqlite"):
        (runs / report.name.replace("a_", "b_")).unlink()
        later_one = Path(shutil.copy(report, runs / report.name.replace("a_", "b_")))
        edit(
            later_one,
            f"UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + {LATER_NS}",  # noqa: S608
            "UPDATE TARGET_INFO_SYSTEM_ENV SET value = value || char(10) || 'MASTER_PORT=2' WHERE name LIKE 'Device%'",
        )
    analysis = analyze(runs)
    assert used(analysis) == [f"b_{rank}.sqlite" for rank in range(4)]
    assert "windows" not in coverage_line(analysis.study)
