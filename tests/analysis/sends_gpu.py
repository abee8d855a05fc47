"""Exports of runs whose GPUs exchange by sends and receives, in kernels that do not tell who waits for whom.

Nothing here was recorded. In each step a rank loads data, and its GPU then computes forward and backward. A rank of a
pipeline does that for each micro-batch (GPipe: all forward, then all backward), with a kernel for what it receives, and
one for what it sends; else all ranks exchange after each layer, as those that hold experts do.
"""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from synthetic_gpu import HPCMM, MS, NCCL_DOMAIN, begin_export, insert

GEMM, SENDS, LAUNCH, SYNCHRONISE = range(4)
STRINGS = ("gemm", "ncclDevKernel_SendRecv", "cudaLaunchKernel", "cudaDeviceSynchronize_v3020")
EXCHANGE_MS = 0.5


def alike(_rank: int, _step: int, phase: str) -> float:
    """Milliseconds that a phase takes a rank: of loading, or of the kernel of a layer or micro-batch."""
    return {"data": 1.0, "forward": 4.0, "backward": 8.0}[phase]


@dataclass(frozen=True)
class SendsRun:
    """What to write."""

    work_ms: Callable[[int, int, str], float] = alike
    is_pipeline: bool = True
    ranks: int = 4
    steps: int = 12
    batches: int = 4
    """Micro-batches of a pipeline, or layers."""

    def write(self, folder: Path) -> Path:
        """One export a rank in ``folder``."""
        folder.mkdir()
        reports = [_Report(rank) for rank in range(self.ranks)]
        for step in range(self.steps):
            for report in reports:
                report.load(self.work_ms(report.rank, step, "data"))
            for phase in ("forward", "backward"):
                begins = [report.host for report in reports]
                for _ in range(self.batches):
                    if self.is_pipeline:
                        order = reports if phase == "forward" else reports[::-1]
                        self._pass_on(order, phase, step)
                    else:
                        self._exchange(reports, phase, step)
                for report, begin in zip(reports, begins, strict=True):
                    report.host = begin + MS
                    report.range(phase, begin, report.host)
            for report in reports:
                report.finish(step)
        for report in reports:
            report.save(folder / f"rank{report.rank}.sqlite", self.ranks)
        return folder

    def _exchange(self, reports: list["_Report"], phase: str, step: int) -> None:
        for report in reports:
            report.compute(self.work_ms(report.rank, step, phase))
        done = max(report.free for report in reports) + round(EXCHANGE_MS * MS)
        for report in reports:
            report.exchange(report.free, done, 1)
            report.free = done

    def _pass_on(self, order: list["_Report"], phase: str, step: int) -> None:
        """One micro-batch through all stages; a kernel that sends runs beside the computation of the next one."""
        sent, sender = 0, None
        for report in order:
            if sender is not None:
                done = max(sent, report.free) + round(EXCHANGE_MS * MS)
                pair = 2 + min(sender.rank, report.rank)
                sender.exchange(sent, done, pair, stream=21)
                report.exchange(report.free, done, pair)
                report.free = done
            report.compute(self.work_ms(report.rank, step, phase))
            sent, sender = report.free, report


class _Report:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.process = (100 + rank) << 24
        self.thread = self.process | (100 + rank)
        self.ranges: list[tuple] = []
        self.calls: list[tuple] = []
        self.kernels: list[tuple] = []
        self.begin = self.host = 1_000 * MS
        self.free = 0

    def load(self, ms: float) -> None:
        self.begin, self.host = self.host, self.host + round(ms * MS)
        self.range("data", self.begin, self.host)
        self.free = max(self.free, self.host)

    def compute(self, ms: float) -> None:
        begin, self.free = self.free, self.free + round(ms * MS)
        self.kernel(GEMM, begin, self.free, 7)

    def exchange(self, begin: int, end: int, communicator: int, stream: int = 20) -> None:
        text = json.dumps({"NCCL communicator ID": str(communicator), "Message size [bytes]": "4,000,000"})
        at = self.host + MS // 2
        self.ranges.append((at, at + 20_000, 59, "ncclSend", self.thread, None, None, NCCL_DOMAIN, None, text, None))
        self.kernel(SENDS, begin, end, stream)

    def finish(self, step: int) -> None:
        """The host waits for its GPU."""
        ended = max(self.free, self.host)
        self.calls.append((self.host, ended, 0, self.thread, 0, SYNCHRONISE, 0, None))
        self.range("optimizer", self.host, ended)
        self.range("step", self.begin, ended, step)
        self.host = self.free = ended

    def range(self, name: str, start: int, end: int, payload: int | None = None) -> None:
        self.ranges.append((start, end, 59, name, self.thread, None, None, HPCMM, payload, None, None))

    def kernel(self, name: int, start: int, end: int, stream: int) -> None:
        number, launch = len(self.kernels) + 1, self.host + MS // 2 + 5_000
        self.calls.append((launch, launch + 10_000, 0, self.thread, number, LAUNCH, 0, None))
        self.kernels.append((start, end, self.rank, 1, stream, number, self.process, name, name))

    def save(self, path: Path, ranks: int) -> None:
        environment = ["SLURMD_NODENAME=node1", "SLURM_JOB_ID=7", f"SLURM_PROCID={self.rank}", f"WORLD_SIZE={ranks}"]
        names = [
            (0, None, 75, name, self.thread, None, None, domain, None, None, None)
            for domain, name in ((HPCMM, "hpcmm"), (NCCL_DOMAIN, "NCCL"))
        ]
        with closing(sqlite3.connect(path)) as connection:
            begin_export(connection, STRINGS, environment)
            insert(connection, "NVTX_EVENTS", *names, *self.ranges)
            insert(connection, "CUPTI_ACTIVITY_KIND_RUNTIME", *self.calls)
            insert(connection, "CUPTI_ACTIVITY_KIND_KERNEL", *self.kernels)
            connection.commit()
