"""Reports whose GPU records are wrong, incomplete, coarse or of a shared GPU, which nsys wrote without hpcmm."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcmm.analysis.completeness import in_words, untraced
from hpcmm.analysis.gpu_trace import traced
from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import gpu_line, headline
from hpcmm.reports.report import RECORDED, UNRECORDED

INPUTS = Path(__file__).parent / "inputs"


LATER = (
    """INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL
    SELECT start + {0}, end + {0}, deviceId, contextId, NULL, streamId, correlationId + {0}, globalPid, demangledName,
    shortName, mangledName, NULL, NULL FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE start < 1000000000""",
    """INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME
    SELECT start + {0}, end + {0}, eventClass, globalTid, correlationId + {0}, nameId, returnValue, NULL
    FROM CUPTI_ACTIVITY_KIND_RUNTIME WHERE start < 1000000000""",
)
"""The work of the first ten steps once more, some time later."""


def changed(tmp_path: Path, name: str, *statements: str) -> Analysis:
    """The analysis of an input after ``statements``."""
    folder = tmp_path / name
    shutil.copytree(INPUTS / name, folder)
    with closing(sqlite3.connect(folder / "report.sqlite")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return analyze(folder)


def reason(analysis: Analysis) -> str:
    return str(analysis.coverage()["reason"].iloc[0])


def test_records_with_impossible_times_are_left_out_and_said() -> None:
    analysis = analyze(INPUTS / "zero_timestamps")
    row = analysis.gpu().iloc[0]
    assert row["compute_s"] == pytest.approx(1.782)
    assert row["span_s"] == pytest.approx(2.0, abs=1e-3)
    assert row["idle_s"] < 0.02
    # Of each of the twenty, the time until the next kernel is not known.
    assert row["untraced_s"] == pytest.approx(0.2, abs=2e-3)
    assert "20 GPU records have times that cannot be, and are left out (CUPTI_ACTIVITY_KIND_KERNEL)" in reason(analysis)
    assert analysis.coverage()["events"].iloc[0] == 180
    assert analysis.coverage()["span_s"].iloc[0] == pytest.approx(2.0, abs=1e-3)
    assert analysis.exit_status == 2
    assert analysis.bottlenecks().empty
    assert "of 10% there are no records" in gpu_line(analysis.study)


def test_a_trace_that_lost_records_at_its_end_is_incomplete_and_not_idle() -> None:
    analysis = analyze(INPUTS / "cupti_stopped")
    gpu = analysis.gpu()
    assert gpu.loc[gpu["step"] <= 9, "untraced_s"].max() == 0
    assert gpu.loc[gpu["step"] > 9, "idle_s"].max() == 0
    told = reason(analysis)
    assert "GPU records end after step 9 of 29" in told
    assert "CUPTI dropped 48213 records" in told
    assert analysis.exit_status == 2
    assert analysis.bottlenecks().empty
    assert headline(analysis.study).endswith("no rank is to blame. But GPU records end after step 9 of 29.")
    assert "20 of 30 steps are left out, whose GPU records are missing" in gpu_line(analysis.study)


def test_a_program_that_stops_to_use_the_gpu_leaves_it_idle(tmp_path: Path) -> None:
    analysis = changed(tmp_path, "cupti_stopped", "DELETE FROM DIAGNOSTIC_EVENT")
    gpu = analysis.gpu()
    assert gpu["untraced_s"].sum() == 0
    assert gpu.loc[gpu["step"] > 10, "idle_s"].min() > 0.09
    assert analysis.coverage()["status"].tolist() == ["found"]


@pytest.mark.parametrize(
    ("lost", "said", "fine"),
    [
        ("start >= 1000000000", "GPU records end after step 9 of 29: 180 launches there have none", range(10)),
        ("start < 2000000000", "GPU records begin with step 20 of 29: 180 launches there have none", range(20, 30)),
        (
            "start BETWEEN 1000000000 AND 1500000000",
            "GPU records are missing in steps 10-14: 45 launches there have none",
            [*range(10), *range(15, 30)],
        ),
    ],
    ids=["end", "begin", "hole"],
)
def test_launches_without_records_make_a_trace_incomplete(tmp_path: Path, lost: str, said: str, fine: range) -> None:
    analysis = changed(
        tmp_path,
        "cupti_stopped",
        "DELETE FROM DIAGNOSTIC_EVENT",
        *(statement.format(shift) for shift in (10**9, 2 * 10**9) for statement in LATER),
        f"DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE {lost}",  # noqa: S608
    )
    gpu = analysis.gpu()
    whole = gpu[gpu["step"].notna() & traced(gpu)]
    assert set(whole["step"]) == set(fine)
    assert said in reason(analysis)
    assert analysis.coverage()["status"].tolist() == ["truncated"]
    assert (analysis.bottlenecks()["step_share"] < 0.06).all()


def test_launches_of_a_host_that_runs_ahead_are_counted_where_they_would_have_run() -> None:
    """All 40 come before the first kernel has ended; the records of the 10th to the 19th are missing."""
    launch = np.arange(40) * 1_000
    lost = (np.arange(40) >= 10) & (np.arange(40) < 20)
    start = 100_000 + np.arange(40) * 1_000_000
    activities = pd.DataFrame({"launch_ns": launch, "start_ns": start, "end_ns": start + 990_000})[~lost]
    calls = pd.DataFrame({"start_ns": launch, "end_ns": launch + 500, "record": np.where(lost, UNRECORDED, RECORDED)})
    steps = pd.DataFrame(
        {"step": range(8), "start_ns": np.arange(8) * 5_000_000, "end_ns": np.arange(1, 9) * 5_000_000}
    )
    told = in_words(untraced(activities, calls, steps, is_lossy=False), activities, calls, steps)
    assert "GPU records are missing in steps 2-3: 10 launches there have none" in told


def test_a_capture_that_ends_while_the_gpu_still_works_is_complete(tmp_path: Path) -> None:
    analysis = changed(
        tmp_path,
        "cupti_stopped",
        "DELETE FROM DIAGNOSTIC_EVENT",
        "DELETE FROM NVTX_EVENTS WHERE start >= 1000000000",
        "DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE start >= 960000000",
    )
    assert analysis.coverage()["status"].tolist() == ["found"]
    assert reason(analysis) == ""


def test_graphs_traced_as_a_whole_are_busy_time_whose_inside_is_not_known() -> None:
    analysis = analyze(INPUTS / "graph_trace")
    row = analysis.gpu().iloc[0]
    assert row["compute_s"] == row["graph_s"] == pytest.approx(0.495)
    assert row["idle_s"] == pytest.approx(0.005, abs=2e-4)
    for told in (gpu_line(analysis.study), headline(analysis.study)):
        assert "CUDA graphs that were traced as a whole take 99% of the GPUs' time" in told
        assert "--cuda-graph-trace=node shows it" in told
    assert "graph" in headline(analysis.study).split("nothing")[0]


def test_a_capture_of_copies_alone_is_analysed(tmp_path: Path) -> None:
    columns = "start, end, deviceId, contextId, streamId, correlationId, globalPid"
    analysis = changed(
        tmp_path,
        "graph_trace",
        f"CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY AS SELECT {columns} FROM CUPTI_ACTIVITY_KIND_GRAPH_TRACE",  # noqa: S608
        "DROP TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
    )
    row = analysis.gpu().iloc[0]
    assert row["memory_s"] == pytest.approx(0.495)
    assert analysis.bottlenecks()["cause"].tolist() == ["copies without computation"]
    assert "CUDA graphs" not in gpu_line(analysis.study)


def test_two_processes_that_take_turns_on_a_gpu_are_one_gpu_without_idle_time() -> None:
    analysis = analyze(INPUTS / "shared_gpu")
    gpu = analysis.gpu()
    assert gpu["gpu"].nunique() == 1
    assert gpu["idle_s"].max() == 0
    assert gpu["shared_s"].tolist() == pytest.approx([0.495, 0.495])
    assert "on one GPU nothing loses 2%" in headline(analysis.study)
    told = gpu_line(analysis.study)
    assert told.startswith("GPUs compute 100% of the time")
    assert "are idle 0.0%" in told
    assert "2 processes share a GPU" in told


DEVICES = "CREATE TABLE TARGET_INFO_CUDA_DEVICE (gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT)"


@pytest.mark.parametrize(
    ("uuids", "gpus", "idle"),
    [(("GPU-A", "GPU-A"), 1, 0.0), (("GPU-A", "GPU-B"), 2, 0.495)],
    ids=["one", "two behind CUDA_VISIBLE_DEVICES"],
)
def test_the_uuid_tells_whether_processes_share_a_gpu(
    tmp_path: Path, uuids: tuple[str, str], gpus: int, idle: float
) -> None:
    rows = f"INSERT INTO TARGET_INFO_CUDA_DEVICE VALUES (0, 0, 100, '{uuids[0]}'), (0, 0, 101, '{uuids[1]}')"  # noqa: S608
    analysis = changed(tmp_path, "shared_gpu", DEVICES, rows)
    assert analysis.gpu()["gpu"].nunique() == gpus
    assert analysis.gpu()["idle_s"].tolist() == pytest.approx([idle, idle])


def test_processes_whose_nccl_kernels_run_at_once_have_a_gpu_each(tmp_path: Path) -> None:
    analysis = changed(
        tmp_path,
        "shared_gpu",
        "UPDATE StringIds SET value = 'ncclDevKernel_AllReduce_Sum_f32_RING_LL' WHERE id = 2",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET end = end + 1000000",
    )
    assert analysis.gpu()["gpu"].nunique() == 2
    assert "2 GPUs" in headline(analysis.study)


def test_reports_whose_gpu_has_one_uuid_share_it(tmp_path: Path) -> None:
    """One report a process, as one rank of each."""
    for pid in (100, 101):
        folder = tmp_path / str(pid)
        shutil.copytree(INPUTS / "shared_gpu", folder)
        with closing(sqlite3.connect(folder / "report.sqlite")) as connection:
            connection.execute(DEVICES)
            connection.execute("INSERT INTO TARGET_INFO_CUDA_DEVICE VALUES (0, 0, ?, 'GPU-A')", (pid,))
            connection.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE globalPid >> 24 & 16777215 != ?", (pid,))
            connection.execute("DELETE FROM CUPTI_ACTIVITY_KIND_RUNTIME WHERE globalTid >> 24 & 16777215 != ?", (pid,))
            connection.commit()
    analysis = analyze([tmp_path / "100", tmp_path / "101"])
    gpu = analysis.gpu()
    assert gpu["gpu"].nunique() == 1
    assert gpu["idle_s"].max() < 0.001
    assert gpu["shared_s"].tolist() == pytest.approx([0.495, 0.495], abs=1e-3)
    assert "on one GPU nothing loses 2%" in headline(analysis.study)


NODES = """
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL AS
SELECT start + place * 3300000 AS start, start + (place + 1) * 3300000 AS end, deviceId, contextId, streamId,
correlationId, globalPid, 1 AS shortName, place AS graphNodeId, graphId
FROM CUPTI_ACTIVITY_KIND_GRAPH_TRACE, (SELECT 0 AS place UNION SELECT 1 UNION SELECT 2)
"""


def test_graphs_traced_node_by_node_hide_nothing(tmp_path: Path) -> None:
    analysis = changed(tmp_path, "graph_trace", NODES, "DROP TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE")
    row = analysis.gpu().iloc[0]
    assert row["compute_s"] == pytest.approx(0.495)
    assert row["graph_s"] == row["untraced_s"] == 0
    assert headline(analysis.study).endswith("on one GPU nothing loses 2%.")


def test_what_may_be_lost_lowers_the_confidence_of_gpu_rows_alone(tmp_path: Path) -> None:
    lost = "DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE correlationId % 3 = 0"
    launches = "DELETE FROM CUPTI_ACTIVITY_KIND_RUNTIME WHERE correlationId % 3 = 0"
    table = "CREATE TABLE DIAGNOSTIC_EVENT (severity INTEGER, text TEXT)"
    doubt = "INSERT INTO DIAGNOSTIC_EVENT VALUES (2, 'Not all CUDA events might have been collected.')"
    sure = changed(tmp_path / "sure", "shared_gpu", lost, launches)
    unsure = changed(tmp_path / "unsure", "shared_gpu", lost, launches, table, doubt)
    assert set(sure.bottlenecks()["confidence"]) == {"medium"}
    assert set(unsure.bottlenecks()["confidence"]) == {"low"}
    assert unsure.bottlenecks()["evidence"].iloc[0].endswith("but nsys lost GPU records, or may have (of 2 of 2 ranks)")
    assert reason(unsure).endswith('nsys says: "Not all CUDA events might have been collected."')
    assert unsure.exit_status == sure.exit_status == 0
