"""Reports of a made-up training run in the schema of nsys 2022.4, for benchmarks and tests. No profiler needed.

Every rank runs the same steps: phases with collectives that all ranks leave together, ranges of other libraries, and
threads that spend their time in OS calls. The same ``RunShape`` gives the same rows each time.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

SCHEMA = """
CREATE TABLE EXPORT_META_DATA (name TEXT NOT NULL, value TEXT);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER NOT NULL, devStateName TEXT NOT NULL, name TEXT NOT NULL,
    nameEnum INTEGER NOT NULL, value TEXT NOT NULL);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT);
CREATE TABLE ANALYSIS_DETAILS (globalVid INTEGER NOT NULL, duration INTEGER NOT NULL, startTime INTEGER NOT NULL,
    stopTime INTEGER NOT NULL);
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
CREATE TABLE OSRT_API (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, nestingLevel INTEGER, callchainId INTEGER NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER,
    int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT);
"""
CUDA_SCHEMA = """
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER NOT NULL,
    gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
    blockZ INTEGER NOT NULL);
"""

FUNCTIONS = (
    "pthread_cond_wait",
    "epoll_wait",
    "poll",
    "futex",
    "pthread_mutex_lock",
    "read",
    "write",
    "recvmsg",
    "sendmsg",
    "clock_nanosleep",
    "sem_wait",
    "mmap",
    "open",
    "fopen",
    "waitpid",
    "pthread_create",
)
STEP, PHASES = "step", ("data", "forward", "backward", "optimizer")
OPS = ("aten::linear", "aten::addmm", "aten::gelu", "aten::native_layer_norm", "aten::copy_", "autograd::engine")
KERNELS = ("ampere_sgemm_128x64_tn", "vectorized_elementwise_kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL")

EPOCH_NS = 1_790_000_000_000_000_000
JOB_ID = 4711
VIRTUAL_MACHINE = 1 << 48
"""High bits of nsys's global ids, the same on every node."""
FIRST_PID = 10_000
HPCMM_DOMAIN, COMM_DOMAIN = 1, 2
STEP_NS = 400_000_000
FIRST_STEP_NS = 1_000_000_000
ROWS_PER_PIECE = 200_000


@dataclass(frozen=True, slots=True)
class RunShape:
    """How large the run and each of its reports are."""

    ranks: int = 1
    ranks_per_node: int = 8
    osrt_rows: int = 2_000_000
    threads: int = 64
    nvtx_ranges: int = 200_000
    steps: int = 1000
    collectives_per_step: int = 20
    kernels: int = 0

    @property
    def wall_ns(self) -> int:
        return FIRST_STEP_NS + self.steps * STEP_NS

    def pid(self, rank: int) -> int:
        return FIRST_PID + rank


def write_run(folder: Path, shape: RunShape) -> list[Path]:
    """An export for each rank in ``folder``. OS calls are made once and given to every rank; ranges are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / "template"
    with closing(_create(template, shape)) as connection:
        _write_osrt(connection, shape)
        if shape.kernels:
            _write_kernels(connection, shape)
    arrivals, ends = _collective_times(shape)
    paths = []
    for rank in range(shape.ranks):
        path = folder / f"rank_{rank:04d}.sqlite"
        shutil.copyfile(template, path)
        with closing(sqlite3.connect(path)) as connection:
            _write_identity(connection, shape, rank)
            _write_nvtx(connection, shape, arrivals[..., rank], ends)
            connection.commit()
        paths.append(path)
    template.unlink()
    return paths


def _create(path: Path, shape: RunShape) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
    if shape.kernels:
        connection.executescript(CUDA_SCHEMA)
    strings = (*FUNCTIONS, STEP, *PHASES, *OPS, *KERNELS, "cudaLaunchKernel", "python")
    connection.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(strings))
    connection.executemany(
        "INSERT INTO EXPORT_META_DATA VALUES (?, ?)",
        [("EXPORT_PRODUCT_VERSION", "2022.4.2.1"), ("EXPORT_SCHEMA_VERSION", "3.0.0")],
    )
    wall = shape.wall_ns
    connection.execute("INSERT INTO ANALYSIS_DETAILS VALUES (?, ?, 0, ?)", (VIRTUAL_MACHINE, wall, wall))
    connection.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?, '', '')", (EPOCH_NS,))
    # Every rank has the same pid, as in containers of their own.
    pid = shape.pid(0)
    connection.execute("INSERT INTO PROCESSES VALUES (?, ?, 'python')", (VIRTUAL_MACHINE + (pid << 24), pid))
    connection.commit()
    return connection


def _write_identity(connection: sqlite3.Connection, shape: RunShape, rank: int) -> None:
    node = f"node{rank // shape.ranks_per_node + 1:03d}"
    environment = {
        "HOME": "/home/user",
        "API_TOKEN": "a-secret",
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_PROCID": rank,
        "SLURMD_NODENAME": node,
        "RANK": rank,
        "WORLD_SIZE": shape.ranks,
    }
    rows = [
        ("Hostname", 619, node),
        ("DeviceEnvironment", 610, "\0".join(f"{k}={v}" for k, v in environment.items())),
    ]
    connection.executemany(
        f"INSERT INTO TARGET_INFO_SYSTEM_ENV VALUES ({VIRTUAL_MACHINE}, 'Local (CLI)', ?, ?, ?)",  # noqa: S608
        rows,
    )


def _string(text: str) -> int:
    """Id of ``text`` in StringIds."""
    return (*FUNCTIONS, STEP, *PHASES, *OPS, *KERNELS, "cudaLaunchKernel", "python").index(text)


def _thread(shape: RunShape, index: int | np.ndarray = 0) -> int | np.ndarray:
    """globalTid of a thread of the process; number 0 runs the steps."""
    pid = shape.pid(0)
    return VIRTUAL_MACHINE + (pid << 24) + pid + index


def _write_osrt(connection: sqlite3.Connection, shape: RunShape) -> None:
    """Calls of every thread one after another, sorted by their start as nsys writes them; waitpid is rare."""
    noise = np.random.default_rng(1)
    rows = shape.osrt_rows
    thread = noise.integers(0, shape.threads, rows)
    weights = np.array([0.01 if name == "waitpid" else 100.0 / (rank + 1) for rank, name in enumerate(FUNCTIONS)])
    function = noise.choice(len(FUNCTIONS), rows, p=weights / weights.sum())
    share = shape.wall_ns * shape.threads / max(rows, 1)
    gap = noise.exponential(0.4 * share, rows)
    length = noise.lognormal(np.log(0.25 * share), 1.0, rows)
    order = np.argsort(thread, kind="stable")
    elapsed = np.cumsum((gap + length)[order])
    first = np.searchsorted(thread[order], np.arange(shape.threads))
    base = np.concatenate(([0.0], elapsed))[first]
    end = np.empty(rows)
    end[order] = elapsed - base[thread[order]]
    start = end - length
    by_start = np.argsort(start, kind="stable")
    columns = [start.astype(np.int64), end.astype(np.int64), _thread(shape, thread), function]
    insert = "INSERT INTO OSRT_API VALUES (?, ?, 27, ?, ?, 0, 0, 0)"
    _insert(connection, insert, [np.asarray(column)[by_start] for column in columns])


def _insert(connection: sqlite3.Connection, insert: str, columns: list[np.ndarray]) -> None:
    for piece in range(0, len(columns[0]), ROWS_PER_PIECE):
        parts = [column[piece : piece + ROWS_PER_PIECE].tolist() for column in columns]
        connection.executemany(insert, zip(*parts, strict=True))
    connection.commit()


def _collective_times(shape: RunShape) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals (step, collective, rank) and common ends (step, collective), in nanoseconds of the reports."""
    noise = np.random.default_rng(2)
    slots = shape.collectives_per_step
    width = STEP_NS / (slots + 1)
    slot = FIRST_STEP_NS + np.arange(shape.steps)[:, None] * STEP_NS + (np.arange(slots) + 0.5) * width
    arrivals = slot[..., None] + noise.uniform(0, 0.3 * width, (shape.steps, slots, shape.ranks))
    ends = arrivals.max(axis=2) + noise.uniform(0.05, 0.2, (shape.steps, slots)) * width
    return arrivals.astype(np.int64), ends.astype(np.int64)


def _write_nvtx(connection: sqlite3.Connection, shape: RunShape, arrivals: np.ndarray, ends: np.ndarray) -> None:
    thread = _thread(shape)
    insert = (
        "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, endGlobalTid, textId, domainId, int64Value) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    domains = [(0, None, 75, name, thread, None, None, number, None) for number, name in _DOMAINS]
    connection.executemany(insert, domains)
    connection.executemany(insert, _annotations(shape, thread, arrivals, ends))
    annotated = shape.steps * (1 + len(PHASES) + shape.collectives_per_step)
    connection.executemany(insert, _library_ranges(shape, thread, shape.nvtx_ranges - annotated))


_DOMAINS = ((HPCMM_DOMAIN, "hpcmm"), (COMM_DOMAIN, "hpcmm.comm"))


def _annotations(
    shape: RunShape, thread: object, arrivals: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[object, ...]]:
    """Steps, phases and collectives of one rank."""
    phase_ns = STEP_NS // len(PHASES)
    for step in range(shape.steps):
        begin = FIRST_STEP_NS + step * STEP_NS
        yield begin, begin + STEP_NS - 50_000, 59, None, thread, None, _string(STEP), HPCMM_DOMAIN, step
        for index, phase in enumerate(PHASES):
            at = begin + index * phase_ns
            yield at + 20_000, at + phase_ns - 80_000, 59, None, thread, None, _string(phase), HPCMM_DOMAIN, None
        for slot in range(shape.collectives_per_step):
            sequence = step * shape.collectives_per_step + slot
            name = f"all_reduce group=0 seq={sequence} bytes=26214400"
            yield (
                int(arrivals[step, slot]),
                int(ends[step, slot]),
                60,
                name,
                thread,
                thread,
                None,
                COMM_DOMAIN,
                None,
            )


def _library_ranges(shape: RunShape, thread: object, count: int) -> Iterable[tuple[object, ...]]:
    """Short push/pop ranges of the default domain, within the steps."""
    if count <= 0:
        return ()
    noise = np.random.default_rng(3)
    span = shape.steps * STEP_NS // count
    start = FIRST_STEP_NS + np.arange(count) * span
    end = start + noise.integers(span // 4, span - 1, count)
    texts = noise.choice([_string(op) for op in OPS], count)
    columns = (start.tolist(), end.tolist(), repeat(59), repeat(None), repeat(thread), repeat(None), texts.tolist())
    return zip(*columns, repeat(0), repeat(None))


def _write_kernels(connection: sqlite3.Connection, shape: RunShape) -> None:
    """Launches spread over the steps on the step thread, and their kernels one after another on one stream."""
    noise = np.random.default_rng(4)
    count = shape.kernels
    span = shape.steps * STEP_NS // count
    launch = FIRST_STEP_NS + np.arange(count) * span + noise.integers(0, max(span // 4, 1), count)
    kernel = launch + 5_000
    length = noise.integers(span // 8, max(span // 2, span // 8 + 1), count)
    correlation = np.arange(1, count + 1)
    insert = "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, ?, 0, NULL)"
    thread = np.full(count, _thread(shape))
    called = np.full(count, _string("cudaLaunchKernel"))
    _insert(connection, insert, [launch, launch + 3_000, thread, correlation, called])
    insert = "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, 7, ?, ?, ?, ?, NULL, 1, 1, 1, 128, 1, 1)"
    process = np.full(count, VIRTUAL_MACHINE + (shape.pid(0) << 24))
    name = noise.choice([_string(kernel_name) for kernel_name in KERNELS], count, p=[0.45, 0.5, 0.05])
    _insert(connection, insert, [kernel, kernel + length, correlation, process, name, name])
