"""Which processes of a report that hpcmm did not make train: recorded with torchrun, and variations of it."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analysis.extraction import workers_of
from hpcmm.analyze import analyze
from hpcmm.page.headlines import headline
from hpcmm.reports.events import read_report

INPUTS = Path(__file__).parent / "inputs"
FIRST, SECOND = 28273, 28274
GLOO = "DELETE FROM ThreadNames WHERE nameId IN (SELECT id FROM StringIds WHERE value LIKE '%gloo%')"
RANGES = "DELETE FROM NVTX_EVENTS"


def changed(tmp_path: Path, *statements: str) -> Path:
    report = tmp_path / "report.sqlite"
    shutil.copy(INPUTS / "cpu_torchrun_plain" / "report.sqlite", report)
    with sqlite3.connect(report) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return report


@pytest.mark.parametrize(
    "statements", [(), (RANGES,), (GLOO,), (RANGES, GLOO)], ids=["all", "threads", "ranges", "OS calls"]
)
def test_each_worker_of_torchrun_is_a_trace_and_its_launcher_is_none(
    tmp_path: Path, statements: tuple[str, ...]
) -> None:
    analysis = analyze(changed(tmp_path, *statements))
    calls = analysis.osrt().groupby(["rank", "role"])["calls"].sum()
    assert [trace.pid for trace in analysis.study.traces] == [SECOND, FIRST]
    assert calls.to_dict() == {(-1, "worker"): 9871, (-1, "launcher"): 4878, (-2, "worker"): 9918}
    assert list(analysis.coverage()["rank"]) == [-2, -1]


def test_the_reason_for_no_steps_is_of_no_process_but_its_row_is(tmp_path: Path) -> None:
    loop = "SELECT id FROM StringIds WHERE value LIKE 'iteration%' OR value IN ('data', 'backward', 'optimizer')"
    no_steps = f"DELETE FROM NVTX_EVENTS WHERE textId IN ({loop})"  # noqa: S608
    analysis = analyze(changed(tmp_path, no_steps, "DELETE FROM OSRT_API"))
    reasons = list(analysis.coverage()["reason"])
    assert [reason.partition(":")[0] for reason in reasons] == ["process 28274", "process 28273"]
    assert "process" not in headline(analysis.study)


def test_a_process_with_a_range_or_two_of_its_own_is_no_worker(tmp_path: Path) -> None:
    range_of_launcher = """
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        VALUES (1000000, 8000000000, 59, 'all', 28223 << 24 | 28223, 0)
    """
    report = changed(tmp_path, GLOO, range_of_launcher)
    assert workers_of(read_report(report, report)) == [FIRST, SECOND]


def test_a_loader_that_writes_ranges_is_no_worker(tmp_path: Path) -> None:
    report = changed(
        tmp_path,
        GLOO,
        "UPDATE PROCESSES SET name = 'pt_data_worker' WHERE pid = 28274",
        "DELETE FROM ThreadNames WHERE globalTid & 0xFFFFFF = 28274",
    )
    assert workers_of(read_report(report, report)) == [FIRST]
