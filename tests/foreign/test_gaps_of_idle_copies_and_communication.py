"""Reports that hpcmm did not make: what GPUs wait for, what their copies are, and which kernels communicate."""

from pathlib import Path

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze

INPUTS = Path(__file__).parent / "inputs" / "gaps"


def first(analysis: Analysis) -> pd.Series:
    return analysis.bottlenecks().iloc[0]


def test_loading_after_a_synchronising_call_is_loading() -> None:
    run = analyze(INPUTS / "sync_then_loading")
    idle = run.idle()
    assert idle["idle_s"].sum() == pytest.approx(3.51, abs=0.001)
    assert idle.loc[idle["what"] == "read", "idle_s"].sum() == pytest.approx(3.12)
    assert idle.loc[idle["range"] == "data_loading", "idle_s"].sum() == pytest.approx(3.428, abs=0.001)
    assert idle.loc[idle["cause"] == "synchronising call", "idle_s"].sum() == pytest.approx(0.00039)
    assert run.gpu()["idle_sync_s"].sum() == pytest.approx(0.00039)
    row = first(run)
    assert row["cause"] == "GPU idle: the host loads data"
    assert row["lost_s_per_step"] == pytest.approx(3.428, abs=0.001)
    for told in ("3.12 s in read()", "3.43 s in data_loading", "0.00039 s of it is in calls that wait", "39 gaps"):
        assert told in row["evidence"]
    assert "num_workers" in row["suggestion"]
    advice = " ".join(run.bottlenecks()["suggestion"])
    assert ".item()" not in advice
    assert "micro-batch" not in advice


def test_a_call_that_really_waits_is_a_synchronising_one() -> None:
    run = analyze(INPUTS / "sync_control")
    assert run.gpu()["idle_sync_s"].sum() == pytest.approx(0.1995)
    row = first(run)
    assert row["cause"] == "GPU idle: the host waits for it first"
    assert row["lost_s_per_step"] == pytest.approx(0.1995)
    assert ".item()" in row["suggestion"]
    assert "cudaStreamSynchronize() is in 399 gaps" in row["evidence"]


def test_one_long_gap_before_the_loop_is_not_the_loops() -> None:
    run = analyze(INPUTS / "startup_gap")
    table = run.bottlenecks()
    assert list(table["cause"]) == ["one long GPU gap"]
    row = table.iloc[0]
    assert row["lost_s_per_step"] == pytest.approx(59.989, abs=0.001)
    assert "one gap of 60 s" in row["evidence"]
    assert "before range iteration 0" in row["evidence"]
    assert "without it GPUs are idle for 1.0% of the other 10 s" in row["evidence"]
    assert "micro-batch" not in row["suggestion"]
    rows = run.idle()
    once = rows[rows["scope"] == "once"]
    assert once["largest_gap_s"].to_numpy() == pytest.approx(59.989)
    assert set(once["gaps"]) == {1}


def test_copies_of_pinned_memory_need_no_pinned_memory() -> None:
    run = analyze(INPUTS / "offload_pinned")
    copies = run.copies().iloc[0]
    assert (copies["direction"], copies["memory"]) == ("host to device", "pinned")
    assert (copies["copies"], copies["bytes"], copies["large_copies"]) == (100, 22_500_000_000, 100)
    assert copies["bytes_per_s"] == pytest.approx(25e9)
    assert copies["exposed_s"] == pytest.approx(0.9)
    row = first(run)
    for told in ("host to device (pinned memory)", "22.5 GB at 25 GB/s", "offload"):
        assert told in row["evidence"]
    assert "pin_memory" not in row["suggestion"]
    assert "keep more on the GPU" in row["suggestion"]


def test_kernels_of_other_libraries_communicate() -> None:
    run = analyze(INPUTS / "custom_allreduce")
    gpu = run.gpu().iloc[0]
    assert gpu["comm_s"] == gpu["exposed_comm_s"] == pytest.approx(gpu["span_s"] / 2)
    assert run.collectives().empty
    kernels = run.kernels()
    assert kernels.set_index("name")["communication"].sum() == 7
    assert not kernels.loc[kernels["name"] == "gemm", "communication"].any()
    assert kernels["time_share"].sum() == pytest.approx(1.0)
    assert first(run)["step_share"] == pytest.approx(0.5)
    assert "cross_device_reduce_1stage" in first(run)["evidence"]


def test_communication_that_is_partly_hidden_loses_the_rest() -> None:
    run = analyze(INPUTS / "moderate_overlap")
    gpu = run.gpu()
    assert gpu["exposed_comm_s"].to_numpy() == pytest.approx(40 * 6e-3)
    assert first(run)["lost_s_per_step"] == pytest.approx(40 * 6e-3)
