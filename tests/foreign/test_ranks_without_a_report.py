"""What is said of communication if not all ranks that take part have a report, and of those that have none."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from changed_inputs import changed, first

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
    assert told["suggestion"].startswith("capture each rank: torchrun --no-python nsys profile -o report_%q{RANK} ")
    assert "accumulate" not in told["suggestion"]


@pytest.mark.parametrize(
    "environment",
    ["UPDATE META_DATA_CAPTURE SET value = 'SLURM_JOB_ID=9' WHERE value LIKE 'RANK=%'",
     "DELETE FROM META_DATA_CAPTURE WHERE name LIKE '%ENVIRONMENT_VARIABLE'"],
    ids=["a variable of Slurm", "no environment"],
)  # fmt: skip
def test_slurm_captures_each_rank_if_a_report_does_not_speak_against_it(reports: Path, environment: str) -> None:
    with sqlite3.connect(reports / "report.sqlite") as connection:
        assert connection.execute(environment).rowcount
    connection.close()
    assert "srun nsys profile -o report_%q{SLURM_PROCID}" in communication(analyze(reports))["suggestion"]


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


NOT_RECORDED = "DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL"


def test_a_rank_whose_communication_was_not_recorded_is_as_one_without_a_report(tmp_path: Path) -> None:
    """The others' kernels of 8 ms may wait for it; their mean is over them alone."""
    analysis = analyze(changed(tmp_path, "clocks_apart", NOT_RECORDED, only="rank2"))
    told = communication(analysis)
    assert told["cause"] == "communication, or waiting for ranks without a report"
    assert told["confidence"] == "low"
    assert "1 message a step and rank" in told["evidence"]
    assert "1 of 4 ranks have no communication in their reports (rank 2)" in told["evidence"]
    assert "data-parallel group" not in told["evidence"]
    assert "accumulate" not in told["suggestion"]
    table = analysis.bottlenecks().set_index("cause")["lost_s_per_step"]
    assert table[told["cause"]] == pytest.approx(0.0081, rel=0.02)
    run = analysis.efficiency().query("scope == 'run'").iloc[0]
    assert pd.isna(run["parallel_efficiency"]), "what that rank waits is not known"


def test_it_is_named_if_its_own_clock_tells_that_it_loads_longer(tmp_path: Path) -> None:
    analysis = analyze(changed(tmp_path, "clocks_apart", NOT_RECORDED, only="rank3"))
    assert first(analysis) == ("data loading", 3, "data", 0.0397)
    (rest,) = analysis.bottlenecks().query("cause.str.startswith('communication')").to_dict("records")
    assert rest["confidence"] == "low"
    assert rest["lost_s_per_step"] == pytest.approx(0.0079, rel=0.05), "without what is waited for rank 3"
    assert "0.0397 s a step of it is in rows of who is waited for" in rest["evidence"]


def test_captures_that_begin_at_different_iterations_tell_no_transfer_from_waiting(tmp_path: Path) -> None:
    """Without steps, as with them: the ranks' kernels are counted from different ones."""
    later = "DELETE FROM {} WHERE start < 400000000"
    for folder, steps in (("with", later.format("NVTX_EVENTS")), ("without", "DROP TABLE NVTX_EVENTS")):
        reports = changed(tmp_path / folder, "clocks_apart", steps)
        with closing(sqlite3.connect(reports / "rank0.sqlite")) as connection:
            connection.execute(later.format("CUPTI_ACTIVITY_KIND_KERNEL"))
            connection.execute(later.format("CUPTI_ACTIVITY_KIND_RUNTIME"))
            connection.commit()
        told = communication(analyze(reports))
        assert told["cause"] == "communication, transfer or waiting", folder
        assert told["confidence"] == "low"
        assert "100% of the operations could not be matched between ranks" in told["evidence"]
