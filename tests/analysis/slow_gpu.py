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

from synthetic_gpu import ADAM, GEMM, HPCMM, LAUNCH, MS, NCCL, STRINGS, SYNCHRONISE, begin_export, insert

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
    runs_ahead: bool = False
    """The host waits for nothing, and so launches steps long before its GPU is there."""
    waits_every: int = 0
    """... but in each so many-th step for its GPU."""
    buckets: int = 1
    """All-reduces that the gradients are shared out over. Each begins when its part of the backward pass has ended, and
    runs beside the next part."""
    scatter_ms: float = 0.0
    """All-reduces end so much later on odd nodes in each second step."""

    def write(self, folder: Path) -> Path:
        """One export a rank in ``folder``."""
        folder.mkdir()
        reports = [_Report(self, rank) for rank in range(self.ranks)]
        begin = [1_000 * MS] * self.ranks
        for step in range(self.steps):
            ready = [report.compute(at) for report, at in zip(reports, begin, strict=True)]
            done = 0
            for bucket in zip(*ready, strict=True):
                arrivals = [max(at, done) for at in bucket]
                done = max(arrivals) + round(TRANSFER_MS / self.buckets * MS)
                for report, arrival in zip(reports, arrivals, strict=True):
                    report.exchange(step, arrival, done)
            begin = [report.finish(step) for report in reports]
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
        self.begin = self.loaded = self.left = self.free = 0

    def taken_ns(self, phase: str) -> int:
        return round((USUAL_MS[phase] + self.run.longer_ms.get((self.rank, phase), 0.0)) * MS)

    def compute(self, begin: int) -> list[int]:
        """Everything before the optimizer but the all-reduces; when each of these is ready to start."""
        self.begin = begin
        self.loaded = begin + self.taken_ns("data")
        self.phase("data", begin, self.loaded)
        self.phase("forward", self.loaded, self.loaded + 2 * MS)
        self.phase("backward", self.loaded + 2 * MS, self.loaded + 4 * MS)
        forward = max(self.loaded + MS, self.free)
        backward = forward + self.taken_ns("forward")
        self.kernel(GEMM, self.loaded + MS // 2, forward, backward)
        part = self.taken_ns("backward") // self.run.buckets
        ends = [backward + part * (number + 1) for number in range(self.run.buckets)]
        for end in ends:
            self.kernel(GEMM, self.loaded + 5 * MS // 2, end - part, end)
        return ends

    def exchange(self, step: int, arrival: int, done: int) -> None:
        """An all-reduce, which ends at ``done``."""
        scatter = self.run.scatter_ms if self.node % 2 else 0.0
        self.left = done + round(scatter * MS * (1 if step % 2 else 0))
        self.kernel(NCCL, self.loaded + 3 * MS, arrival, self.left, stream=20)

    def finish(self, step: int) -> int:
        """The optimizer; when the host has the step behind it."""
        ended = self.free = self.left + self.taken_ns("optimizer")
        self.kernel(ADAM, self.loaded + 9 * MS // 2, self.left, ended)
        launched = self.loaded + 5 * MS
        if self.run.runs_ahead and not (self.run.waits_every and step % self.run.waits_every == 0):
            ended = launched
        else:
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
            begin_export(connection, STRINGS, environment)
            insert(connection, "NVTX_EVENTS", self.range_row("hpcmm", 0, None, kind=75), *self.ranges)
            insert(connection, "CUPTI_ACTIVITY_KIND_RUNTIME", *self.calls)
            insert(connection, "CUPTI_ACTIVITY_KIND_KERNEL", *self.kernels)
            connection.commit()
