"""Exports of a run whose hosts run ahead of their GPUs, so that only kernels tell what a GPU took longer over.

Nothing here was recorded. In each step the host loads for 2 ms with an idle GPU, launches forward, backward, the
all-reduce and the optimizer within 4 ms, and then waits for the GPU in phase ``optimizer``, as ``loss.item()`` does.
Kernels run one after the other: forward 10 ms, backward 20 ms, the all-reduce from there until 5 ms after the last rank
has come, optimizer 3 ms.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from synthetic_gpu import ADAM, EPOCH_NS, GEMM, HPCMM, LAUNCH, MS, NCCL, SCHEMA, STRINGS, SYNCHRONISE, insert

USUAL_MS = {"data": 2.0, "forward": 10.0, "backward": 20.0, "optimizer": 3.0}
TRANSFER_MS = 5.0


@dataclass(frozen=True)
class SlowGpuRun:
    """What to write."""

    ranks: int = 4
    ranks_per_node: int = 2
    steps: int = 12
    longer_ms: Mapping[tuple[int, str], float] = field(default_factory=dict)
    """By rank and phase: kernels that take longer, or loading that does."""
    scatter_ms: float = 0.0
    """All-reduces end so much later on odd nodes in each second step."""

    def write(self, folder: Path) -> Path:
        """One export a rank in ``folder``."""
        folder.mkdir()
        reports = [_Report(self, rank) for rank in range(self.ranks)]
        begin = [1_000 * MS] * self.ranks
        for step in range(self.steps):
            arrivals = [report.compute(at) for report, at in zip(reports, begin, strict=True)]
            done = max(arrivals) + round(TRANSFER_MS * MS)
            begin = [report.exchange(step, done) for report in reports]
        for rank, report in enumerate(reports):
            report.save(folder / f"rank{rank}.sqlite")
        return folder


class _Report:
    def __init__(self, run: SlowGpuRun, rank: int) -> None:
        self.run, self.rank = run, rank
        self.node = rank // run.ranks_per_node
        self.process = (100 + rank) << 24
        self.thread = self.process | (100 + rank)
        self.ranges: list[tuple] = []
        self.calls: list[tuple] = []
        self.kernels: list[tuple] = []
        self.begin = self.arrival = 0

    def taken_ns(self, phase: str) -> int:
        return round((USUAL_MS[phase] + self.run.longer_ms.get((self.rank, phase), 0.0)) * MS)

    def compute(self, begin: int) -> int:
        """Everything before the all-reduce; when its kernel starts."""
        self.begin = begin
        self.loaded = begin + self.taken_ns("data")
        self.phase("data", begin, self.loaded)
        self.phase("forward", self.loaded, self.loaded + 2 * MS)
        self.phase("backward", self.loaded + 2 * MS, self.loaded + 4 * MS)
        forward = self.loaded + MS
        backward = forward + self.taken_ns("forward")
        self.arrival = backward + self.taken_ns("backward")
        self.kernel(GEMM, self.loaded + MS // 2, forward, backward)
        self.kernel(GEMM, self.loaded + 5 * MS // 2, backward, self.arrival)
        return self.arrival

    def exchange(self, step: int, done: int) -> int:
        """The all-reduce, which ends at ``done``, and the optimizer; when the host has them behind it."""
        scatter = self.run.scatter_ms if self.node % 2 else 0.0
        left = done + round(scatter * MS * (1 if step % 2 else 0))
        self.kernel(NCCL, self.loaded + 3 * MS, self.arrival, left, stream=20)
        ended = left + self.taken_ns("optimizer")
        self.kernel(ADAM, self.loaded + 9 * MS // 2, left, ended)
        launched = self.loaded + 5 * MS
        self.calls.append((launched, ended, 0, self.thread, 0, SYNCHRONISE, 0, None))
        self.phase("optimizer", self.loaded + 4 * MS, ended)
        self.ranges.append(self.range_row("step", self.begin, ended, step))
        return ended + MS // 10

    def phase(self, name: str, start: int, end: int) -> None:
        self.ranges.append(self.range_row(name, start, end))

    def range_row(self, name: str, start: int, end: int | None, payload: int | None = None, kind: int = 59) -> tuple:
        return (start, end, kind, name, self.thread, None, None, HPCMM, payload, None, None)

    def kernel(self, name: int, launch: int, start: int, end: int, stream: int = 7) -> None:
        number = len(self.kernels) + 1
        self.calls.append((launch, launch + 10_000, 0, self.thread, number, LAUNCH, 0, None))
        self.kernels.append(
            (start, end, self.rank % self.run.ranks_per_node, 1, stream, number, self.process, name, name)
        )

    def save(self, path: Path) -> None:
        environment = [f"SLURMD_NODENAME=node{self.node}", "SLURM_JOB_ID=7", f"SLURM_PROCID={self.rank}"]
        environment.append(f"WORLD_SIZE={self.run.ranks}")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA)
            insert(connection, "StringIds", *enumerate(STRINGS))
            insert(connection, "META_DATA_EXPORT", ("EXPORT_PRODUCT_VERSION", "2024.5.1.1"))
            insert(
                connection, "META_DATA_CAPTURE", ("CAPTURE_EVENT_TYPE", "Cuda"), ("CAPTURE_EVENT_TYPE", "NvtxEvents")
            )
            insert(connection, "TARGET_INFO_SESSION_START_TIME", (EPOCH_NS,))
            insert(connection, "TARGET_INFO_SYSTEM_ENV", (0, "", "DeviceEnvironment", 610, "\0".join(environment)))
            insert(connection, "NVTX_EVENTS", self.range_row("hpcmm", 0, None, kind=75), *self.ranges)
            insert(connection, "CUPTI_ACTIVITY_KIND_RUNTIME", *self.calls)
            insert(connection, "CUPTI_ACTIVITY_KIND_KERNEL", *self.kernels)
            connection.commit()
