"""Records that cannot be are counted and left out; what nsys says of its losses is repeated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmm.reports import trust
from hpcmm.reports.events import read_report
from hpcmm.reports.report import IMPOSSIBLE, NO_LAUNCH, RECORDED, UNRECORDED, Report

if TYPE_CHECKING:
    from conftest import Export

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"
S, MS = 10**9, 10**6
CUPTI = """
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, correlationId INTEGER,
    nameId INTEGER, returnValue INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
    correlationId INTEGER, globalPid INTEGER, shortName INTEGER);
CREATE TABLE ANALYSIS_DETAILS (globalVid INTEGER, duration INTEGER, startTime INTEGER, stopTime INTEGER);
CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, severity INTEGER, text TEXT, globalPid INTEGER);
CREATE TABLE TARGET_INFO_CUDA_DEVICE (gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT);
CREATE TABLE TARGET_INFO_GPU (id INTEGER, busLocation TEXT, uuid TEXT);
"""
PROCESS = 7 << 24
THREAD = PROCESS | 7
NAMES = {1: "gemm", 2: "cudaLaunchKernel_v7000", 3: "cudaStreamBeginCapture_v10000", 4: "cudaStreamEndCapture_v10000"}


@pytest.fixture
def cuda(export: Export) -> Export:
    export.connection.executescript(CUPTI)
    return export.rows("StringIds", *NAMES.items())


def launch(cuda: Export, number: int, call: int, start: int, end: int) -> None:
    cuda.rows("CUPTI_ACTIVITY_KIND_RUNTIME", (call, call + 5_000, THREAD, number, 2, 0))
    cuda.rows("CUPTI_ACTIVITY_KIND_KERNEL", (start, end, 0, 7, number, PROCESS, 1))


def steady(cuda: Export, at: int = 150 * S) -> None:
    """Twenty kernels of 9 ms, 10 ms apart, each launched 1 ms before it begins."""
    for number in range(1, 21):
        begin = at + number * 10 * MS
        launch(cuda, number, begin - MS, begin, begin + 9 * MS)


def read(export: Export) -> Report:
    return read_report(export.path, export.path)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 0),
        (0, 150 * S + 9 * MS),
        (150 * S + 9 * MS, 150 * S),
        (5, 9),
        (148 * S, 148 * S + MS),
        (100_000 * S, 100_000 * S + MS),
        (150 * S, 100_000 * S),
    ],
    ids=["no time", "no start", "ends before it starts", "long before", "before its launch", "long after", "no end"],
)
@pytest.mark.parametrize("details", [(), ((0, 15 * S, 140 * S, 155 * S),)], ids=["no session", "session"])
def test_a_gpu_record_whose_times_cannot_be_is_left_out_and_said(
    cuda: Export, start: int, end: int, details: tuple
) -> None:
    steady(cuda)
    cuda.rows("ANALYSIS_DETAILS", *details)
    launch(cuda, 99, 150 * S + 5 * MS, start, end)
    report = read(cuda)
    assert report.damage == ("1 GPU record has times that cannot be, and is left out (CUPTI_ACTIVITY_KIND_KERNEL)",)
    assert report.cuda is not None
    assert len(report.cuda.activities) == 20
    assert (report.first_ns, report.last_ns) == (150 * S + 10 * MS, 150 * S + 209 * MS)
    assert report.cuda.calls["record"].value_counts().to_dict() == {RECORDED: 20, IMPOSSIBLE: 1}


def test_other_records_whose_times_cannot_be_are_left_out_and_said_by_table(cuda: Export) -> None:
    steady(cuda)
    cuda.rows("ANALYSIS_DETAILS", (0, 15 * S, 140 * S, 155 * S))
    for call in ((0, 0), (150 * S, 149 * S), (20 * S, 21 * S), (170 * S, 171 * S)):
        cuda.rows("CUPTI_ACTIVITY_KIND_RUNTIME", (*call, THREAD, 50, 2, 0))
    for call in ((-5, 3), (150 * S, 149 * S), (150 * S, 170 * S), (MS, 2 * MS)):
        cuda.rows("OSRT_API", (*call, 27, THREAD, 2))
    cuda.rows("OSRT_API", (0, 0, 16, THREAD, 2))
    cuda.domains()
    cuda.range(150 * S, 149 * S, "mine", domain=0).range(150 * S, 500 * S, "forever", domain=0)
    cuda.range(150 * S, 151 * S, "step", payload=0).range(151 * S, 150 * S, "step", payload=1)
    report = read(cuda)
    assert set(report.damage) == {
        "4 CUDA calls have times that cannot be, and are left out (CUPTI_ACTIVITY_KIND_RUNTIME)",
        "3 OS calls have times that cannot be, and are left out (OSRT_API)",
        "3 ranges have times or threads that cannot be, and are left out",
    }
    assert len(report.osrt) == 1
    assert report.nvtx["name"].tolist() == ["step"]
    assert report.last_ns == 151 * S


def test_work_far_behind_the_host_and_before_the_first_call_that_was_seen_is_true(cuda: Export) -> None:
    steady(cuda)
    cuda.rows("ANALYSIS_DETAILS", (0, 15 * S, 150 * S, 155 * S))
    cuda.rows("CUPTI_ACTIVITY_KIND_KERNEL", (141 * S, 142 * S, 0, 7, 500, PROCESS, 1))
    launch(cuda, 30, 150 * S, 164 * S, 165 * S)
    report = read(cuda)
    assert not report.damage
    assert report.cuda is not None
    assert len(report.cuda.activities) == 22


@pytest.mark.parametrize("recording", ["h100_2gpu_nccl.sqlite", "clean/rank_0000.sqlite"])
def test_no_record_of_a_true_capture_is_left_out(recording: str) -> None:
    report = read_report(SAMPLES / recording, SAMPLES / recording)
    assert not report.damage
    assert not report.doubts
    assert report.cuda is None or len(report.cuda.activities) == 4010 + 1020 + 269


LOST = "CUPTI dropped 48213 records. Some CUPTI events might be missing."
UNSURE = "Not all CUDA events might have been collected."


@pytest.mark.parametrize(
    ("message", "severity", "losses", "doubts", "of_gpus"),
    [
        (LOST, 2, 1, 0, True),
        ("12 events were lost because the buffer was full.", 3, 1, 0, False),
        ("Buffer overflow: OSRT events were discarded", 2, 1, 0, False),
        (UNSURE, 2, 0, 1, True),
        ("Not all NVTX events might have been collected.", 2, 0, 1, False),
        ("Some kernel records may have been lost.", 2, 0, 1, True),
        ("Number of dropped events: 0", 2, 0, 0, False),
        ("0 records were dropped", 2, 0, 0, False),
        ("No records dropped.", 2, 0, 0, False),
        (LOST, 1, 0, 0, False),
        ("Number of CUDA events collected: 4,010.", 1, 0, 0, False),
        ("No CUDA events collected. Does the process use CUDA?", 2, 0, 0, False),
    ],
)
def test_what_nsys_says_of_its_losses_is_repeated(
    cuda: Export, message: str, severity: int, losses: int, doubts: int, of_gpus: bool
) -> None:
    steady(cuda)
    cuda.rows("DIAGNOSTIC_EVENT", (0, severity, message, PROCESS), (9, severity, message, PROCESS))
    report = read(cuda)
    assert report.damage == (f'nsys says: "{message}"',) * losses
    assert report.doubts == (f'nsys says: "{message}"',) * doubts
    assert report.lost_gpu_records == of_gpus


def test_severities_are_those_of_the_export(cuda: Export) -> None:
    steady(cuda)
    cuda.connection.execute("CREATE TABLE ENUM_DIAGNOSTIC_SEVERITY_LEVEL (id INTEGER, name TEXT, label TEXT)")
    cuda.rows("ENUM_DIAGNOSTIC_SEVERITY_LEVEL", (2, "Info", "Info"), (7, "Error", "Error"))
    cuda.rows("DIAGNOSTIC_EVENT", (0, 2, "1 record was lost", None), (0, 7, "2 records were lost", None))
    assert read(cuda).damage == ('nsys says: "2 records were lost"',)


def test_doubts_about_processes_that_left_nothing_are_not_repeated(cuda: Export) -> None:
    steady(cuda)
    cuda.rows("DIAGNOSTIC_EVENT", (0, 2, UNSURE, 8 << 24))
    assert not read(cuda).doubts


def test_messages_are_bounded_and_printable(cuda: Export) -> None:
    steady(cuda)
    for number in range(3_000):
        cuda.connection.execute("INSERT INTO DIAGNOSTIC_EVENT VALUES (0, 2, ?, NULL)", (f"\x1b[31m{number} lost" * 99,))
    cuda.connection.commit()
    report = read(cuda)
    assert len(report.damage) == trust.MAX_TOLD + 1
    assert all(len(told) < 400 and told.isprintable() for told in report.damage)


def test_a_launch_that_a_graph_captures_lacks_no_record(cuda: Export) -> None:
    steady(cuda)
    for number, (name, returned) in enumerate([(2, 0), (3, 0), (2, 0), (2, 0), (4, 0), (2, 0), (2, 719)]):
        cuda.rows(
            "CUPTI_ACTIVITY_KIND_RUNTIME", (151 * S + number, 151 * S + number, THREAD, 50 + number, name, returned)
        )
    report = read(cuda)
    assert report.cuda is not None
    after = report.cuda.calls[report.cuda.calls["start_ns"] >= 151 * S]
    assert after["record"].tolist() == [UNRECORDED, NO_LAUNCH, NO_LAUNCH, NO_LAUNCH, NO_LAUNCH, UNRECORDED, NO_LAUNCH]


def test_a_call_of_the_runtime_and_the_driver_call_within_it_are_one_launch(cuda: Export) -> None:
    steady(cuda)
    cuda.rows("CUPTI_ACTIVITY_KIND_RUNTIME", (150 * S + 9 * MS + 1, 150 * S + 9 * MS + 2, THREAD, 1, 2, 0))
    report = read(cuda)
    assert report.cuda is not None
    assert report.cuda.calls["record"].tolist() == [RECORDED] * 20


@pytest.mark.parametrize(
    ("own", "of_gpu", "expected"),
    [
        ("GPU-A", "GPU-B", "uuid gpu-a"),
        (None, "GPU-B", "uuid gpu-b"),
        ("", None, "bus 0000:43:00.0"),
    ],
)
def test_the_gpu_behind_a_process_and_device_is_told(
    cuda: Export, own: str | None, of_gpu: str | None, expected: str
) -> None:
    steady(cuda)
    cuda.rows("TARGET_INFO_CUDA_DEVICE", (3, 0, 7, own), (4, 1, 7, "GPU-C"), (4, 0, 8, "GPU-C"))
    cuda.rows("TARGET_INFO_GPU", (3, "0000:43:00.0", of_gpu), (4, "0000:52:00.0", "GPU-C"))
    report = read(cuda)
    assert report.cuda is not None
    assert report.cuda.activities["gpu"].unique().tolist() == [expected]


def test_a_session_that_does_not_fit_its_events_is_not_believed(cuda: Export) -> None:
    steady(cuda)
    cuda.rows("ANALYSIS_DETAILS", (0, 15 * S, 3 * S, 18 * S))
    report = read(cuda)
    assert not report.damage
    assert report.cuda is not None
    assert len(report.cuda.activities) == 20
