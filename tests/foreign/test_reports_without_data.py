"""Reports that cannot be read, beside others that can: how many ranks there are, and which of them has no data."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.html import coverage_grid
from hpcmm.page.terminal import print_study

INPUTS = Path(__file__).parent / "inputs"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return shutil.copytree(INPUTS / "empty_beside_good", tmp_path / "reports")


def rows(analysis: Analysis) -> list[tuple[int | None, str, str]]:
    table = analysis.coverage().astype({"rank": object})
    table["rank"] = table["rank"].where(table["rank"].notna(), None)
    return list(table[["rank", "status", "report"]].itertuples(index=False, name=None))


def world_size(report: Path, size: int) -> None:
    with sqlite3.connect(report) as connection:
        connection.execute(
            "UPDATE META_DATA_CAPTURE SET value = ? WHERE value LIKE 'WORLD_SIZE%'", (f'WORLD_SIZE="{size}"',)
        )
    connection.close()


def test_an_empty_report_has_the_rank_that_another_file_s_name_confirms(reports: Path) -> None:
    assert rows(analyze(reports)) == [(0, "truncated", "rank_0000.nsys-rep"), (1, "no_nvtx", "rank_0001.sqlite")]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["other.nsys-rep", "rank0000.nsys-rep", "rank_0000_b.nsys-rep", "rank_0001_0.nsys-rep"]
)
def test_a_name_of_another_kind_tells_no_rank(reports: Path, name: str) -> None:
    (reports / "rank_0000.nsys-rep").rename(reports / name)
    assert rows(analyze(reports)) == [(1, "no_nvtx", "rank_0001.sqlite"), (None, "truncated", name)]


def test_a_report_of_a_newer_nsys_is_not_damaged(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nsys = reports.parent / "bin" / "nsys"
    nsys.parent.mkdir()
    nsys.write_text("#!/bin/sh\necho 'Exportation error: Version not supported: 2'\nexit 1\n")
    nsys.chmod(0o700)
    monkeypatch.setenv("PATH", str(nsys.parent), prepend=":")
    (reports / "rank_0000.nsys-rep").write_bytes(b"x")
    analysis = analyze(reports)
    assert rows(analysis) == [(0, "newer_nsys", "rank_0000.nsys-rep"), (1, "no_nvtx", "rank_0001.sqlite")]
    assert "was recorded by a newer nsys than here" in analysis.coverage()["reason"].iloc[0]
    assert not analysis.complete


def test_a_name_that_is_wrong_of_a_readable_report_tells_nothing_of_another(reports: Path) -> None:
    (reports / "rank_0001.sqlite").rename(reports / "rank_0007.sqlite")
    assert rows(analyze(reports)) == [
        (1, "no_nvtx", "rank_0007.sqlite"),
        (None, "truncated", "rank_0000.nsys-rep"),
    ]


def test_there_are_no_more_rows_than_ranks(reports: Path) -> None:
    (reports / "rank_0000.nsys-rep").rename(reports / "other.nsys-rep")
    world_size(reports / "rank_0001.sqlite", 4)
    found = rows(analyze(reports))
    assert len(found) == 4
    assert sorted(row[1] for row in found) == ["missing", "missing", "no_nvtx", "truncated"]
    assert {row[0] for row in found[1:]} == {None}


def test_ranks_of_which_the_same_is_said_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = analyze(INPUTS / "one_rank_of_8")
    print_study(analysis.study, tmp_path, Console(width=200, highlight=False))
    printed = capsys.readouterr().out
    assert printed.count("missing: the other reports") == 1
    assert "ranks 1-7: missing: the other reports are of a job of 8 ranks or more" in printed
    grid = coverage_grid(analysis.study)
    assert [who for who, status, _ in grid.troubles if status == "missing"] == ["ranks 1-7"]
    assert len(grid.tiles) == 8


def test_a_gpu_that_does_nothing_but_set_memory_loses_nothing(tmp_path: Path) -> None:
    copy = shutil.copytree(INPUTS / "sync_then_loading", tmp_path / "reports")
    for report in copy.glob("*.sqlite"):
        with sqlite3.connect(report) as connection:
            connection.execute("DELETE FROM NVTX_EVENTS")
            connection.execute(
                "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET AS SELECT start, end, deviceId, contextId, streamId, "
                "correlationId, globalPid, 0 AS value, 100 AS bytes FROM CUPTI_ACTIVITY_KIND_KERNEL LIMIT 1"
            )
            for table in ("KERNEL", "MEMCPY", "GRAPH_TRACE"):
                connection.execute(f"DROP TABLE IF EXISTS CUPTI_ACTIVITY_KIND_{table}")
        connection.close()
    analysis = analyze(copy)
    assert len(analysis.gpu()) == 1
    assert analysis.bottlenecks().empty
