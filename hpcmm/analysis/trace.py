"""What the analysis keeps of one rank: steps, phases, collectives and waits, small beside the report they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet, OnClock, Times
from hpcmm.annotate.schema import GroupMark
from hpcmm.reports.report import Member

OTHER = "other"
"""Time within a step that no phase covers."""
ON_GPU = "on the GPU"
"""Work of GPUs where it is not known which phase launched it."""
MOST_UNLAUNCHED = 0.1
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

NOT_LAUNCHED = "the calls that launched its work are not in the report"
"""Doubt about a GPU whose records tell no launch, so that nothing says whether its host was late."""


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """What the GPUs of a process did, by what launched it rather than by what its host did meanwhile."""

    by_phase: Mapping[str, IntervalSet]
    """When they ran what each phase of the host had launched, communication apart; the phases are disjoint. What was
    launched outside any phase has an empty name."""
    communication: IntervalSet
    """When they communicated and did nothing else."""
    unlaunched: IntervalSet = field(default_factory=IntervalSet.empty)
    """When they ran what no recorded call had launched, communication apart."""

    @property
    def lacks_launches(self) -> bool:
        """Whether too much of the work was launched by calls that were not recorded to tell it by phase."""
        missing, known = self.unlaunched.total_ns, sum(own.total_ns for own in self.by_phase.values())
        return missing > MOST_UNLAUNCHED * (missing + known)

    def without_phases(self) -> DeviceWork:
        """The same without what launched the work: all of it is of phase :data:`ON_GPU`."""
        work = IntervalSet.union(self.unlaunched, *self.by_phase.values())
        return DeviceWork({ON_GPU: work}, self.communication.subtract(work))

    @property
    def busy(self) -> IntervalSet:
        """When they did anything."""
        return IntervalSet.union(self.communication, *self.by_phase.values())

    def on_clock(self, clock: OnClock) -> DeviceWork:
        """The same with every time put through ``clock``."""
        by_phase = {phase: own.on_clock(clock) for phase, own in self.by_phase.items()}
        return DeviceWork(by_phase, self.communication.on_clock(clock), self.unlaunched.on_clock(clock))

    def renamed(self, name_of: Callable[[str], str]) -> DeviceWork:
        """The same with phases put together under other names."""
        found: dict[str, IntervalSet] = {}
        for phase, own in self.by_phase.items():
            found[name_of(phase)] = _union(found, {name_of(phase): own}, name_of(phase))
        return replace(self, by_phase=found)

    def followed_by(self, later: DeviceWork) -> DeviceWork:
        """This and ``later`` as one."""
        phases = {**self.by_phase, **later.by_phase}
        return DeviceWork(
            {phase: _union(self.by_phase, later.by_phase, phase) for phase in phases},
            IntervalSet.union(self.communication, later.communication),
            IntervalSet.union(self.unlaunched, later.unlaunched),
        )


@dataclass(frozen=True, slots=True)
class MainThread:
    """OS calls of a process's first thread, kept if neither steps nor GPU records tell what it did."""

    calls: pd.DataFrame
    """start_ns, end_ns, function (category)."""
    exchanges_ns: Times
    """The first and the last time that another thread of the process sends or receives; empty if none does."""


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
    device_time: pd.DataFrame | None = None
    """As :func:`hpcmm.analysis.gpu_trace.drawn_time` gives it for each of its GPUs."""
    starved: IntervalSet | None = None
    """When its GPUs were idle because the host had not launched more; None if no GPU activity was traced."""
    device_work: DeviceWork | None = None
    """None if no GPU activity was traced."""
    stalled: IntervalSet | None = None
    """When no thread of the process entered or left an OS call, though some do all the time."""
    windows_ns: Times = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """When each window of its capture after the first begins. Between two windows nothing was recorded."""
    communicators: Mapping[str, Member] = field(default_factory=dict)
    """Its places in NCCL's communicators, as far as it told, by their names in ``collectives``."""
    main_thread: MainThread | None = None
    """None if there are steps or GPU records, or if its OS calls were not traced."""
    is_warm: bool = False
    """Whether its capture shows steps before these: the first of these is no warm-up."""
    label: str = ""
    """What to call it while its rank is unknown: as :func:`labelled` gives it."""

    @property
    def name(self) -> str:
        """``rank 3``, or its process if the rank is unknown; the negative number in tables is no name."""
        return f"rank {self.rank}" if self.rank >= 0 else self.label or _label(self, of="")

    @property
    def follows(self) -> npt.NDArray[np.bool_]:
        """Whether each step but the first comes after the one before in the same window of the capture."""
        window = np.searchsorted(self.windows_ns, self.steps["start_ns"].to_numpy(np.int64), side="right")
        same: npt.NDArray[np.bool_] = window[1:] == window[:-1]
        return same

    def renumbered(self, more: int) -> RankTrace:
        """The same trace with ``more`` added to the number of each step."""

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(step=frame["step"].where(frame["step"] == OUTSIDE, frame["step"] + more))

        return replace(
            self,
            steps=moved(self.steps),
            segments=moved(self.segments),
            collectives=moved(self.collectives),
            waits=moved(self.waits),
            calls=moved(self.calls),
            gpu=None if self.gpu is None else moved(self.gpu),
            idle=None if self.idle is None else moved(self.idle),
            batches=None if self.batches is None else moved(self.batches),
            expert_tokens=None if self.expert_tokens is None else moved(self.expert_tokens),
        )

    def with_collectives_on(self, clock: OnClock) -> RankTrace:
        """The same trace with the times of its collectives alone put through ``clock``."""
        return replace(self, collectives=_moved(self.collectives, clock))

    def on_clock(self, clock: OnClock) -> RankTrace:
        """The same trace with every time put through ``clock``."""

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            return _moved(frame, clock)

        main = self.main_thread
        return replace(
            self,
            steps=moved(self.steps),
            segments=moved(self.segments),
            collectives=moved(self.collectives),
            waits=moved(self.waits),
            gpu=None if self.gpu is None else moved(self.gpu),
            idle=None if self.idle is None else moved(self.idle),
            device_time=None if self.device_time is None else moved(self.device_time),
            blocked=self.blocked and self.blocked.on_clock(clock),
            main_thread=main and MainThread(moved(main.calls), clock(main.exchanges_ns)),
            windows_ns=clock(self.windows_ns),
            starved=self.starved and self.starved.on_clock(clock),
            device_work=self.device_work and self.device_work.on_clock(clock),
            busy={gpu: own.on_clock(clock) for gpu, own in self.busy.items()},
            stalled=self.stalled and self.stalled.on_clock(clock),
        )


def _moved(frame: pd.DataFrame, clock: OnClock) -> pd.DataFrame:
    if frame.empty:
        return frame
    return frame.assign(
        start_ns=clock(frame["start_ns"].to_numpy(np.int64)), end_ns=clock(frame["end_ns"].to_numpy(np.int64))
    )


def joined(first: RankTrace, second: RankTrace) -> RankTrace:
    """Two windows of one process's capture as one trace, both on one clock; ``second`` begins after ``first`` ends.

    Steps that count from the beginning again go on counting, and so do collectives that only their order tells apart.
    """
    if set(first.steps["step"]) & set(second.steps["step"]):
        second = second.renumbered(int(first.steps["step"].max()) + 1 - int(second.steps["step"].min()))
    ours, theirs = first.collectives, second.collectives
    again = pd.concat([ours[KEY], theirs[KEY]]).duplicated().any()
    if again:
        theirs = theirs.assign(occurrence=theirs["occurrence"] + int(ours["occurrence"].max()) + 1)
    parts = [*first.windows_ns, _begin_ns(second), *second.windows_ns]
    return replace(
        first,
        steps=_both(first.steps, second.steps),
        segments=_both(first.segments, second.segments),
        collectives=_both(ours, theirs),
        blocked=_intervals(first.blocked, second.blocked),
        waits=_both(first.waits, second.waits),
        osrt=_summed(first.osrt, second.osrt, ["process_role", "thread_role", "function"]),
        calls=_both(first.calls, second.calls),
        spans=first.spans + second.spans,
        unnumbered=first.unnumbered + second.unnumbered,
        gpu=_gpu_of(first.gpu, second.gpu),
        busy={gpu: _union(first.busy, second.busy, gpu) for gpu in {**first.busy, **second.busy}},
        gpu_missing="; ".join(filter(None, (first.gpu_missing, second.gpu_missing))),
        gpu_doubt=first.gpu_doubt or second.gpu_doubt,
        idle=_either(first.idle, second.idle),
        copies=_either(first.copies, second.copies),
        kernels=_either(first.kernels, second.kernels),
        device_time=_either(first.device_time, second.device_time),
        projection=_projection_of(first.projection, second.projection),
        batches=_either(first.batches, second.batches),
        groups={**first.groups, **second.groups},
        communicators={**first.communicators, **second.communicators},
        expert_tokens=_either(first.expert_tokens, second.expert_tokens),
        starved=_intervals(first.starved, second.starved),
        device_work=_device_work(first.device_work, second.device_work),
        stalled=_intervals(first.stalled, second.stalled),
        windows_ns=np.array(parts, dtype=np.int64),
    )


KEY = ["group", "op", "sequence", "occurrence"]
"""What identifies a collective on each of its ranks."""
_QUANTILES = ["p50_s", "p95_s"]


def _both(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    frames = [frame for frame in (ours, theirs) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else ours


def _either(ours: pd.DataFrame | None, theirs: pd.DataFrame | None) -> pd.DataFrame | None:
    return theirs if ours is None else ours if theirs is None else _both(ours, theirs)


def _intervals(ours: IntervalSet | None, theirs: IntervalSet | None) -> IntervalSet | None:
    if ours is None or theirs is None:
        return None
    return IntervalSet(np.append(ours.start_ns, theirs.start_ns), np.append(ours.end_ns, theirs.end_ns))


def _device_work(ours: DeviceWork | None, theirs: DeviceWork | None) -> DeviceWork | None:
    return theirs if ours is None else ours if theirs is None else ours.followed_by(theirs)


def _union(ours: Mapping[str, IntervalSet], theirs: Mapping[str, IntervalSet], gpu: str) -> IntervalSet:
    return IntervalSet.union(*(each[gpu] for each in (ours, theirs) if gpu in each))


def _summed(ours: pd.DataFrame, theirs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows of both, with one sum for each of ``keys``; the largest of ``max_s``. Quantiles of a sum are not known."""
    both = _both(ours, theirs)
    if both.empty:
        return both
    values = [name for name in both.columns if name not in keys]
    groups = both.groupby(keys, sort=False, observed=True)
    sums = groups[values].agg({name: "max" if name == "max_s" else "sum" for name in values})
    unknown = both[values].isna().groupby([both[key] for key in keys], sort=False, observed=True).any()
    several = groups.size() > 1
    for name in values:
        lost = unknown[name] | several if name in _QUANTILES else unknown[name]
        sums[name] = sums[name].where(~lost) if lost.any() else sums[name]
    return sums.reset_index()[list(both.columns)]


def _projection_of(ours: pd.DataFrame | None, theirs: pd.DataFrame | None) -> pd.DataFrame | None:
    return theirs if ours is None else ours if theirs is None else _summed(ours, theirs, ["domain", "range"])


def _gpu_of(ours: pd.DataFrame | None, theirs: pd.DataFrame | None) -> pd.DataFrame | None:
    """Rows of both; what lies outside the steps of a device is one row."""
    both = _either(ours, theirs)
    if both is None or both.empty:
        return both
    how = {name: "sum" for name in both.columns if name not in {"device", "step"}} | {
        "start_ns": "min",
        "end_ns": "max",
    }
    return both.groupby(["device", "step"], sort=False, as_index=False).agg(how)[list(both.columns)]


def _begin_ns(trace: RankTrace) -> int:
    """The first time in a trace."""
    frames = [trace.steps, trace.segments, trace.collectives, trace.waits, trace.gpu]
    return min((int(frame["start_ns"].min()) for frame in frames if frame is not None and len(frame)), default=0)


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


def rows_of_ranks(frames: Iterable[tuple[RankTrace, pd.DataFrame | None]]) -> pd.DataFrame | None:
    """A frame of each rank as one, with rank, node and pid, sorted by rank and device; None if none holds a row."""
    known = [
        frame.assign(rank=trace.rank, node=trace.node, pid=trace.pid)
        for trace, frame in frames
        if frame is not None and len(frame)
    ]
    if not known:
        return None
    return pd.concat(known, ignore_index=True).sort_values(["rank", "device"], kind="stable", ignore_index=True)
