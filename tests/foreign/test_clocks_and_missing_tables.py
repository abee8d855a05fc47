"""Who is waited for, if the clocks of the nodes are vague, the reports tell no time of day, or launches are missing."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from changed_inputs import changed

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import gpu_line


def analysis_of(folder: Path, source: str, *statements: str, only: str = "*") -> Analysis:
    return analyze(changed(folder, source, *statements, only=only))


def row_of(table: pd.DataFrame, cause: str) -> pd.Series:
    return table[table["cause"].str.startswith(cause)].iloc[0]


@pytest.mark.parametrize("ahead_ms", [0, 1, 30, 300])
def test_transfer_is_no_more_than_the_shortest_part_however_vague_the_clocks_are(tmp_path: Path, ahead_ms: int) -> None:
    """Rank 3 of the second node loads for 40 ms longer; the transfer itself takes 8 ms."""
    later = f"UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + {ahead_ms * 1_000_000}"  # noqa: S608
    table = analysis_of(tmp_path, "clocks_apart", later, only="rank[23]").bottlenecks()
    loading, transfer = row_of(table, "data loading"), row_of(table, "communication transfer")
    assert (loading["rank"], loading["phase"]) == (3, "data")
    assert loading["confidence"] in {"high", "medium"}
    assert transfer["lost_s_per_step"] == pytest.approx(0.008, rel=0.1)
    rest = table[table["cause"] == "imbalance without a culprit"]["lost_s_per_step"].sum()
    assert loading["lost_s_per_step"] + rest == pytest.approx(0.04, rel=0.15)
    assert set(table["rank"].dropna()) == {3}


NO_TIME_OF_DAY = (
    "UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = NULL",
    "DROP TABLE TARGET_INFO_SESSION_START_TIME",
)


@pytest.mark.few(2)
@pytest.mark.parametrize("statement", NO_TIME_OF_DAY)
@pytest.mark.parametrize("later_ms", [0, 5000])
def test_a_late_loader_is_named_by_each_rank_s_own_clock(tmp_path: Path, statement: str, later_ms: int) -> None:
    """Two reports of one node that do not tell when they began."""
    shifts = [
        f'UPDATE {table} SET start = start + {later_ms * 1_000_000}, "end" = "end" + {later_ms * 1_000_000}'  # noqa: S608
        for table in ("NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME")
    ]
    analysis_of(tmp_path, "steps_megatron_bridge", statement)
    folder = tmp_path / "steps_megatron_bridge"
    with closing(sqlite3.connect(folder / "rank1.sqlite")) as connection:
        for shift in shifts:
            connection.execute(shift)
        connection.commit()
    first = analyze(folder).bottlenecks().iloc[0]
    assert (first["cause"], first["rank"], first["confidence"]) == ("data loading", 1, "medium")
    assert first["lost_s_per_step"] == pytest.approx(0.04, rel=0.05)
    assert "does not tell who waits" in first["evidence"]


NO_LAUNCHES = (
    "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME",
    "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET correlationId = correlationId + 9999999",
)


@pytest.mark.parametrize("statement", NO_LAUNCHES, ids=["no table", "other numbers"])
def test_a_late_loader_is_named_though_launches_were_not_traced(tmp_path: Path, statement: str) -> None:
    analysis = analysis_of(tmp_path, "steps_megatron_bridge", statement)
    table = analysis.bottlenecks()
    first = table.iloc[0]
    assert (first["cause"], first["rank"], first["phase"]) == ("data loading", 1, "data")
    assert first["lost_s_per_step"] == pytest.approx(0.04, rel=0.05)
    assert row_of(table, "communication transfer")["lost_s_per_step"] == pytest.approx(0.006, rel=0.05)
    assert not table["evidence"].str.contains("launched in time").any()
    assert not (table["cause"] == "GPU idle between kernels").any()
    assert "the calls that launched its work are not in the report" in gpu_line(analysis.study)


def test_of_idle_time_without_launches_it_is_said_that_nothing_tells_the_cause(tmp_path: Path) -> None:
    none = "UPDATE NVTX_EVENTS SET text = 'forward' WHERE text = 'data'"
    table = analysis_of(tmp_path, "steps_megatron_bridge", NO_LAUNCHES[0], none).bottlenecks()
    idle = table[table["cause"].str.startswith("GPU idle")]
    assert set(idle["cause"]) <= {"GPU idle"}
    assert not table["evidence"].str.contains("launched in time").any()


LONGER = "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = start - 38000000 WHERE correlationId % 4 = 1"


@pytest.mark.parametrize(
    ("more", "cause", "phase"), [("SELECT 1", "data loading", "data"), (LONGER, "computation", "")]
)
def test_ranks_are_compared_by_what_all_have_if_launches_of_one_are_missing(
    tmp_path: Path, more: str, cause: str, phase: str
) -> None:
    """Rank 3 loads, or its GPU computes, for 40 ms longer; nothing tells which phase launched that."""
    table = analysis_of(tmp_path, "clocks_apart", more, NO_LAUNCHES[0], only="rank3").bottlenecks()
    first, (_, transfer) = table.iloc[0], *table[table["cause"].str.startswith("communication")].iterrows()
    assert (first["cause"], first["rank"], first["phase"], first["confidence"]) == (cause, 3, phase, "low")
    assert first["lost_s_per_step"] == pytest.approx(0.04, rel=0.06)
    assert "the calls that launched work of GPUs were not recorded on rank 3" in first["evidence"]
    assert transfer["phase"] == "backward", "in which the other ranks launch it"


def test_a_rank_that_lost_most_of_its_steps_is_no_idle_one(tmp_path: Path) -> None:
    whole = analyze(changed(tmp_path / "whole", "clocks_apart"))
    lost = "DELETE FROM NVTX_EVENTS WHERE start > 400000000"
    analysis = analysis_of(tmp_path, "clocks_apart", lost, only="rank1")
    assert analysis.study.steps.left_out == (1,)
    run = analysis.efficiency().query("scope == 'run'").iloc[0]
    inside = whole.phases().query("rank != 1 and not warmup and step.notna()")
    useful = inside.groupby("rank")["useful_s"].sum()
    assert run["load_balance"] == pytest.approx(useful.mean() / useful.max(), rel=0.01)
    transfer = row_of(analysis.bottlenecks(), "communication transfer")
    assert transfer["lost_s_per_step"] == pytest.approx(0.0081, rel=0.02)
    assert "1 message a step and rank" in transfer["evidence"]
