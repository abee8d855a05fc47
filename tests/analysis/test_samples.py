"""The recorded runs, end to end: the right verdict, the promised columns, sums that hold."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze
from hpcmm.analyze.__main__ import main
from hpcmm.page.headlines import steps_line

DRIFT = 'start = start - start * 13 / 1000000, "end" = "end" - "end" * 13 / 1000000'

COLUMNS = {
    "coverage": {"rank", "node", "status", "events", "span_s", "nsys_version", "reason", "report"},
    "osrt": {
        "rank",
        "role",
        "thread_role",
        "function",
        "calls",
        "total_s",
        "union_s",
        "in_step_s",
        "p50_s",
        "p95_s",
        "max_s",
    },
    "waitpid": {"rank", "role", "step", "phase", "start_s", "duration_s", "verdict"},
    "phases": {"rank", "node", "step", "phase", "duration_s", "comm_s", "useful_s", "warmup"},
    "collectives": {
        "op",
        "group",
        "sequence",
        "rank",
        "start_s",
        "duration_s",
        "wait_s",
        "transfer_s",
        "bytes",
        "late_rank",
    },
    "comm_wait": {"rank", "phase", "wait_s_per_step", "transfer_s_per_step", "waited_for_rank", "step_share"},
    "bottlenecks": {"rank_order", "cause", "lost_s_per_step", "step_share", "rank", "node", "phase", "suggestion"},
}


@pytest.fixture(scope="module")
def slow_data(tmp_path_factory) -> Analysis:
    samples = Path(__file__).parents[2] / "profiles" / "samples"
    return analyze([samples / "slow_data"], tmp_path_factory.mktemp("slow_data"))


def test_the_slow_loader_is_the_first_row(slow_data: Analysis) -> None:
    first = slow_data.tables["bottlenecks"].iloc[0]
    assert (first["rank"], first["node"], first["phase"], first["confidence"]) == (2, "node2", "data", "high")
    assert first["cause"] == "data loading"
    assert first["lost_s_per_step"] == pytest.approx(0.06, rel=0.25)
    assert "clock_nanosleep" in first["evidence"]
    assert "num_workers=N" in first["suggestion"]


def test_the_slow_link_is_transfer_and_nobodys_fault(samples: Path, tmp_path: Path) -> None:
    table = analyze([samples / "slow_link"], tmp_path).tables["bottlenecks"]
    assert table.iloc[0]["cause"].startswith("communication transfer")
    assert table.iloc[0]["step_share"] > 0.7
    assert table["rank"].isna().all()


def test_the_clean_run_blames_nobody(samples: Path, tmp_path: Path) -> None:
    table = analyze([samples / "clean"], tmp_path).tables["bottlenecks"]
    assert table["rank"].isna().all()
    assert (table["node"] == "").all()


@pytest.mark.parametrize("offset_ns", [4_100_000, -250_000_000])
def test_a_shifted_clock_changes_no_verdict(samples: Path, tmp_path: Path, offset_ns: int) -> None:
    shifted = tmp_path / "shifted"
    shutil.copytree(samples / "slow_data", shifted)
    for rank in (2, 3):
        with sqlite3.connect(shifted / f"rank_{rank:04d}.sqlite") as connection:
            connection.execute("UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + ?", (offset_ns,))
            connection.execute(f"UPDATE NVTX_EVENTS SET {DRIFT}")  # noqa: S608
            connection.execute(f"UPDATE OSRT_API SET {DRIFT}")  # noqa: S608
        connection.close()
    analysis = analyze([shifted], tmp_path / "out")
    first = analysis.tables["bottlenecks"].iloc[0]
    assert (first["rank"], first["phase"]) == (2, "data")
    assert first["lost_s_per_step"] == pytest.approx(0.0506, rel=0.05)
    clock = analysis.tables["clock"].set_index("node")
    assert clock.loc["node2", "offset_s"] == pytest.approx(offset_ns / 1e9, abs=0.001)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [("-int64Value", "29 of its 30 steps carry no number, and are left out"), ("int64Value + 1000", "")],
)
def test_a_rank_whose_steps_are_numbered_wrong_is_left_out_and_it_is_said(
    samples: Path, tmp_path: Path, numbers: str, told: str
) -> None:
    shutil.copytree(samples / "slow_data", tmp_path / "run")
    connection = sqlite3.connect(tmp_path / "run" / "rank_0001.sqlite")
    connection.execute(
        f"UPDATE NVTX_EVENTS SET int64Value = {numbers} WHERE textId = (SELECT id FROM StringIds WHERE value = 'step')"  # noqa: S608
    )
    connection.commit()
    connection.close()
    run = analyze(tmp_path / "run")
    first = run.bottlenecks().iloc[0]
    assert (first["cause"], first["rank"]) == ("data loading", 2)
    assert run.coverage().set_index("rank").loc[1, "reason"] == told
    assert "without rank 1, which lacks most of them" in steps_line(run.study)


@pytest.mark.parametrize("name", COLUMNS)
def test_the_files_have_the_promised_columns(slow_data: Analysis, name: str) -> None:
    table = pd.read_csv(slow_data.out / f"{name}.csv")
    assert set(table.columns) >= COLUMNS[name]
    assert len(table)


def test_phases_add_up_to_the_step(slow_data: Analysis) -> None:
    phases = slow_data.tables["phases"].dropna(subset="step").astype({"step": int})
    steps = slow_data.tables["steps"].set_index(["rank", "step"])["duration_s"]
    summed = phases.groupby(["rank", "step"])["duration_s"].sum()
    pd.testing.assert_series_equal(summed.sort_index(), steps.sort_index(), check_names=False)
    assert (phases["useful_s"] >= -1e-9).all()


def test_every_collective_is_complete_and_split(slow_data: Analysis) -> None:
    table = slow_data.tables["collectives"]
    assert table["complete"].all()
    assert (table.groupby(["op", "group", "sequence"]).size() == 4).all()
    assert (table["wait_s"] + table["transfer_s"]).to_numpy() == pytest.approx(table["duration_s"].to_numpy())
    assert (table["wait_b_s"] <= table["duration_s"] + 1e-12).all()


def test_time_begins_with_the_first_event_of_the_run(slow_data: Analysis) -> None:
    assert 0 < slow_data.tables["steps"]["start_s"].min() < 60


def test_the_probing_before_the_first_step_is_an_op_build(slow_data: Analysis) -> None:
    waits = slow_data.tables["waitpid"]
    assert set(waits["verdict"]) == {"op build"}
    assert waits["step"].isna().all()


def test_the_inputs_are_not_touched(samples: Path, tmp_path: Path) -> None:
    copy = tmp_path / "reports"
    shutil.copytree(samples / "clean", copy)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in copy.iterdir()}
    analyze([copy], tmp_path / "out")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in copy.iterdir()} == before


def test_the_command_line(samples: Path, tmp_path: Path, capsys) -> None:
    assert main([str(samples / "slow_data"), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Rank 2 on node2 costs ")
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"
    assert any("num_workers=N" in line for line in lines)


def test_a_path_that_is_not_there_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.startswith("hpcmm.analyze: ")


def test_the_analysis_needs_no_torch_and_no_scheduler() -> None:
    code = "import sys, hpcmm.analyze; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "deepspeed", "transformers", "submitit", "hydra", "plotly"} & set(modules)
