"""Steps of programs of any kind whose GPUs communicate without NCCL, clear memory, or copy from one to another."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze

MS = 1_000_000
STEPS, STEP_MS = 12, 20
SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_EXPORT (name TEXT, value TEXT);
CREATE TABLE META_DATA_CAPTURE (name TEXT, value TEXT);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT, name TEXT, nameEnum INTEGER, value TEXT);
CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER, textId INTEGER,
    domainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, eventClass INTEGER, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER, returnValue INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER, shortName INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
    correlationId INTEGER, globalPid INTEGER, value INTEGER, bytes INTEGER, memKind INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
    correlationId INTEGER, globalPid INTEGER, bytes INTEGER, copyKind INTEGER, srcKind INTEGER, dstKind INTEGER,
    srcDeviceId INTEGER, dstDeviceId INTEGER);
"""
SET = "memset"


class Run(NamedTuple):
    """One activity of each step: a kernel by its name, SET, or a copy, from and to in milliseconds of the step."""

    name: str
    start_ms: float
    end_ms: float
    copy: tuple[int, int | None, int | None] | None = None
    """copyKind, srcDeviceId and dstDeviceId."""
    device: int = 0


Work = Callable[[int], Sequence[Run]]
"""What a rank's GPU does in a step of that number."""


def write(folder: Path, *ranks: Work, world: int = 0, steps: bool = True) -> Path:
    folder.mkdir()
    for rank, work in enumerate(ranks):
        with closing(sqlite3.connect(folder / f"rank{rank}.sqlite")) as connection:
            connection.executescript(SCHEMA)
            _write_rank(connection, rank, work, world or len(ranks), steps)
            connection.commit()
    return folder


def _write_rank(connection: sqlite3.Connection, rank: int, work: Work, world: int, steps: bool) -> None:
    names = {"cudaLaunchKernel": 1}
    process = (100 + rank) << 24
    thread = process | (100 + rank)

    def insert(table: str, *row: object) -> None:
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608

    insert("META_DATA_EXPORT", "EXPORT_PRODUCT_VERSION", "2024.5.1.1")
    insert("META_DATA_CAPTURE", "CAPTURE_EVENT_TYPE", "Cuda")
    insert("TARGET_INFO_SESSION_START_TIME", 1_790_000_000_000_000_000)
    variables = f"SLURMD_NODENAME=node1\0SLURM_PROCID={rank}\0SLURM_LOCALID={rank}\0WORLD_SIZE={world}"
    insert("TARGET_INFO_SYSTEM_ENV", 0, "", "DeviceEnvironment", 610, variables)
    correlation = 0
    for step in range(STEPS):
        begin = (1000 + step * STEP_MS) * MS
        if steps:
            insert("NVTX_EVENTS", begin, begin + STEP_MS * MS - 1000, 59, f"iteration {step}", thread, None, 0)
        for run in work(step):
            correlation += 1
            start, end = begin + round(run.start_ms * MS), begin + round(run.end_ms * MS)
            launch = max(begin, start - MS)
            insert("CUPTI_ACTIVITY_KIND_RUNTIME", launch, launch + 2000, 0, thread, correlation, 1, 0)
            place = (start, end, run.device, 7, correlation, process)
            if run.copy is not None:
                kind, source, target = run.copy
                insert("CUPTI_ACTIVITY_KIND_MEMCPY", *place, 1 << 20, kind, 2, 2, source, target)
            elif run.name == SET:
                insert("CUPTI_ACTIVITY_KIND_MEMSET", *place, 0, 1 << 20, 2)
            else:
                name = names.setdefault(run.name, len(names) + 1)
                insert("CUPTI_ACTIVITY_KIND_KERNEL", *place, name, name)
    for value, number in names.items():
        insert("StringIds", number, value)


REDUCE = "vllm::cross_device_reduce_1stage"
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL"


def split(at_ms: float, *names: str) -> Work:
    """A gemm until ``at_ms``, then each of ``names`` for an equal part of the rest of the step."""
    each = (STEP_MS - 1 - at_ms) / len(names)
    runs = [Run(name, at_ms + index * each, at_ms + (index + 1) * each) for index, name in enumerate(names)]
    return lambda _step: [Run("gemm", 0, at_ms), *runs]


def by_turns(rank: int) -> Work:
    """Every second step a long gemm, and a long kernel that communicates in the others."""
    return lambda step: split(8 if (step + rank) % 2 else 17, REDUCE)(step)


def causes(run: Analysis) -> list[str]:
    return list(run.bottlenecks()["cause"])


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name",
    [REDUCE, "multimem_all_reduce_kernel", "nvshmemi_proxy_rma_entrypoint", "deep_ep::intranode::dispatch",
     "mscclpp::executionKernel", "userbuffers_fp16_sum_inplace_gpu_rw",
     "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*, int)",
     "_ZN4vllm26cross_device_reduce_1stageI13__nv_bfloat16Li2EEEvPNS_8RankDataEi"],
)  # fmt: skip
def test_communication_in_steps_that_nothing_matches_has_a_row(tmp_path: Path, name: str) -> None:
    run = analyze(write(tmp_path / "run", split(8, name), split(8, name)))
    row = run.bottlenecks().iloc[0]
    assert row["cause"] == "communication, transfer or waiting"
    assert row["lost_s_per_step"] == pytest.approx(0.011)
    assert row["step_share"] == pytest.approx(0.55, abs=0.001)
    assert row["confidence"] == "low"
    assert pd.isna(row["rank"])
    for told in ("0.011 s a step", "transfer cannot be told from waiting", f"100% of their time in {name}"):
        assert told in row["evidence"]
    assert "computation" in row["suggestion"]
    assert run.bottlenecks()["step_share"].sum() <= 1.0


@pytest.mark.parametrize("name", ["all_reduce_loss_fwd", "MoeAllToAllPermute", "ncclMemcpyKernel", "combine"])
def test_kernels_that_only_sound_like_communication_compute(tmp_path: Path, name: str) -> None:
    run = analyze(write(tmp_path / "run", *[split(8, name, name, name, NCCL)] * 2))
    assert "communication, transfer or waiting" not in causes(run)
    kernels = run.kernels()
    assert set(kernels.loc[kernels["communication"], "name"]) == {NCCL}
    assert run.gpu()["comm_s"].sum() == pytest.approx(2 * STEPS * 0.011 / 4)


def test_what_matched_collectives_account_for_is_not_counted_again(tmp_path: Path) -> None:
    run = analyze(write(tmp_path / "run", *[split(8, NCCL, REDUCE)] * 2))
    table = run.bottlenecks().set_index("cause")["lost_s_per_step"]
    assert table["communication, transfer or waiting"] == pytest.approx(0.0055)
    assert table[[cause.startswith("communication transfer") for cause in table.index]].sum() == pytest.approx(0.0055)
    only_nccl = analyze(write(tmp_path / "nccl", *[split(8, NCCL)] * 2))
    assert "communication, transfer or waiting" not in causes(only_nccl)
    assert only_nccl.bottlenecks()["lost_s_per_step"].iloc[0] == pytest.approx(0.011)


def test_of_kernels_that_run_at_once_or_behind_computation_only_the_exposed_time_counts(tmp_path: Path) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8), Run(REDUCE, 4, 12), Run(REDUCE, 10, 14), Run(NCCL, 13, 16)]

    table = analyze(write(tmp_path / "run", work, work)).bottlenecks().set_index("cause")["lost_s_per_step"]
    assert table["communication, transfer or waiting"] == pytest.approx(0.005)
    assert table.filter(like="communication transfer").sum() == pytest.approx(0.003)


def test_ranks_without_a_report_are_told(tmp_path: Path) -> None:
    row = analyze(write(tmp_path / "run", *[split(8, REDUCE)] * 2, world=8)).bottlenecks().iloc[0]
    assert row["cause"] == "communication, or waiting for ranks without a report"
    assert "6 of 8 ranks have no report" in row["evidence"]
    assert "capture each rank" in row["suggestion"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rank_whose_kernels_are_far_shorter_is_waited_for(tmp_path: Path, ranks: int) -> None:
    late, others = split(17, REDUCE), [split(8, REDUCE)] * (ranks - 1)
    run = analyze(write(tmp_path / "run", *others, late))
    row = run.bottlenecks().iloc[0]
    assert (row["cause"], row["rank"], row["confidence"]) == ("imbalance between GPUs", ranks - 1, "medium")
    assert row["lost_s_per_step"] == pytest.approx(0.009 * (ranks - 1) / ranks)
    assert "in 11 of 11 steps" in row["evidence"]
    assert "its GPU computes 0.009 s a step longer" in row["evidence"]
    rest = run.bottlenecks().set_index("cause").loc["communication, transfer or waiting"]
    assert rest["lost_s_per_step"] == pytest.approx(0.002)
    assert run.bottlenecks()["step_share"].sum() <= 1.0


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "ranks",
    [
        [split(8, REDUCE), split(17, REDUCE, REDUCE)],  # not equally often
        [split(8, REDUCE), split(17, "multimem_all_reduce_kernel")],  # not the same kernel
        [split(8, "deep_ep::intranode::dispatch"), split(17, "deep_ep::intranode::dispatch")],  # by their tokens
        [split(8, REDUCE), split(13, REDUCE), split(17, REDUCE)],  # the others are not alike
        [split(8, REDUCE), split(9, REDUCE)],  # hardly shorter
        [by_turns(0), by_turns(1)],
        [split(8, REDUCE), lambda step: [*split(8, REDUCE)(step), Run("gemm", 8, 17)]],  # hidden, and as long
    ],
)
def test_nobody_is_named_if_it_is_not_clear(tmp_path: Path, ranks: list[Work]) -> None:
    table = analyze(write(tmp_path / "run", *ranks)).bottlenecks()
    assert table["rank"].isna().all()
    assert table["cause"].iloc[0] == "communication, transfer or waiting"


@pytest.mark.few(4)
@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize(
    "name",
    ["ncclDevKernel_SendRecv", "ncclDevKernel_NewFunction_RING_LL", "ncclSymkDevKernel_AllReduce_AGxLL_R_sum_f32"],
)
def test_nccl_s_kernels_of_any_function_have_one_row(tmp_path: Path, name: str, steps: bool) -> None:
    run = analyze(write(tmp_path / "run", *[split(8, name)] * 2, steps=steps))
    rows = run.bottlenecks()
    rows = rows[rows["cause"].str.contains("communication|transfer")]
    assert len(rows) == 1
    tells_who_waits = not steps or name == "ncclSymkDevKernel_AllReduce_AGxLL_R_sum_f32"
    assert ("part of this may be waiting" in rows["evidence"].iloc[0]) == (not tells_who_waits)
    assert (rows["confidence"].iloc[0] == "low") == (not tells_who_waits)
    assert rows["lost_s_per_step"].iloc[0] == pytest.approx(0.011 * (1 if steps else STEPS), rel=0.01)


@pytest.mark.parametrize(("names", "cause"), [((REDUCE,), "transfer or waiting"), ((NCCL, NCCL, REDUCE), "transfer")])
def test_without_steps_transfer_is_told_of_nccl_alone(tmp_path: Path, names: tuple[str, ...], cause: str) -> None:
    run = analyze(write(tmp_path / "run", *[split(8, *names)] * 2, steps=False))
    rows = run.bottlenecks()
    row = rows[rows["cause"].str.startswith("communication")].iloc[0]
    assert row["cause"].endswith(cause)
    assert row["lost_s_per_step"] == pytest.approx(0.011 * STEPS)
    assert (row["confidence"] == "low") == (cause == "transfer or waiting")


def test_nccl_s_kernels_of_several_gpus_of_a_process_have_a_row(tmp_path: Path) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8), Run(NCCL, 8, 16), Run("gemm", 0, 6, device=1), Run(NCCL, 6, 16, device=1)]

    row = analyze(write(tmp_path / "run", work)).bottlenecks().iloc[0]
    assert row["cause"] == "communication, transfer or waiting"
    assert row["lost_s_per_step"] == pytest.approx(0.009)


def test_nccl_s_kernels_of_unknown_launch_count_in_the_step_that_they_begin_in(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", split(8, NCCL), split(8, NCCL))
    for report in folder.iterdir():
        with closing(sqlite3.connect(report)) as connection:
            connection.execute("DELETE FROM CUPTI_ACTIVITY_KIND_RUNTIME")
            connection.commit()
    row = analyze(folder).bottlenecks().iloc[0]
    assert row["cause"] == "communication transfer"
    assert row["lost_s_per_step"] == pytest.approx(0.011)


def test_a_late_rank_that_something_else_names_is_not_counted_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", split(8, REDUCE), split(17, REDUCE))
    for rank, loads_ms in ((0, 1), (1, 10)):
        with closing(sqlite3.connect(folder / f"rank{rank}.sqlite")) as connection:
            connection.execute(
                "INSERT INTO NVTX_EVENTS SELECT start, start + ?, 59, 'data_loading', globalTid, NULL, 0 "
                "FROM NVTX_EVENTS WHERE text LIKE 'iteration%'",
                (loads_ms * MS,),
            )
            connection.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE start % 20000000 < 8000000 AND ?", (rank,))
            connection.commit()
    table = analyze(folder).bottlenecks()
    assert (table["cause"].iloc[0], table["rank"].iloc[0]) == ("data loading", 1)
    assert "imbalance between GPUs" not in set(table["cause"])
    assert table["step_share"].sum() <= 1.0


@pytest.mark.parametrize("steps", [True, False])
def test_memory_sets_are_no_copies(tmp_path: Path, steps: bool) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8), Run(SET, 6, 12), Run("copy", 12, 14, copy=(8, None, None)), Run(SET, 13, 15)]

    run = analyze(write(tmp_path / "run", work, work, steps=steps))
    count = 1 if steps else STEPS
    rows = run.bottlenecks().set_index("cause")
    assert rows.loc["memory sets without computation", "lost_s_per_step"] == pytest.approx(0.005 * count)
    assert rows.loc["copies without computation", "lost_s_per_step"] == pytest.approx(0.002 * count)
    assert "zero_grad(set_to_none=True)" in rows.loc["memory sets without computation", "suggestion"]
    assert "copies device to device" not in rows.loc["memory sets without computation", "evidence"]
    assert "zero_grad" not in rows.loc["copies without computation", "suggestion"]
    gpu = run.gpu()
    assert gpu["set_s"].sum() == pytest.approx(2 * 0.005 * STEPS)
    assert gpu["memory_s"].sum() == pytest.approx(2 * 0.009 * STEPS)
    assert run.copies()["copies"].sum() == 2 * STEPS
    drawn = pd.concat([trace.device_time for trace in run.study.traces])
    seconds = (drawn["end_ns"] - drawn["start_ns"]).groupby(drawn["doing"]).sum() / 1e9
    assert seconds[["memory sets", "copies"]].to_numpy() == pytest.approx([2 * 0.005 * STEPS, 2 * 0.002 * STEPS])


def test_memory_sets_beside_copies_alone_leave_the_advice_to_the_copies(tmp_path: Path) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8), Run("copy", 8, 16, copy=(8, None, None)), Run(SET, 9, 15)]

    run = analyze(write(tmp_path / "run", work, work))
    assert "memory sets without computation" not in causes(run)
    assert run.bottlenecks().set_index("cause").loc["copies without computation", "lost_s_per_step"] == pytest.approx(
        0.008
    )


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("copy", "direction"),
    [
        ((10, 0, 1), "peer to peer"),
        ((10, None, None), "peer to peer"),
        ((8, 0, 1), "peer to peer"),
        ((8, 1, None), "peer to peer"),
        ((8, None, 1), "peer to peer"),
        ((8, 0, 0), "device to device"),
        ((8, None, None), "device to device"),
        ((1, None, 1), "host to device"),
        ((13, 0, 1), "device to device"),
    ],
)
def test_copies_between_gpus_are_told_from_copies_within_one(tmp_path: Path, copy, direction: str) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8), Run("copy", 8, 18, copy=copy)]

    run = analyze(write(tmp_path / "run", work, work))
    assert set(run.copies()["direction"]) == {direction}
    row = run.bottlenecks().iloc[0]
    assert row["cause"] == "copies without computation"
    between = "copies between GPUs (peer to peer)" in row["evidence"]
    assert between == ("copies between GPUs" in row["suggestion"]) == (direction == "peer to peer")


def test_all_devices_may_be_told_as_zero(tmp_path: Path) -> None:
    def work(_step: int) -> list[Run]:
        return [Run("gemm", 0, 8, device=1), Run("copy", 8, 18, copy=(8, 0, 0), device=1)]

    assert set(analyze(write(tmp_path / "run", work)).copies()["direction"]) == {"device to device"}
