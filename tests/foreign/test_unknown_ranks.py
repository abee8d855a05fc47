"""A process whose rank nothing tells is called by its process id, wherever it is named."""

import gzip
import shutil
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from hpcmm.analyze import analyze
from hpcmm.page.headlines import rank_list, rank_name
from hpcmm.page.terminal import print_study

INPUTS = Path(__file__).parent / "inputs"
OUTPUTS = ("report.html", "summary.md", "trace.json.gz")


def all_that_is_written(folder: Path) -> str:
    texts = [gzip.decompress(each) if each[:2] == b"\x1f\x8b" else each for each in map(read(folder), OUTPUTS)]
    return b"\n".join(texts).decode()


def read(folder: Path):
    return lambda name: (folder / name).read_bytes()


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return shutil.copytree(INPUTS / "mpirun_no_rank", tmp_path / "reports")


def test_the_late_process_is_named_by_its_id(reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = analyze(reports, tmp_path / "out")
    print_study(analysis.study, tmp_path / "out", Console(width=200, highlight=False))
    for told in (capsys.readouterr().out, all_that_is_written(tmp_path / "out")):
        assert "GPU 0 of process 501" in told
        for made_up in ("process 1 ", "process 2 ", "process 1<", "process 2<", "rank -1", "rank -2"):
            assert made_up not in told
    assert analysis.study.names == {-2: "GPU 0 of process 501", -1: "GPU 0 of process 500"}


def test_of_two_processes_with_one_number_the_report_is_named_too(reports: Path) -> None:
    with sqlite3.connect(reports / "report2.sqlite") as connection:
        for table, column in (
            ("CUPTI_ACTIVITY_KIND_KERNEL", "globalPid"),
            ("CUPTI_ACTIVITY_KIND_RUNTIME", "globalTid"),
        ):
            connection.execute(f"UPDATE {table} SET {column} = {column} - (1 << 24)")  # noqa: S608 -- names of tables
    connection.close()
    names = analyze(reports).study.names
    assert sorted(names.values()) == [
        "GPU 0 of process 500 of report1.sqlite",
        "GPU 0 of process 500 of report2.sqlite",
    ]


def test_a_made_up_number_is_no_name() -> None:
    names = {-1: "process 500 (rank unknown)"}
    assert rank_name(-1, "node1", names) == "process 500 (rank unknown) · node1"
    assert rank_name(-1) == "a process of unknown rank"
    assert rank_list([3, 0, 1, -1], names) == "0-1, 3, process 500 (rank unknown)"
