"""Synthetic exports of a GPU run, in the schema of nsys: two nodes of two GPUs, one process and one report a GPU.

Nothing here was recorded. Every step of every rank is the same, so that all GPU times are known beforehand. Within a
step, in milliseconds from its begin on the host:

    copy to the GPU        launched 0.2            runs  0.4 to  0.6
    forward kernel         launched 1.0            runs  2.0 to  5.0
    backward kernel        launched 1.5            runs  5.0 to  9.0, launched by autograd's own thread
    all-reduce             launched 3.0            runs  6.0 (later on the late rank) to 10.0, on a stream of its own
    optimizer kernel       launched 10.5           runs 11.0 to 12.5
    the step on the host ends at 12.0, the next one begins at 12.2
"""

import json
import sqlite3
import struct
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

MS = 1_000_000
PERIOD_NS = int(12.2 * MS)
FIRST_STEP_NS = 1_000 * MS
EPOCH_NS = 1_790_000_000_000_000_000
NODE2_CLOCK_NS = 30 * MS
"""The clock of the second node is ahead by this."""
COMMUNICATOR = 0xFEED_FACE_CAFE_BEEF
BYTES = 4_000_000

SCHEMA = """
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT, name TEXT, nameEnum INTEGER, value TEXT);
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, int64Value INTEGER, jsonText TEXT, binaryData TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
CREATE TABLE NVTX_PAYLOAD_SCHEMA_ENTRIES (domainId INTEGER, schemaId INTEGER, idx INTEGER, type INTEGER, name TEXT,
    offset INTEGER);
"""
GEMM, ADAM, NCCL, LAUNCH, COPY, SYNCHRONISE = range(6)
STRINGS = (
    "gemm", "adam", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "cudaLaunchKernel", "cudaMemcpyAsync",
    "cudaDeviceSynchronize_v3020",
)  # fmt: skip
HPCMM, COMM, NCCL_DOMAIN = 1, 2, 3


@dataclass(frozen=True)
class GpuRun:
    """What to write. ``late_ms``: how much later the all-reduce kernel of ``late_rank`` starts."""

    steps: int = 10
    late_rank: int = 3
    late_ms: float = 0.5
    annotated: bool = True
    payload: str = ""
    """How NCCL's own ranges carry the communicator: ``json``, ``bytes`` or not at all."""
    missed: int = 0
    """All-reduces that the capture of the last rank missed at its begin."""
    ranks_per_report: int = 1
    host_waits: bool = False
    """Whether the host waits for the copy, from 0.3 to 0.9, before it launches the forward kernel."""

    def write(self, folder: Path) -> Path:
        """The exports of four ranks in ``folder``."""
        folder.mkdir()
        for first in range(0, 4, self.ranks_per_report):
            path = folder / f"gpu{first}.sqlite"
            with closing(sqlite3.connect(path)) as connection:
                self._report(connection, range(first, first + self.ranks_per_report))
                connection.commit()
        return folder

    def _report(self, connection: sqlite3.Connection, ranks: range) -> None:
        node = ranks[0] // 2
        environment = [f"SLURMD_NODENAME=node{node + 1}", "SLURM_JOB_ID=7"]
        if len(ranks) == 1 and self.annotated:
            environment += [f"SLURM_PROCID={ranks[0]}", "WORLD_SIZE=4"]
        begin_export(connection, STRINGS, environment, EPOCH_NS + node * NODE2_CLOCK_NS)
        if self.payload == "bytes":
            fields = (("NCCL communicator ID", None), ("Message size [bytes]", 8))
            rows = [(NCCL_DOMAIN, 77, index, 18, name, offset) for index, (name, offset) in enumerate(fields)]
            insert(connection, "NVTX_PAYLOAD_SCHEMA_ENTRIES", *rows)
        for rank in ranks:
            _Rank(self, connection, rank).write()


def begin_export(
    connection: sqlite3.Connection, strings: Iterable[str], environment: Iterable[str], epoch_ns: int = EPOCH_NS
) -> None:
    """The tables of an export, with what its own process and nsys tell of it."""
    connection.executescript(SCHEMA)
    insert(connection, "StringIds", *enumerate(strings))
    insert(connection, "META_DATA_EXPORT", ("EXPORT_PRODUCT_VERSION", "2024.5.1.1"))
    insert(connection, "META_DATA_CAPTURE", ("CAPTURE_EVENT_TYPE", "Cuda"), ("CAPTURE_EVENT_TYPE", "NvtxEvents"))
    insert(connection, "TARGET_INFO_SESSION_START_TIME", (epoch_ns,))
    insert(connection, "TARGET_INFO_SYSTEM_ENV", (0, "", "DeviceEnvironment", 610, "\0".join(environment)))


def insert(connection: sqlite3.Connection, table: str, *rows: tuple) -> None:
    connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)  # noqa: S608


class _Rank:
    def __init__(self, run: GpuRun, connection: sqlite3.Connection, rank: int) -> None:
        self.run, self.connection, self.rank = run, connection, rank
        self.device = rank % 2
        self.process = (100 + rank) << 24
        self.thread = self.process | (100 + rank)
        self.autograd = self.thread + 1000
        self.correlation = 0

    def write(self) -> None:
        for domain, name in ((HPCMM, "hpcmm"), (COMM, "hpcmm.comm"), (NCCL_DOMAIN, "NCCL")):
            if self.run.annotated or domain == NCCL_DOMAIN:
                self.range((0, None), name, domain, kind=75)
        for step in range(self.run.steps):
            self.step(step, FIRST_STEP_NS + step * PERIOD_NS)

    def step(self, step: int, begin: int) -> None:
        def at(*milliseconds: float) -> tuple[int, ...]:
            return tuple(begin + round(each * MS) for each in milliseconds)

        if self.run.annotated:
            self.range(at(0, 12), "step", HPCMM, payload=step)
            for name, *span in (("forward", 0, 1.4), ("backward", 1.4, 4), ("optimizer", 10, 11)):
                self.range(at(*span), name, HPCMM)
            self.range(at(2.98, 3.03), f"all_reduce group=0 seq={step} bytes={BYTES}", COMM, kind=60)
        self.range(at(0.9, 1.1), f"aten::linear, seq = {step}, op_id = {step * 7}", 0)
        late = self.run.late_ms if self.rank == self.run.late_rank else 0.0
        self.launch(at(0.2), at(0.4, 0.6), COPY)
        self.launch(at(1), at(2, 5), GEMM)
        self.launch(at(1.5), at(5, 9), GEMM, thread=self.autograd)
        if not (self.rank == 3 and step < self.run.missed):
            self.range(at(2.99, 3.02), "ncclAllReduce", NCCL_DOMAIN, nccl=True)
            self.launch(at(3), at(6 + late, 10), NCCL, stream=20)
        self.launch(at(10.5), at(11, 12.5), ADAM)
        if self.run.host_waits:
            call = (*at(0.3, 0.9), 0, self.thread, 0, SYNCHRONISE, 0, None)
            insert(self.connection, "CUPTI_ACTIVITY_KIND_RUNTIME", call)

    def range(self, span, name, domain, kind=59, payload=None, nccl=False) -> None:
        text = blob = None
        if nccl and self.run.payload == "json":
            text = json.dumps({"NCCL communicator ID": str(COMMUNICATOR), "Message size [bytes]": f"{BYTES:,}"})
        if nccl and self.run.payload == "bytes":
            blob = struct.pack("<QQQQQQ", 1, 77, 16, 48, COMMUNICATOR, BYTES)
        row = (*span, kind, name, self.thread, None, None, domain, payload, text, blob)
        insert(self.connection, "NVTX_EVENTS", row)

    def launch(self, call, run, name, stream=7, thread=None) -> None:
        self.correlation += 1
        call_row = (call[0], call[0] + 10_000, 0, thread or self.thread, self.correlation, LAUNCH, 0, None)
        insert(self.connection, "CUPTI_ACTIVITY_KIND_RUNTIME", call_row)
        place = (*run, self.device, 1, stream, self.correlation, self.process)
        if name == COPY:
            insert(self.connection, "CUPTI_ACTIVITY_KIND_MEMCPY", (*place, 1000, 1))
        else:
            insert(self.connection, "CUPTI_ACTIVITY_KIND_KERNEL", (*place, name, name))
