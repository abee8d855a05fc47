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
    plain_name,
    timed_by_kernels,
    waits_for_all,
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
        ("ncclBroadcastRingLLKernel_copy_i8(ncclColl)", "broadcast"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send_recv"),
        ("_Z22ncclDevKernel_SendRecv24ncclDevKernelArgsStorageILm4096EE", "send_recv"),
        ("ncclKernelAllToAllv", "all_to_all"),
        ("ncclDevKernel_NewFunction_RING_LL", "nccl"),
        ("ncclMemcpyKernel", None),
        ("my_ncclDevKernel_AllReduce", None),
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
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "_Z39ncclDevKernel_AllReduce_Sum_f32_RING_LL24ncclDevKernelArgsStorageILm4096EE",
        "ncclKernel_AllReduce_RING_LL_Sum_float",
        "ncclAllReduceRingLLKernel_sum_f32",
        "ncclBroadcastRingLLKernel_copy_i8(ncclColl)",
        "ncclSymkDevKernel_AllGather_LL",
        "ncclSymDevKernel_AllReduce_RSxLD_AGxST_sum_f32",
        "ncclDevKernel_Generic",
        "ncclDevKernelDebug_Generic",
        "ncclDevKernel_Whatever_RING_LL",
        "ncclKernelAllGatherCtranDirect",
        "ncclKernelAllToAllv",
        "ncclKernelSend",
        "vllm::cross_device_reduce_2stage",
        "cross_device_reduce_1stage",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*, vllm::RankSignals, "
        "vllm::Signal*, __nv_bfloat16*, int, int)",
        "_ZN4vllm26cross_device_reduce_1stageI13__nv_bfloat16Li8EEEvPNS_8RankDataENS_11RankSignalsEPNS_6SignalEPT_ii",
        "cross_device_reduce_2stage_naive",
        "vllm::cross_device_all_gather",
        "vllm::cross_device_reduce_scatter",
        "vllm::mnnvl_lamport_all_gather",
        "vllm::mnnvl_lamport_reduce_scatter_kernel",
        "tensorrt_llm::kernels::oneShotAllReduceKernel",
        "tensorrt_llm::kernels::twoShotAllReduceKernel",
        "lowPrecisionTwoShotAllReduceKernel",
        "lowPrecisionTwoShotHierAllReduceKernel",
        "tensorrt_llm::kernels::reduce_fusion::lamport_style_one_shot_all_reduce_norm_kernel",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<(flashinfer::trtll"
        "m_allreduce_fusion::AllReduceFusionPattern)1, __nv_bfloat16, 2, true, true>(flashinfer::trtllm_allre"
        "duce_fusion::AllReduceFusionParams<__nv_bfloat16>)",
        "allreduce_fusion_kernel_twoshot_sync",
        "moereduce_allreduce_fusion_kernel_oneshot_lamport",
        "moefinalize_allreduce_fusion_kernel_oneshot_lamport",
        "flashinfer::trtllm_mnnvl_allreduce::twoshotAllreduceKernel",
        "oneshotAllreduceFusionKernel",
        "flashinfer::mixed_comm::fused_reducescatter_allreduce_kernel",
        "flashinfer::mixed_comm::allgather_kernel",
        "helixAllToAllKernel",
        "quickreduce::allreduce_prototype_twoshot",
        "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*, unsigned long)",
        "_ZN12_GLOBAL__N_126multimem_all_reduce_kernelIN3c108BFloat16ELi16EEEvPT_mPPjmm",
        "_ZN75_GLOBAL__N__00000000_26_CUDASymmetricMemoryOps_cu_1234abcd_00_00000000_123426multimem_all_reduc"
        "e_kernelIfEEvv",
        "multimem_one_shot_all_reduce_kernel",
        "multimem_one_shot_reduce_kernel",
        "one_shot_all_reduce_kernel",
        "two_shot_all_reduce_kernel_inplace",
        "_multimem_all_gather_kernel",
        "c10d::symmetric_memory::barrier_kernel",
        "c10d::intra_node_comm::hybridCubeMeshAllReduceKernel",
        "exchangeSplitAndOffset",
        "allToAllV",
        "allToAllV_2d",
        "nvshmemi_transfer_rma_internode",
        "nvshmemi_proxy_rma_entrypoint",
        "nvshmemi_signal_wait_until_on_stream_kernel",
        "barrier_on_stream_kernel_threadgroup",
        "void alltoall_on_stream_kernel<int>(int, int*, int const*, unsigned long)",
        "barrier_all_on_stream_kernel_warp",
        "deep_ep::intranode::dispatch",
        "deep_ep::internode_ll::combine",
        "deep_ep::legacy::intranode::cached_notify_combine",
        "deep_ep::elastic::dispatch_impl",
        "deep_ep::elastic::pp_send_impl",
        "deep_ep::internode::notify_dispatch",
        "uccl::intranode::dispatch",
        "dpsk::ep::internode::dispatch_ll",
        "notify_dispatch",
        "cached_notify_combine",
        "tensorrt_llm::kernels::moe_comm::moeAllToAllKernel",
        "tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel",
        "moeA2ADispatchKernel",
        "a2a_dispatch_send_kernel",
        "mscclKernel_Sum_float",
        "mscclpp::allreduce_packet",
        "mscclpp::executionKernel",
        "allreduceAllPairs",
        "mscclpp::collective::allreduceNvlsWarpPipeline",
        "allreduceRsAgZeroCopy",
        "allgatherFullmesh2",
        "allreduce_packet",
        "allreduce_LL_1node",
        "allreduce7",
        "userbuffers_fp16_sum_inplace_gpu_rr_rs_oop",
        "kuserbuffers_pushsend",
        "rcclGenericKernel",
        "ucc_ec_cuda_reduce_kernel",
        "allreduce_bf16_kernel",
        "inkling_two_shot_all_reduce_kernel",
        "AllReduceKernelImpl",
        "PureGinAlltoAllKernel",
        "HybridAlltoAllKernel",
        "twoshot_mc_simple_allreduce_kernel",
        "dlslime::intranode_alltoall_kernel",
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
        "deep_ep::legacy::layout::get_dispatch_layout",
        "deep_ep::elastic::combine_reduce_epilogue_impl",
        "warpAllReduce",
        "block_all_reduce_sum_f32",
        "triton_poi_fused_add_all_reduce_wait_tensor_3",
        "triton_red_fused_all_gather_into_tensor_0",
        "GemmAllReduceKernel",
        "at::native::reduce_kernel",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float,"
        " at::native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float"
        ")#1}>, unsigned int, float, 4>>",
        "at::native::vectorized_gather_kernel",
        "scatter_reduce",
        "construct_product",
        "",
        "all_reduce_loss_fwd",
        "reduce_scatter_indices",
        "MoeAllToAllPermute",
        "fused_add_mpi_kernel",
        "ncclMemcpyKernel",
        "allgather_embedding_lookup",
        "my_ncclDevKernel_AllReduce",
        "nccl",
        "ncclTest",
        "all_gather_copy_out",
        "void mylib::all_reduce_loss_fwd<float>(float const*)",
        "_Z19all_reduce_loss_fwdPKfPfi",
        "symmetric_memory_pool_init",
        "multimem_softmax",
        "moe_comm_cost_kernel",
        "userbuffer_copy",
        "msccl",
        "cutlass::Kernel<AllReduce>",
        "tensorrt_llm::kernels::moe_comm::moeA2APrepareDispatchKernel",
        "computeSendRecvIndicesKernel",
        "all",
        "reduce_kernel",
        "gather_kernel",
        "nvshmemi_init_array_kernel",
        "mpi_pack_kernel",
        "segment_reduce_scatter",
        "reduce_scatter_add",
        "RowwiseAllGatherCheck",
    ],
)
def test_kernels_that_compute(name: str) -> None:
    assert not communicates(name)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("void at::native::reduce_kernel<512, 1, at::A<float>::B>(at::C<(int)1>)", "at::native::reduce_kernel"),
        ("std::enable_if<(1 > 0), void>::type lib::kernel<float>(float*)", "lib::kernel"),
        ("_ZN4vllm26cross_device_reduce_1stageI4halfLi8EEEvPNS_8RankDataE", "vllm::cross_device_reduce_1stage"),
        ("_Z4gemmPf", "gemm"),
        ("gemm", "gemm"),
        ("", ""),
    ],
)
def test_of_any_form_of_a_name_the_plain_one_is_looked_at(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("vllm::cross_device_reduce_1stage", True),
        ("void flashinfer::allreduce_fusion_kernel_twoshot_sync<1>(int)", True),
        ("tensorrt_llm::kernels::oneShotAllReduceKernel", True),
        ("deep_ep::intranode::dispatch", False),
        ("allToAllV", False),
        ("ncclDevKernel_SendRecv", False),
    ],
)
def test_in_an_all_reduce_all_wait_for_all(name: str, waits: bool) -> None:
    assert waits_for_all(name) == waits


DEEP_EP = ["dispatch", "combine"]


@pytest.mark.parametrize(
    ("own", "beside", "count"),
    [
        (DEEP_EP, [], 0),
        (DEEP_EP, ["gemm"], 0),
        (DEEP_EP, ["cross_device_reduce_1stage"], 2),
        (DEEP_EP, ["ncclDevKernel_AllReduce_Sum_f32_RING_LL"], 2),
        (["combine"], ["ncclDevKernel_AllReduce_Sum_f32_RING_LL"], 0),
        (["dispatch"], ["ncclDevKernel_AllReduce_Sum_f32_RING_LL"], 0),
        (["combine"], ["cross_device_reduce_1stage"], 0),
        (["dispatch"], ["nvshmemi_proxy_rma_entrypoint"], 1),
        (["combine"], ["cached_notify_combine"], 1),
        (["dispatch", "combine"], ["get_dispatch_layout"], 2),
        (DEEP_EP, ["mylib::gemm", "cross_device_reduce_1stage"], 0),
        (["dispatch_impl", "combine_impl"], ["ncclDevKernel_SendRecv"], 2),
        (["void dispatch<8>(int*)"], ["void at::native::fill<1>(int*)", "cross_device_reduce_1stage"], 0),
    ],
)
def test_dispatch_and_combine_count_by_what_runs_beside_them(own, beside, count: int) -> None:
    names = [*own, *beside]
    found = is_communication(pd.DataFrame({"kind": ["kernel"] * len(names), "name": pd.Categorical(names)}))
    assert found[: len(own)].sum() == count
    assert found[len(own) :].tolist() == [communicates(name) for name in beside]


def test_a_name_that_no_kernel_of_the_gpu_has_tells_nothing() -> None:
    names = pd.Categorical(["dispatch", "gemm"], categories=["dispatch", "gemm", "mylib::fill", "notify_dispatch"])
    assert not is_communication(pd.DataFrame({"kind": ["kernel"] * 2, "name": names})).any()


def test_names_of_any_length_are_read() -> None:
    for name in ("1d" * 10_000, "_Z" + "1a" * 10_000, "a<" * 10_000, "deep_ep::" + "a_epilogue" * 2_000 + "!"):
        assert not communicates(f"gemm{name}")


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
