"""What is said of communication if not all ranks that take part have a report, and of those that have none."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analysis.process_groups import Unseen
from hpcmm.analyze import Analysis, analyze

INPUTS = Path(__file__).parent / "inputs"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return shutil.copytree(INPUTS / "one_rank_of_8", tmp_path / "reports")


def communication(analysis: Analysis) -> dict[str, str]:
    (row,) = analysis.bottlenecks().query("cause.str.startswith('communication')").to_dict("records")
    return {name: str(row[name]) for name in ("cause", "confidence", "evidence", "suggestion")}


def test_one_rank_of_eight_tells_no_transfer_from_waiting(reports: Path) -> None:
    told = communication(analyze(reports))
    assert told["cause"] == "communication, or waiting for ranks without a report"
    assert told["confidence"] == "low"
    assert "7 of 8 ranks have no report" in told["evidence"]
    assert "srun nsys profile -o report_%q{SLURM_PROCID}" in told["suggestion"]
    assert "accumulate" not in told["suggestion"]


def test_nor_does_a_report_that_does_not_say_how_many_ranks_there_are(reports: Path) -> None:
    with sqlite3.connect(reports / "report.sqlite") as connection:
        connection.execute("DELETE FROM META_DATA_CAPTURE WHERE value LIKE 'WORLD_SIZE=%'")
    connection.close()
    told = communication(analyze(reports))
    assert told["confidence"] == "low"
    assert "the others of its communicator have no report" in told["evidence"]


def test_ranks_of_a_communicator_that_no_report_shows_are_counted(tmp_path: Path) -> None:
    reports = shutil.copytree(INPUTS / "nccl_init_rank", tmp_path / "reports")
    for name in ("p0", "p1"):
        with sqlite3.connect(reports / f"{name}.sqlite") as connection:
            (text,) = connection.execute("SELECT jsonText FROM NVTX_EVENTS WHERE text = 'ncclCommInitRank'").fetchone()
            told = json.dumps(json.loads(text) | {"No. of ranks": 4})
            connection.execute("UPDATE NVTX_EVENTS SET jsonText = ? WHERE text = 'ncclCommInitRank'", (told,))
        connection.close()
    told = communication(analyze(reports))
    assert told["confidence"] == "low"
    assert "2 of 4 ranks" in told["evidence"]


def test_with_all_ranks_there_it_is_transfer() -> None:
    told = communication(analyze(INPUTS / "nccl_init_rank"))
    assert told["cause"].startswith("communication transfer")


def test_those_unseen_are_named_by_what_they_are_of() -> None:
    assert str(Unseen(7, 8)) == "7 of 8 ranks"
    assert str(Unseen(1, 0)) == "the others of its communicator"
