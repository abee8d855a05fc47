"""What the analysis keeps of one rank: steps, phases, collectives and waits, small beside the report they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet, Times
from hpcmm.annotate.schema import GroupMark
from hpcmm.reports.report import Member

OTHER = "other"
"""Time within a step that no phase covers."""
OUTSIDE = -1
"""Step number of phases that lie outside any step, such as a last checkpoint."""
LAUNCHER, WORKER, DATA_LOADER, OTHER_PROCESS = "launcher", "worker", "data_loader", "other"

SUPERVISION, OP_BUILD, LOADING, WITHIN_STEP, OTHER_WAIT = (
    "benign supervision",
    "op build",
    "data loader",
    "within step",
    "other",
)
COLLECTIVE_COLUMNS = [
    "op",
    "group",
    "sequence",
    "occurrence",
    "bytes",
    "start_ns",
    "end_ns",
    "closed",
    "step",
    "phase",
]
NO_PEER = -1
"""In column ``peer`` of collectives, which may be absent: no range tells an operation's other rank or root."""

UNEVEN = ["sent", "received"]
"""Bytes of an all-to-all's input and output, in columns that may be absent; NO_SIZE where both are ``bytes``."""
NO_SIZE = -1

OnClock = Callable[[Times], Times]
"""Maps a report's own times to the common clock."""


@dataclass(frozen=True, slots=True)
class RankTrace:
    """One training process of one report. All times are nanoseconds of one clock: the report's, then the run's."""

    rank: int
    node: str
    pid: int
    report: str
    steps: pd.DataFrame
    segments: pd.DataFrame
    collectives: pd.DataFrame
    blocked: IntervalSet | None
    """When the step thread waited in the OS; None if OS calls were not traced."""
    waits: pd.DataFrame
    osrt: pd.DataFrame
    calls: pd.DataFrame
    """OS time of the step thread by step, phase and function."""
    spans: int = 0
    """Ranges of the annotation that the process wrote."""
    unnumbered: int = 0
    """Ranges of steps that are left out because they carry no number (or a negative one), while others do."""
    is_rank_guessed: bool = False
    """Whether the rank follows from the order in which a launcher started its workers, for they do not tell theirs."""
    device: int | None = None
    """The GPU that stands for an unknown rank, in a report without steps."""
    gpu: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.gpu_trace.gpu_rows` gives it, with what tells the GPU from all others of the run as
    ``gpu``; None if no GPU activity was traced."""
    busy: Mapping[str, IntervalSet] = field(default_factory=dict)
    """When it used each GPU that has a UUID, without gaps of microseconds, by what ``gpu`` tells of it."""
    gpu_missing: str = ""
    """Which records of its GPUs are missing, in words."""
    gpu_doubt: str = ""
    """Why less can be said of its GPUs than their records show, in words."""
    projection: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.projection.aggregate` gives it."""
    batches: pd.DataFrame | None = None
    """step, phase and size of each batch that a phase was told of; None if none was."""
    groups: Mapping[str, GroupMark] = field(default_factory=dict)
    """What its process groups are for, by their names in ``collectives``, as far as it told."""
    expert_tokens: pd.DataFrame | None = None
    """step and tokens of each layer's experts, as often as it told them; None if it never did."""
    idle: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.idle.split` gives it for each of its GPUs."""
    copies: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.copies.of_device` gives it for each of its GPUs."""
    kernels: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.gpu_trace.kernel_rows` gives it for each of its GPUs."""
    starved: IntervalSet | None = None
    """When its GPUs were idle because the host had not launched more; None if no GPU activity was traced."""
    stalled: IntervalSet | None = None
    """When no thread of the process entered or left an OS call, though some do all the time."""
    communicators: Mapping[str, Member] = field(default_factory=dict)
    """Its places in NCCL's communicators, as far as it told, by their names in ``collectives``."""
    label: str = ""
    """What to call it while its rank is unknown: as :func:`labelled` gives it."""

    @property
    def name(self) -> str:
        """``rank 3``, or its process if the rank is unknown; the negative number in tables is no name."""
        return f"rank {self.rank}" if self.rank >= 0 else self.label or _label(self, of="")

    def on_clock(self, clock: OnClock) -> RankTrace:
        """The same trace with every time put through ``clock``."""

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(
                start_ns=clock(frame["start_ns"].to_numpy(np.int64)), end_ns=clock(frame["end_ns"].to_numpy(np.int64))
            )

        blocked = self.blocked and IntervalSet(clock(self.blocked.start_ns), clock(self.blocked.end_ns))
        return replace(
            self,
            steps=moved(self.steps),
            segments=moved(self.segments),
            collectives=moved(self.collectives),
            waits=moved(self.waits),
            gpu=None if self.gpu is None else moved(self.gpu),
            idle=None if self.idle is None else moved(self.idle),
            blocked=blocked,
            starved=self.starved and IntervalSet(clock(self.starved.start_ns), clock(self.starved.end_ns)),
            busy={gpu: IntervalSet(clock(own.start_ns), clock(own.end_ns)) for gpu, own in self.busy.items()},
            stalled=self.stalled and IntervalSet(clock(self.stalled.start_ns), clock(self.stalled.end_ns)),
        )


def labelled(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """``traces`` with labels: the process, and its report if another process has the same number."""
    reports: dict[int, set[tuple[str, str]]] = {}
    for trace in traces:
        reports.setdefault(trace.pid, set()).add((trace.node, trace.report))
    return [
        replace(trace, label=_label(trace, of=f" of {trace.report}" if len(reports[trace.pid]) > 1 else ""))
        for trace in traces
    ]


def _label(trace: RankTrace, of: str) -> str:
    process = f"process {trace.pid}{of}"
    return f"{process} (rank unknown)" if trace.device is None else f"GPU {trace.device} of {process}"


def nullable_steps(numbers: pd.Series) -> pd.Series:
    """Step numbers with nothing if there is no step."""
    return numbers.astype("Int64").where(numbers != OUTSIDE)
