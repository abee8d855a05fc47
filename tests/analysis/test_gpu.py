import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import H100
from synthetic_gpu import GpuRun

from hpcmm.analysis.extraction import extract_traces, observe
from hpcmm.analysis.gpu_trace import BACK_TO_BACK_NS, CAUSES, DEPENDENCY, HOST, LATENCY, UNTRACED, device_time, gpu_rows
from hpcmm.analysis.idle import Host
from hpcmm.analysis.report_inventory import take_inventory
from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import gpu_line, headline, late_line
from hpcmm.reports.events import read_report
from hpcmm.reports.report import UNKNOWN
from hpcmm.reports.run_record import read_run_record

MS = 0.001
NO_CALLS = Host(
    pd.DataFrame(columns=["start_ns", "end_ns", "tid", "kind", "function"]).astype({"function": "category"}),
    pd.DataFrame(columns=["start_ns", "end_ns", "tid", "name"]).astype({"name": "category"}),
    traces_os=False,
)
KERNELS = {"kernel": "gemm", "nccl": "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "copy": "", "set": "", "graph": ""}


def activities(rows: list[tuple]) -> pd.DataFrame:
    """``rows``: start, end, what (a key of KERNELS), launch, end of the launch."""
    rows = sorted(rows, key=lambda row: row[0])
    frame = pd.DataFrame(rows, columns=["start_ns", "end_ns", "what", "launch_ns", "launch_end_ns"])
    times = dict.fromkeys(("start_ns", "end_ns", "launch_ns", "launch_end_ns"), np.int64)
    kind = frame["what"].replace("nccl", "kernel")
    return frame.astype(times).assign(
        device=0,
        kind=pd.Categorical(kind),
        name=pd.Categorical(frame["what"].map(KERNELS)),
        launch_tid=1,
        bytes=8,
        copy_kind=1,
        source=0,
        target=2,
    )


def steps(*spans: tuple[int, int]) -> pd.DataFrame:
    return pd.DataFrame([(n, *span) for n, span in enumerate(spans)], columns=["step", "start_ns", "end_ns"]).astype(
        np.int64
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 20), st.sampled_from([*KERNELS]), st.integers(-1, 50)), min_size=1
    )
)
def test_every_nanosecond_counts_as_what_ran_in_it(drawn: list[tuple[int, int, str, int]]) -> None:
    rows = [(start, start + length, what, launch, launch) for start, length, what, launch in drawn]
    time = device_time(activities(rows), 0, 80)

    def covered(*kinds: str) -> set[int]:
        return {at for start, end, what, *_ in rows if what in kinds for at in range(start, end)}

    compute, comm = covered("kernel", "graph"), covered("nccl")
    assert time.compute.total_ns == len(compute)
    assert time.comm.total_ns == len(comm)
    assert time.memory.total_ns == len(covered("copy", "set"))
    assert time.overlap.total_ns == len(compute & comm)
    assert sum(idle.total_ns for idle in time.idle.values()) == 80 - len(covered(*KERNELS))


@pytest.mark.parametrize(
    ("launch", "launched", "begin", "cause"),
    [
        (150, 160, 200_000, HOST),
        (50, 60, 200_000, DEPENDENCY),
        (50, 60, 100 + BACK_TO_BACK_NS, "gaps between kernels"),
        (50, 200, 200_000, LATENCY),
        (UNKNOWN, UNKNOWN, 200_000, UNTRACED),
    ],
)
def test_a_gap_is_the_hosts_fault_when_the_next_launch_came_after_it_began(
    launch: int, launched: int, begin: int, cause: str
) -> None:
    time = device_time(activities([(0, 100, "kernel", 0, 5), (begin, begin + 1, "kernel", launch, launched)]), 0, begin)
    assert {name: idle.total_ns for name, idle in time.idle.items() if len(idle)} == {cause: begin - 100}


def test_memory_sets_are_alone_if_neither_kernels_nor_copies_run_beside_them() -> None:
    time = device_time(
        activities([(0, 20, "set", 0, 1), (10, 15, "kernel", 0, 1), (18, 30, "copy", 0, 1), (25, 40, "set", 0, 1)]),
        0,
        50,
    )
    assert time.sets.start_ns.tolist() == [0, 15, 30]
    assert time.sets.end_ns.tolist() == [10, 18, 40]
    assert time.memory.total_ns == 40


def test_work_behind_the_host_counts_in_the_step_that_launched_it() -> None:
    rows = gpu_rows(
        activities([(20, 150, "kernel", 10, 11), (150, 180, "kernel", 110, 111), (300, 310, "copy", 250, 251)]),
        steps((0, 100), (100, 200)),
        NO_CALLS,
    ).rows
    assert rows[["step", "start_ns", "end_ns", "compute_ns", "span_ns"]].to_numpy().tolist() == [
        [0, 0, 150, 130, 150],
        [1, 150, 200, 30, 50],
        [-1, 0, 310, 0, 110],
    ]
    assert rows["memory_ns"].tolist() == [0, 0, 10]
    assert rows["idle_0_ns"].tolist() == [20, 20, 100]


def test_a_step_without_gpu_work_is_idle_and_a_wrapped_one_has_no_time() -> None:
    rows = gpu_rows(activities([(10, 500, "kernel", 5, 6)]), steps((0, 100), (100, 200), (600, 700)), NO_CALLS).rows
    assert rows["span_ns"].tolist() == [500, 0, 100, 100]
    assert rows[f"idle_{CAUSES.index(HOST)}_ns"].tolist() == [10, 0, 100, 100]


def test_two_nodes_of_two_gpus_have_the_times_that_they_were_given(gpu_run: Analysis) -> None:
    table = gpu_run.tables["gpu"]
    assert table.groupby(["rank", "node", "device"]).size().to_dict() == {
        (0, "node1", 0): 10,
        (1, "node1", 1): 10,
        (2, "node2", 0): 10,
        (3, "node2", 1): 10,
    }
    assert table["warmup"].sum() == 4
    steady = table[~table["warmup"]]
    late = steady["rank"] == 3
    expected = {
        "span_s": 12.2, "compute_s": 8.5, "memory_s": 0.2, "exposed_comm_s": 1, "idle_s": 2.5, "idle_host_s": 2.4,
        "idle_other_s": 0.1,
    }  # fmt: skip
    for column, value in expected.items():
        assert steady[column].to_numpy() == pytest.approx(value * MS, rel=1e-6), column
    assert steady["comm_s"].to_numpy() == pytest.approx(np.where(late, 3.5, 4) * MS)
    assert steady["overlap_s"].to_numpy() == pytest.approx(np.where(late, 2.5, 3) * MS)
    assert steady["overlap_share"].to_numpy() == pytest.approx(np.where(late, 2.5 / 3.5, 0.75))
    assert steady["comm_wait_s"].to_numpy() == pytest.approx(np.where(late, 0, 0.5) * MS, abs=1e-8)
    assert set(steady["idle_other_cause"]) == {DEPENDENCY}


def test_the_first_step_begins_with_an_idle_gpu(gpu_run: Analysis) -> None:
    first = gpu_run.tables["gpu"][gpu_run.tables["gpu"]["warmup"]]
    assert first["span_s"].to_numpy() == pytest.approx(12.5 * MS)
    assert first["idle_host_s"].to_numpy() == pytest.approx(2.8 * MS)


def test_exposed_communication_is_what_no_kernel_hides(gpu_run: Analysis) -> None:
    table = gpu_run.tables["collectives"]
    exposed = table["exposed_wait_s"] + table["exposed_transfer_s"]
    assert exposed.to_numpy() == pytest.approx(1 * MS)


def test_backward_owns_what_autograd_launches(gpu_run: Analysis) -> None:
    table = gpu_run.tables["projection"].set_index(["rank", "domain", "range"])
    backward = table.loc[(0, "hpcmm", "backward")]
    assert (backward["calls"], backward["kernels"], backward["copies"]) == (10, 20, 0)
    assert backward["gpu_envelope_s"] == pytest.approx(10 * 5 * MS)
    assert backward["gpu_union_s"] == pytest.approx(10 * 5 * MS)
    assert table.loc[(0, "hpcmm", "step"), "gpu_self_s"] == 0
    assert table.loc[(0, "", "aten::linear"), "kernels"] == 10


def ask(query: str) -> list[tuple]:
    with closing(sqlite3.connect(H100)) as connection:
        return connection.execute(query).fetchall()


def length(spans: list[tuple[int, int]]) -> int:
    """Of the union, without the code under test."""
    total, reach = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


@pytest.mark.parametrize(("pid", "device"), [(144, 0), (145, 1)])
def test_the_h100s_time_is_what_plain_sql_finds(h100: Analysis, pid: int, device: int) -> None:
    kernel = "SELECT k.start, k.end FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName"
    where = f"WHERE deviceId = {device} AND (globalPid >> 24 & 0xffffff) = {pid}"
    comm = ask(f"{kernel} {where} AND s.value LIKE 'nccl%'")
    compute = ask(f"{kernel} {where} AND s.value NOT LIKE 'nccl%'")
    copies, sets = (
        ask(f"SELECT start, end FROM CUPTI_ACTIVITY_KIND_{table} {where}")  # noqa: S608
        for table in ("MEMCPY", "MEMSET")
    )
    memory = copies + sets
    row = h100.tables["gpu"].set_index("pid").loc[pid]
    everything = comm + compute + memory
    span = max(end for _, end in everything) - min(start for start, _ in everything)
    assert row["device"] == device
    assert row["span_s"] == pytest.approx(span / 1e9)
    assert row["compute_s"] == pytest.approx(length(compute) / 1e9)
    assert row["comm_s"] == pytest.approx(length(comm) / 1e9)
    assert row["memory_s"] == pytest.approx(length(memory) / 1e9)
    assert row["exposed_comm_s"] == pytest.approx((length(compute + comm) - length(compute)) / 1e9)
    assert row["idle_s"] == pytest.approx((span - length(everything)) / 1e9)
    assert row["idle_host_s"] + row["idle_other_s"] == pytest.approx(row["idle_s"])


def test_the_h100s_idle_time_by_host_is_what_a_walk_over_the_rows_finds(h100: Analysis) -> None:
    rows = ask(
        """SELECT a.start, a.end, r.start FROM (
            SELECT start, end, correlationId, globalPid FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE deviceId = 1
            UNION ALL SELECT start, end, correlationId, globalPid FROM CUPTI_ACTIVITY_KIND_MEMCPY WHERE deviceId = 1
            UNION ALL SELECT start, end, correlationId, globalPid FROM CUPTI_ACTIVITY_KIND_MEMSET WHERE deviceId = 1
        ) a LEFT JOIN CUPTI_ACTIVITY_KIND_RUNTIME r
        ON r.correlationId = a.correlationId AND r.globalTid >> 24 = a.globalPid >> 24 ORDER BY a.start"""
    )
    host, reach = 0, rows[0][0]
    for start, end, launch in rows:
        if start > reach and launch is not None and launch >= reach:
            host += start - reach
        reach = max(reach, end)
    row = h100.tables["gpu"].set_index("device").loc[1]
    assert row["idle_host_s"] == pytest.approx(host / 1e9)


def test_the_h100s_ranges_launch_the_kernels_that_a_join_finds(h100: Analysis) -> None:
    ranges = ask(
        """SELECT e.start, e.end FROM NVTX_EVENTS e LEFT JOIN StringIds s ON s.id = e.textId
        WHERE COALESCE(e.text, s.value) LIKE 'nccl:all_to_all%' AND (e.globalTid >> 24 & 0xffffff) = 144"""
    )
    launches = ask(
        """SELECT r.start, k.end - k.start FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN CUPTI_ACTIVITY_KIND_RUNTIME r
        ON r.correlationId = k.correlationId AND r.globalTid >> 24 = k.globalPid >> 24
        WHERE (r.globalTid & 0xffffffffffff) = (144 << 24 | 144)"""
    )
    inside = [time for begin, end in ranges for launch, time in launches if begin <= launch <= end]
    table = h100.tables["projection"].set_index(["pid", "range"])
    row = table.loc[(144, "nccl:all_to_all")]
    assert (row["calls"], row["kernels"]) == (len(ranges), len(inside))
    assert row["gpu_union_s"] == pytest.approx(sum(inside) / 1e9)


def test_the_h100s_verdict_names_the_largest_loss(h100: Analysis) -> None:
    table = h100.tables["gpu"]
    share = table["idle_host_s"].sum() / table["span_s"].sum()
    assert 0.08 < share < 0.085
    told = headline(h100.study)
    assert (
        told == "No steps are annotated; of 299 ms on 2 GPUs 7.4% are lost to this: GPU idle: the host launches late."
    )
    assert "GPU 1 of process 145 on modal arrives last at 13 of 15 collectives" in late_line(h100.study)


def test_without_gpu_tables_nothing_is_claimed(samples: Path, tmp_path: Path) -> None:
    analysis = analyze([samples / "clean" / "rank_0000.sqlite"], tmp_path)
    assert analysis.tables["gpu"].empty
    assert analysis.tables["projection"].empty
    assert gpu_line(analysis.study) == "no GPU activity was traced, so nothing is said of GPUs"
    assert late_line(analysis.study) == ""
    assert "no GPU activity was traced" in (tmp_path / "summary.md").read_text()


def test_cuda_asked_for_and_not_there_is_said(tmp_path: Path) -> None:
    folder = GpuRun(steps=3).write(tmp_path / "run")
    for path in folder.iterdir():
        with closing(sqlite3.connect(path)) as connection:
            for table in ("KERNEL", "MEMCPY", "RUNTIME"):
                connection.execute(f"DROP TABLE CUPTI_ACTIVITY_KIND_{table}")
            connection.commit()
    facts = [observe(read_report(path, path)) for path in folder.iterdir()]
    coverage = take_inventory(facts, read_run_record(None)).table
    assert set(coverage["reason"]) == {"CUDA was to be traced, but no GPU activity was recorded"}


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME",
        "DROP TABLE CUPTI_ACTIVITY_KIND_MEMCPY",
        "DROP TABLE StringIds",
        "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN globalPid",
        "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN shortName",
        "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN correlationId",
        "ALTER TABLE NVTX_EVENTS DROP COLUMN domainId",
        "ALTER TABLE NVTX_EVENTS DROP COLUMN textId",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'soon' WHERE rowid % 2",
        'UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET "end" = start - 1 WHERE rowid % 3 = 0',
        'UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET "end" = 9223372036854775807 WHERE rowid % 5 = 0',
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET correlationId = -9223372036854775807",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET deviceId = 1.5 WHERE rowid % 2",
        "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET globalTid = NULL, correlationId = x'00'",
        "UPDATE NVTX_EVENTS SET text = zeroblob(100000), textId = 'x' WHERE rowid % 100 = 0",
        'UPDATE NVTX_EVENTS SET "end" = NULL',
    ],
)
def test_a_damaged_schema_or_cell_costs_only_its_own_rows(tmp_path: Path, statement: str) -> None:
    path = GpuRun(steps=30, annotated=False, ranks_per_report=2).write(tmp_path / "run") / "gpu0.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    report = read_report(path, path)
    assert report.cuda is not None
    assert len(report.cuda.activities) > 100
    traces = extract_traces(report)
    assert {trace.device for trace in traces} >= {0, 1}
    for trace in traces:
        assert trace.gpu is not None
        assert (trace.gpu["span_ns"] >= trace.gpu["compute_ns"]).all()
        assert (trace.gpu.filter(like="idle_") >= 0).all(axis=None)
