"""Reports that hpcmm did not make: what GPUs wait for, what their copies are, and which kernels communicate."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze

INPUTS = Path(__file__).parent / "inputs"


def first(analysis: Analysis) -> pd.Series:
    return analysis.bottlenecks().iloc[0]


NO_STEPS = "DELETE FROM NVTX_EVENTS WHERE text LIKE 'iteration%'"


def test_loading_after_a_synchronising_call_is_loading(tmp_path: Path) -> None:
    run = changed(tmp_path, "sync_then_loading", NO_STEPS)
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


def test_loading_in_steps_is_told_with_its_calls() -> None:
    row = first(analyze(INPUTS / "sync_then_loading"))
    assert (row["cause"], row["phase"]) == ("data loading on all ranks", "data_loading")
    assert "the host is in read() for 0.08 s of it" in row["evidence"]


def test_one_long_gap_before_the_loop_is_not_the_loops(tmp_path: Path) -> None:
    run = changed(tmp_path, "startup_gap", "UPDATE NVTX_EVENTS SET text = replace(text, 'iteration', 'epoch')")
    table = run.bottlenecks()
    assert list(table["cause"]) == ["one long GPU gap"]
    row = table.iloc[0]
    assert row["lost_s_per_step"] == pytest.approx(59.989, abs=0.001)
    assert "one gap of 60 s" in row["evidence"]
    assert "before range epoch 0;" in row["evidence"]
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


THREAD = 281476654432356
"""globalTid of the thread that launches."""


def changed(tmp_path: Path, report: str, *statements: str) -> Analysis:
    """The analysis of a report that some statements of SQL have changed."""
    path = tmp_path / "report.sqlite"
    shutil.copyfile(INPUTS / report / "report.sqlite", path)
    path.chmod(0o600)
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return analyze(path)


@pytest.mark.parametrize(
    ("statements", "cause", "advice"),
    [
        (
            ["UPDATE StringIds SET value = 'pread64' WHERE value = 'read'", "DELETE FROM NVTX_EVENTS"],
            "loads data",
            "num_workers",
        ),
        (
            ["DELETE FROM OSRT_API", "UPDATE NVTX_EVENTS SET text = 'get_batch' WHERE text = 'data_loading'"],
            "loads data",
            "num_workers",
        ),
        (
            ["UPDATE StringIds SET value = 'nanosleep' WHERE value = 'read'", "DELETE FROM NVTX_EVENTS"],
            "is in the OS",
            "no sleep",
        ),
        (
            ["UPDATE StringIds SET value = 'poll' WHERE value = 'read'", "DELETE FROM NVTX_EVENTS"],
            "is in the OS",
            "another process or the network",
        ),
        (["DELETE FROM OSRT_API", "DELETE FROM NVTX_EVENTS"], "other code", "py-spy"),
    ],
)  # fmt: skip
def test_the_row_is_of_what_the_host_does(tmp_path: Path, statements: list[str], cause: str, advice: str) -> None:
    row = first(changed(tmp_path, "sync_then_loading", *statements, NO_STEPS))
    assert cause in row["cause"]
    assert advice in row["suggestion"]
    assert ".item()" not in row["suggestion"]


@pytest.mark.parametrize("table", ["MPI_COLLECTIVES_EVENTS", "MPI_START_WAIT_EVENTS", "MPI_RMA_EVENTS"])
def test_calls_of_mpi_are_in_tables_of_their_own(tmp_path: Path, table: str) -> None:
    run = changed(
        tmp_path,
        "sync_then_loading",
        f"CREATE TABLE {table} (start INTEGER NOT NULL, end INTEGER, globalTid INTEGER, textId INTEGER)",
        "INSERT INTO StringIds VALUES (90, 'MPI_Allreduce')",
        f"INSERT INTO {table} SELECT start, end, globalTid, 90 FROM NVTX_EVENTS WHERE text = 'data_loading'",  # noqa: S608
        f"INSERT INTO {table} SELECT * FROM {table}",  # noqa: S608 -- one row a request
        f"INSERT INTO {table} VALUES (1, NULL, 'x', NULL)",  # noqa: S608
        "UPDATE NVTX_EVENTS SET text = 'exchange' WHERE text = 'data_loading'",
    )
    row = first(run)
    assert row["cause"] == "GPU idle: the host is in MPI"
    assert "0.0879 s in MPI_Allreduce()" in row["evidence"]


def test_calls_of_mpi_can_be_ranges_of_its_domain(tmp_path: Path) -> None:
    run = changed(
        tmp_path,
        "sync_then_loading",
        f"INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) VALUES (1, 75, 'MPI', {THREAD}, 4)",  # noqa: S608
        "UPDATE NVTX_EVENTS SET text = 'MPI_Barrier', domainId = 4 WHERE text = 'data_loading'",
    )
    assert first(run)["cause"] == "GPU idle: the host is in MPI"
    assert set(run.idle()["range"]) <= {"", "iteration {n}"}


def test_a_long_call_of_cuda_is_told(tmp_path: Path) -> None:
    run = changed(
        tmp_path,
        "sync_then_loading",
        "INSERT INTO StringIds VALUES (91, 'cudaMalloc_v3020')",
        "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME (start, end, eventClass, globalTid, nameId, returnValue) "
        "SELECT start, end, 0, globalTid, 91, 0 FROM NVTX_EVENTS WHERE text = 'data_loading'",
        "DELETE FROM NVTX_EVENTS",
    )
    row = first(run)
    assert row["cause"] == "GPU idle: the host is in long CUDA calls"
    assert "cudaMalloc()" in row["evidence"]


@pytest.mark.parametrize(
    ("statement", "memory"),
    [
        ("UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET srcKind = 0", "pageable"),
        ("UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET srcKind = NULL, dstKind = 'x'", ""),
        ("ALTER TABLE CUPTI_ACTIVITY_KIND_MEMCPY DROP COLUMN srcKind", ""),
        ("UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET copyKind = 11, srcKind = NULL, dstKind = NULL", "managed"),
    ],
)
def test_what_the_export_does_not_tell_of_copies_is_left_open(tmp_path: Path, statement: str, memory: str) -> None:
    run = changed(tmp_path, "offload_pinned", statement)
    copies = run.copies()
    assert copies[["copies", "bytes", "memory"]].to_numpy().tolist() == [[100, 22_500_000_000, memory]]
    assert "offload" not in first(run)["evidence"]
    assert ("pin_memory" in first(run)["suggestion"]) == (memory == "pageable")


def test_some_copies_without_their_kind_are_copies_still(tmp_path: Path) -> None:
    run = changed(
        tmp_path, "offload_pinned", "UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET srcKind = NULL WHERE rowid % 10 = 0"
    )
    assert run.copies().set_index("memory")["copies"].to_dict() == {"pinned": 90, "": 10}
    assert run.gpu()["memory_s"].sum() == pytest.approx(0.9)


def test_kernels_have_the_namespaces_of_their_full_names(tmp_path: Path) -> None:
    run = changed(
        tmp_path,
        "custom_allreduce",
        "INSERT INTO StringIds VALUES (92, 'void deep_ep::intranode::dispatch<8, 768>(int4*, float*)')",
        "INSERT INTO StringIds VALUES (93, 'void (anonymous namespace)::gemm<float>(float*)')",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET demangledName = 92 WHERE shortName = 7",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET demangledName = 93 WHERE shortName = 2",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET shortName = 2, demangledName = 93 WHERE shortName NOT IN (2, 7)",
    )
    kernels = run.kernels().set_index("name")
    assert kernels["communication"].to_dict() == {"gemm": False, "deep_ep::intranode::dispatch": True}
    assert run.gpu()["comm_s"].sum() == pytest.approx(0.02)
