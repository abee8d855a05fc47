import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recorded import H100
from synthetic_gpu import BYTES, COMMUNICATOR, GpuRun

from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.extraction import extract_traces
from hpcmm.analysis.nccl import (
    BY_KERNEL,
    BY_NAME,
    BY_ORDER,
    UNCONFIRMED,
    communicates,
    confirm_order,
    is_communication,
    kernel_op,
    timed_by_kernels,
    with_basis,
)
from hpcmm.analyze import Analysis
from hpcmm.reports.cuda import read_nccl_calls
from hpcmm.reports.events import read_report
from hpcmm.reports.sqlite import ReportDatabase

MS = 0.001


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "all_reduce"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float", "all_reduce"),
        ("ncclAllReduceRingLLKernel_sum_f32", "all_reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_SIMPLE", "reduce_scatter"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL", "reduce"),
        ("ncclDevKernel_AllGather_RING_LL", "all_gather"),
        ("ncclDevKernel_Broadcast_RING_LL", "broadcast"),
        ("ncclDevKernel_SendRecv", "send_recv"),
        ("ncclDevKernel_Generic", "nccl"),
        ("ncclSymkDevKernel_AllGather_LL", "all_gather"),
        ("reduce_kernel", None),
        ("void at::native::reduce_kernel<512, 1>", None),
        ("nccl", None),
        ("", None),
    ],
)
def test_the_operation_is_in_the_kernels_name(name: str, op: str | None) -> None:
    assert kernel_op(name) == op


@pytest.mark.parametrize(
    "name",
    [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
        "vllm::cross_device_reduce_2stage",
        "cross_device_reduce_1stage",
        "tensorrt_llm::kernels::oneShotAllReduceKernel",
        "lowPrecisionTwoShotAllReduceKernel",
        "flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport",
        "quickreduce::allreduce_prototype_twoshot",
        "multimem_all_reduce_kernel",
        "two_shot_all_reduce_kernel_inplace",
        "c10d::symmetric_memory::barrier_kernel",
        "nvshmemi_transfer_rma_internode",
        "deep_ep::intranode::dispatch",
        "deep_ep::internode_ll::combine",
        "deep_ep::internode::notify_dispatch",
        "dpsk::ep::internode::dispatch_ll",
        "tensorrt_llm::kernels::moe_comm::moeAllToAllKernel",
        "moeA2ADispatchKernel",
        "mscclKernel_Sum_float",
        "mscclpp::allreduce_packet",
        "userbuffers_fp16_sum_inplace_gpu_rr_rs_oop",
        "kuserbuffers_pushsend",
        "rcclGenericKernel",
        "ucc_ec_cuda_reduce_kernel",
    ],
)
def test_kernels_that_exchange_data_between_gpus(name: str) -> None:
    assert communicates(name)


@pytest.mark.parametrize(
    "name",
    [
        "gemm",
        "dispatch",
        "combine",
        "mylib::dispatch",
        "flash_fwd_splitkv_combine_kernel",
        "vllm::moe::moe_align_block_size_kernel",
        "fused_moe_kernel",
        "deep_ep::layout::get_dispatch_layout",
        "warpAllReduce",
        "block_all_reduce_sum_f32",
        "triton_poi_fused_add_all_reduce_wait_tensor_3",
        "triton_red_fused_all_gather_into_tensor_0",
        "GemmAllReduceKernel",
        "at::native::reduce_kernel",
        "at::native::vectorized_gather_kernel",
        "scatter_reduce",
        "construct_product",
        "",
    ],
)
def test_kernels_that_compute(name: str) -> None:
    assert not communicates(name)


@pytest.mark.parametrize(("beside", "count"), [("gemm", 0), ("cross_device_reduce_1stage", 3)])
def test_dispatch_and_combine_communicate_beside_other_communication_alone(beside: str, count: int) -> None:
    names = ["dispatch", "combine", "mylib::dispatch", beside]
    found = is_communication(pd.DataFrame({"kind": ["kernel"] * 4, "name": pd.Categorical(names)}))
    assert found.sum() == count
    assert not found[2]


def kernels(*rows: tuple) -> pd.DataFrame:
    """``rows``: start, end, op, launch, thread."""
    return pd.DataFrame(rows, columns=["start_ns", "end_ns", "op", "launch_ns", "launch_tid"]).assign(device=1)


def ranges(*rows: tuple) -> pd.DataFrame:
    """``rows``: start, end, op, thread; open ranges are not closed."""
    return pd.DataFrame(rows, columns=["start_ns", "end_ns", "op", "tid"]).assign(closed=False)


def test_a_range_takes_the_time_of_the_kernels_that_it_launched() -> None:
    rows = timed_by_kernels(
        ranges((10, 20, "all_reduce", 1), (30, 40, "all_gather", 1)),
        kernels((100, 150, "all_reduce", 12, 1), (150, 160, "all_reduce", 13, 1), (200, 230, "all_gather", 30, 1)),
    )
    assert rows[["start_ns", "end_ns", "device"]].to_numpy().tolist() == [[100, 160, 1], [200, 230, 1]]
    assert rows["closed"].all()
    assert set(rows["basis"]) == {BY_KERNEL}


@pytest.mark.parametrize(
    "kernel",
    [
        (100, 150, "all_reduce", 25, 1),  # launched after the range
        (100, 150, "all_reduce", 15, 2),  # on another thread
        (100, 150, "broadcast", 15, 1),  # another operation
        (100, 150, "all_reduce", -1, -1),  # launch unknown
    ],
)
def test_a_range_without_a_kernel_of_its_own_keeps_its_times(kernel: tuple) -> None:
    rows = timed_by_kernels(ranges((10, 20, "all_reduce", 1)), kernels(kernel))
    assert rows[["start_ns", "end_ns"]].to_numpy().tolist() == [[10, 20]]
    assert rows["basis"].tolist() == [BY_NAME]
    assert not rows["closed"].any()


@pytest.mark.parametrize(
    ("op", "kernel_runs"),
    [("barrier", "all_reduce"), ("all_to_all", "send_recv"), ("recv", "send_recv"), ("reduce", "nccl")],
)
def test_operations_that_nccl_runs_under_another_name(op: str, kernel_runs: str) -> None:
    assert timed_by_kernels(ranges((10, 20, op, 1)), kernels((100, 150, kernel_runs, 15, 1)))["basis"].tolist() == [
        BY_KERNEL
    ]


def matched(ends: list[list[float]], length: int = 10) -> pd.DataFrame:
    """Instances of one operation of two traces that end at ``ends[trace]`` and last ``length`` each."""
    rows = [
        (trace, instance, int(end) - length, int(end))
        for trace, own in enumerate(ends)
        for instance, end in enumerate(own)
    ]
    frame = pd.DataFrame(rows, columns=["trace", "instance", "start_ns", "end_ns"])
    frame = frame.assign(group="stream 0", op="all_reduce", ranks=2, synchronising=True, needs_all=True, basis=BY_ORDER)
    return frame.assign(complete=frame.groupby("instance")["trace"].transform("size") == 2)


IRREGULAR = np.cumsum(np.random.default_rng(3).integers(100, 1000, 40)).astype(float)


@pytest.mark.parametrize(
    ("ends", "clock_error_ns", "confirmed"),
    [
        ([IRREGULAR, IRREGULAR + 3], 5, True),  # they overlap
        ([IRREGULAR[:-1], IRREGULAR[1:]], 5, False),  # one capture began later
        ([IRREGULAR, IRREGULAR + 123_456], 10_000_000, True),  # clocks that differ by a constant
        ([IRREGULAR[:-1], IRREGULAR[1:]], 10_000_000, False),  # shifted by one, and no clock to see it: the ends wander
        ([IRREGULAR, IRREGULAR[1:]], 10_000_000, False),  # one member lacks an instance
        ([IRREGULAR[:5], IRREGULAR[:5]], 10_000_000, False),  # too few to tell
    ],
)
def test_matches_by_order_are_withdrawn_where_the_times_do_not_bear_them_out(
    ends: list, clock_error_ns: float, confirmed: bool
) -> None:
    rows = confirm_order(matched(ends), clock_error_ns)
    assert set(rows["basis"]) == {BY_ORDER if confirmed else UNCONFIRMED}
    assert rows["complete"].any() == rows["synchronising"].any() == rows["needs_all"].any() == confirmed


def test_matches_by_name_are_never_withdrawn() -> None:
    rows = with_basis(matched([[100.0], [9_000.0]]).drop(columns="basis"))
    assert confirm_order(rows, 1).equals(rows)


def collectives_of(folder: Path, **shape) -> pd.DataFrame:
    """Rows of a synthetic run, whose clocks are known to 10 ms."""
    paths = sorted(GpuRun(**shape).write(folder / "run").iterdir())
    traces = [trace for path in paths for trace in extract_traces(read_report(path, path))]
    return match_with_waits(traces, 10_000_000)


def test_annotated_collectives_have_the_kernels_times(gpu_run: Analysis) -> None:
    table = gpu_run.tables["collectives"]
    assert len(table) == 40
    assert set(table["basis"]) == {BY_KERNEL}
    assert (table["group"] == "0").all()
    late = table["rank"] == 3
    assert table["duration_s"].to_numpy() == pytest.approx(np.where(late, 3.5, 4) * MS)
    assert table["wait_a_s"].to_numpy() == pytest.approx(np.where(late, 0, 0.5) * MS, abs=1e-9)
    assert table["device"].tolist() == (table["rank"] % 2).tolist()
    assert set(table["phase"]) == {"backward"}


def test_the_clocks_are_aligned_by_the_ends_on_the_gpus(gpu_run: Analysis) -> None:
    clock = gpu_run.tables["clock"].set_index("node")
    assert clock.loc["node2", "offset_s"] == pytest.approx(0.030, abs=1e-6)
    first = gpu_run.tables["collectives"].iloc[:4]
    assert np.ptp(first["end_s"]) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("ranks_per_report", [1, 2])
def test_unannotated_collectives_are_matched_by_order_and_say_so(tmp_path: Path, ranks_per_report: int) -> None:
    rows = collectives_of(tmp_path, annotated=False, ranks_per_report=ranks_per_report)
    assert len(rows) == 40
    assert set(rows["basis"]) == {BY_ORDER}
    assert rows["complete"].all()
    assert (rows["bytes"] == 0).all()
    assert set(rows["group"]) == {"stream 0"}
    assert rows.groupby("sequence")["trace"].apply(set).tolist() == [{0, 1, 2, 3}] * 10
    assert rows["wait_ns"].tolist() == [500_000.0] * 30 + [0.0] * 10


@pytest.mark.parametrize("payload", ["json", "bytes"])
def test_the_communicator_is_what_nccls_own_ranges_carry(tmp_path: Path, payload: str) -> None:
    rows = collectives_of(tmp_path, annotated=False, payload=payload)
    assert set(rows["group"]) == {f"communicator {COMMUNICATOR:x}"}
    assert set(rows["bytes"]) == {BYTES}


def test_a_capture_that_began_late_yields_no_waits(tmp_path: Path) -> None:
    rows = collectives_of(tmp_path, annotated=False, missed=1)
    assert len(rows) == 39
    assert set(rows["basis"]) == {UNCONFIRMED}
    assert not rows["complete"].any()
    assert rows["wait_ns"].isna().all()
    assert rows["late_rank"].isna().all()


def test_steps_alone_place_the_kernels_in_them(tmp_path: Path) -> None:
    folder = GpuRun(steps=4).write(tmp_path / "run")
    path = folder / "gpu0.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM NVTX_EVENTS WHERE eventType = 60")
        connection.commit()
    (trace,) = extract_traces(read_report(path, path))
    assert trace.collectives[["op", "step", "phase", "basis"]].to_numpy().tolist() == [
        ["all_reduce", step, "backward", BY_ORDER] for step in range(4)
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE NVTX_EVENTS SET binaryData = x'00ff'",
        "UPDATE NVTX_EVENTS SET binaryData = 'no hex'",
        "UPDATE NVTX_EVENTS SET binaryData = zeroblob(1000000)",
        "UPDATE NVTX_EVENTS SET jsonText = '[1', binaryData = NULL",
        "UPDATE NVTX_EVENTS SET jsonText = '{\"NCCL communicator ID\": {}}', binaryData = NULL",
        'UPDATE NVTX_PAYLOAD_SCHEMA_ENTRIES SET "offset" = 1000000',
        "DROP TABLE NVTX_PAYLOAD_SCHEMA_ENTRIES",
    ],
)
def test_payloads_that_cannot_be_read_are_left_out(tmp_path: Path, statement: str) -> None:
    path = GpuRun(steps=4, payload="bytes").write(tmp_path / "run") / "gpu0.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    with ReportDatabase(path) as database:
        calls = read_nccl_calls(database)
    assert calls.empty


def test_the_h100s_exchanges_are_all_to_alls_that_wait_for_gpu_1(h100: Analysis) -> None:
    with closing(sqlite3.connect(H100)) as connection:
        query = """SELECT k.start, k.end FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName
            WHERE s.value = 'ncclDevKernel_SendRecv' AND k.deviceId = ? ORDER BY k.start"""
        first, second = (np.array(connection.execute(query, (device,)).fetchall()) for device in (0, 1))
    waits = np.clip(second[:, 0] - first[:, 0], 0, first[:, 1] - first[:, 0])
    known = np.abs(second[:, 0] - first[:, 0]) > 100_000  # what the clock tells apart
    table = h100.tables["collectives"]
    assert len(table) == 66
    assert table["complete"].all()
    # The launch of the first one is older than the capture, so only its kernel tells what it is.
    assert table.groupby("op").size().to_dict() == {"all_to_all": 64, "send_recv": 2}
    assert table.loc[table["device"] == 0, "wait_s"].sum() == pytest.approx(waits[known].sum() / 1e9)
    assert table.drop_duplicates("sequence")["late_rank"].value_counts().to_dict() == {-2: 13, -1: 2}
