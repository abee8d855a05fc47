"""What is read of one nsys report, as plain data: all that the analysis knows of reports.

Times are nanoseconds of the report's own clock until :mod:`hpcmm.analysis.clock` puts all reports on one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd


@dataclass(frozen=True, slots=True)
class Identity:
    """Rank, node and job of the process that nsys started; None if the report does not tell.

    ``environment`` has every variable, with REDACTED for the values of those that may not be shown.
    """

    rank: int | None
    node: str | None
    job_id: str | None
    world_size: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """A process's place in a communicator of NCCL: of how many ranks which; None if it has several places there."""

    size: int
    rank: int | None


KERNEL, COPY, SET, GRAPH = "kernel", "copy", "set", "graph"
SYNCHRONISING, CUDA_CALL, MPI = "synchronising call", "CUDA call", "MPI"
"""Kinds of calls that can keep a host from launching: that wait for the device, other ones of CUDA, those of MPI."""
MAX_NAME_LENGTH = 256
"""Characters of a name that are read; longer names come from damaged or hostile reports."""
UNKNOWN = -1
"""A number that the report does not tell: the launch of an activity, a process id."""


CALLS_COLUMNS = ["start_ns", "end_ns", "pid", "record"]
NO_LAUNCH, RECORDED, UNRECORDED, IMPOSSIBLE = range(4)
"""What became of what a CUDA call launched: it launches nothing; the report has it; has it not; has it with times that
cannot be."""


@dataclass(frozen=True, slots=True)
class CudaEvents:
    """GPU activities and what the host did for them; times are the report's own nanoseconds.

    ``activities``, sorted by start: start_ns, end_ns, pid, device, stream, kind (category of KERNEL, COPY, SET, GRAPH),
    name (category; of kernels only), launch_ns, launch_end_ns and launch_tid of the launching call (UNKNOWN where it
    was not traced); of copies bytes, copy_kind, source and target (kinds of memory), as nsys numbers them; gpu
    (category: what tells this GPU from all others, empty if the report does not). ``ranges``: those of
    :class:`Report`.
    """

    activities: pd.DataFrame
    ranges: pd.DataFrame
    nccl_calls: pd.DataFrame
    """As :func:`hpcmm.reports.cuda.read_nccl_calls` gives them; mostly none."""
    host_calls: pd.DataFrame
    """Calls that can keep the host from launching: start_ns, end_ns, pid, tid, kind (category of SYNCHRONISING,
    CUDA_CALL if they are long, MPI) and function (category)."""
    calls: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CALLS_COLUMNS, dtype=np.int64))
    """All calls of the CUDA runtime, sorted by start: start_ns, end_ns, pid, record (NO_LAUNCH, RECORDED, ...)."""


MARK_COLUMNS = ["start_ns", "pid", "name"]
RANGE_COLUMNS = ["start_ns", "end_ns", "closed", "pid", "tid", "end_tid", "kind", "payload", "domain", "name"]
MARK, PUSH_POP, START_END = 34, 59, 60
PID_SHIFT, ID_MASK = 24, 0xFFFFFF
"""globalTid = ... pid (24 bits) tid (24 bits)."""
LOADER_NAME = "pt_data_worker"
"""What PyTorch calls the processes of its data loader."""
Integers = npt.NDArray[np.int64]

TEXT_AS_PYTHON = ("mode.string_storage", "python")
"""An option of pandas. Names of columns are texts, and in Arrow's arrays they take longer to find than a small table
takes to be worked on."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


class Parts(Enum):
    """How much of a report is read."""

    ALL = "all"
    OS_CALLS = "os calls"
    """OS calls, and what they need to be understood: steps, and the GPUs' work only if there are no steps."""


@dataclass(frozen=True, slots=True)
class Report:
    """A report that could be opened.

    ``nvtx``: start_ns, end_ns (int64; an open range ends at the report's last event), closed, pid, tid, end_tid, kind,
    domain, name, payload (nullable). ``osrt``: start_ns, end_ns, pid, tid, function (category).
    """

    path: Path
    nsys_version: str
    identity: Identity
    epoch_ns: int | None
    """What to add to a time to get UTC; None if unknown."""
    processes: dict[int, str]
    nvtx: pd.DataFrame
    osrt: pd.DataFrame
    events: int
    """Rows of the event tables, whether or not they are read."""
    first_ns: int
    last_ns: int
    domains: tuple[str, ...]
    traced: frozenset[str]
    """Of ``nvtx``, ``osrt``, ``cuda``: what left events."""
    damage: tuple[str, ...] = field(default=())
    """What could not be read, cannot be, or was lost, in a sentence each."""
    doubts: tuple[str, ...] = field(default=())
    """What may have been lost, in a sentence each."""
    lost_gpu_records: bool = False
    """Whether nsys says that records of GPUs were lost, or may have been."""
    requested: frozenset[str] = frozenset()
    """Of ``nvtx`` and ``cuda``: what nsys was asked to trace; empty if the report does not say."""
    cuda: CudaEvents | None = None
    """What its GPUs did; None if no GPU activity was traced."""
    marks: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=MARK_COLUMNS))
    """What the annotation marked in its own domain: start_ns, pid, name."""
    ranks: dict[int, int] = field(default_factory=dict)
    """Ranks by pid, of the processes that told theirs in a mark."""
    communicators: Mapping[int, Mapping[str, Member]] = field(default_factory=dict)
    """By pid the communicators that NCCL's own ranges tell the size of, by their names in ``nccl_calls``."""
    communicating: frozenset[int] = frozenset()
    """Processes that run a communication library, as its NVTX domain or the names of its threads tell."""
    parts: Parts = Parts.ALL
    """What was read of it."""
    program: str = ""
    """What nsys was told to run, without its folder; empty if the report does not say."""
    is_cut: bool = False
    """Whether it is a part of its time alone, from ``first_ns`` to ``last_ns``."""
    ranges: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=RANGE_COLUMNS))
    """Ranges of every domain (RANGE_COLUMNS), in no order. ``kind`` is PUSH_POP or START_END. ``domain`` and ``name``
    are categories; the domain ``""`` is NVTX's default one. An open range ends at the report's last event."""
