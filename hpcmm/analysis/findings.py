"""Findings before they are ranked: the kinds there are, and the context they are found in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import BETWEEN_STEPS, SUBPROCESS, Floats, WorkParts
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.phases import StepTimes, step_ends_ns
from hpcmm.analysis.range_names import part_of_a_step
from hpcmm.analysis.trace import ON_GPU, OTHER, OUTSIDE, RankTrace
from hpcmm.analysis.wait_chains import ChargedGroup
from hpcmm.runs.links import Network

HIGH, MEDIUM, LOW = "high", "medium", "low"
STRAGGLER_SHARE = 0.03
"""A rank is named from this share of a step on."""

CAUSES = {
    "data": "data loading",
    "compute": "computation",
    "batch": "longer batches",
    "uneven": "uneven batches",
    "experts": "expert imbalance",
    "checkpoint": "checkpoint",
    "subprocess": "waiting for a child process",
    "stall": "stall",
    "solo": "work of one rank alone",
    "between": "work between steps",
    "other": "work outside the phases",
    "transfer": "communication transfer",
    "unseen": "communication, or waiting for ranks without a report",
    "interruption": "communication interrupted",
    "imbalance": "imbalance without a culprit",
    "few": "imbalance without a culprit",
    "gpu_host": "GPU idle: the host launches late",
    "gpu_sync": "GPU idle: the host waits for it first",
    "gpu_data": "GPU idle: the host loads data",
    "gpu_os": "GPU idle: the host is in the OS",
    "gpu_code": "GPU idle: other code of the host",
    "gpu_mpi": "GPU idle: the host is in MPI",
    "gpu_cuda": "GPU idle: the host is in long CUDA calls",
    "gpu_gap": "one long GPU gap",
    "gpu_order": "GPU idle between kernels",
    "gpu_unknown": "GPU idle",
    "gpu_copy": "copies without computation",
    "gpu_set": "memory sets without computation",
    "gpu_comm": "communication, transfer or waiting",
    "gpu_wait": "imbalance between GPUs",
    "host_sleep": "sleep in the main thread",
    "host_read": "reading in the main thread",
    "host_open": "opening files in the main thread",
    "host_write": "writing in the main thread",
    "host_child": "waiting for a child process",
    "host_pipe": "waiting for another process, such as a data loader's",
    "host_other": "other OS calls of the main thread",
    "host_code": "the main thread's own code",
    "host_cores": "imbalance without a culprit",
    "host_wait": "communication, or waiting for other ranks or threads",
}

_KINDS_OF_PHASES = {"data": "data", "checkpoint": "checkpoint", "other": "other", BETWEEN_STEPS: "between"}


def kind_of_part(part: str) -> str:
    """The kind of finding that a long part of a rank's work is."""
    if part.startswith(SUBPROCESS):
        return "subprocess"
    return _KINDS_OF_PHASES.get(part) or _KINDS_OF_PHASES.get(part_of_a_step(part), "compute")


def phase_of_part(part: str) -> str:
    """The phase of a part; empty if it is the work of GPUs, of which phases are not known."""
    return "" if part == ON_GPU else part.removeprefix(SUBPROCESS)


def work_in_words(phase: str) -> str:
    """What takes longer: a phase, or the work that none covers."""
    return {OTHER: CAUSES["other"], BETWEEN_STEPS: CAUSES["between"], "": f"work {ON_GPU}"}.get(phase, phase)


def in_percent(share: float) -> str:
    """A share in whole percent; a small one is not nothing."""
    return "under 1%" if 0 < share < 0.01 else f"{share:.0%}"


COMPUTATION_SHARE = 0.1
"""Phases hold a run's computation when they take this share of the time that no phase covers."""


def computation_has_phases(traces: Sequence[RankTrace]) -> bool:
    """Whether phases tell the computation: else what no phase covers is no loss, but where the work is."""
    computing = unnamed = 0
    for trace in traces:
        inside = trace.segments[trace.segments["step"] != OUTSIDE]
        by_phase = (inside["end_ns"] - inside["start_ns"]).groupby(inside["phase"]).sum()
        unnamed += int(by_phase.get(OTHER, 0))
        computing += sum(int(taken) for phase, taken in by_phase.items() if kind_of_part(str(phase)) == "compute")
    return computing >= COMPUTATION_SHARE * unnamed


def phases_launch(traces: Sequence[RankTrace]) -> bool:
    """Whether most of what GPUs computed was launched in phases, however short these are on the host."""
    on_devices = [trace.device_work.by_phase for trace in traces if trace.device_work]
    work = [(phase, own.total_ns) for each in on_devices for phase, own in each.items()]
    return 2 * sum(taken for phase, taken in work if phase not in {"", OTHER}) > sum(taken for _, taken in work)


@dataclass(frozen=True, slots=True)
class Finding:
    """A row before it is ranked. ``kind`` selects the suggestion."""

    kind: str
    cause: str
    lost_s: float
    rank: int | None
    node: str
    phase: str
    evidence: str
    confidence: str
    rows: str = ""
    """Where the evidence lies: a table, and the columns and values to filter it by."""
    worst_step: int | None = None
    """The step that shows it best."""
    several: bool = False
    """Whether it names several ranks, which no column can hold."""
    moves: str = ""
    """Of a transfer: what moves, as :mod:`hpcmm.analysis.parallelism` names it. Of a stage: what to move. Of copies: as
    :func:`hpcmm.analysis.copies.what_moves` names it."""
    bound: str = ""
    """Of a transfer: ``latency`` or ``bandwidth``; empty if the data do not tell."""
    is_in_node: bool = False
    """Of a transfer: no group of it spans nodes."""
    function: str = ""
    """Of a rank that works longer than its peers: the OS call in which it does. Of a GPU that waits for its host: the
    call in which the host is most of that time."""
    is_single: bool = False
    """Of a transfer: it is one message a step, which can be joined to no other."""
    step_bytes: float = 0.0
    """Of a transfer: what a rank exchanges of it in a step."""
    is_slow: bool = False
    """Of a transfer: it is far below what the network can do, or some of its hops are slower than the others."""
    gpu_excess: str = ""
    """Of a rank that is late: what its GPU does for longer than its peers', as gpu_findings names it."""
    is_only_node: bool = False
    """All ranks of the run are on ``node``."""

    @property
    def blames(self) -> bool:
        """Whether it names a rank, a node, or several ranks."""
        return self.rank is not None or self.node != "" or self.several


_LESS = {HIGH: MEDIUM, MEDIUM: LOW, LOW: LOW}


def doubted(findings: Sequence[Finding], doubt: str) -> list[Finding]:
    """``findings`` with less confidence and the reason for it; as they are without a ``doubt``."""
    if not doubt:
        return list(findings)
    return [
        replace(each, confidence=_LESS[each.confidence], evidence=f"{each.evidence}; but {doubt}") for each in findings
    ]


FEW_STEPS = 4
"""Fewer show what happened in them, and not whether it is always so."""
ONE_STEP = "one step cannot tell a straggler from chance"


def variation(steps: StepTimes) -> str:
    """How much steps differ, in words."""
    few = _doubt_of_few(steps)
    return few or f"steps vary by {steps.noise_s:.3g} s (robust standard deviation)"


def _doubt_of_few(steps: StepTimes) -> str:
    """What so few steps do not tell; empty if there are enough."""
    count = len(steps.numbers)
    if count == 1:
        return ONE_STEP
    return f"{count} steps cannot tell whether it is so in others" if count < FEW_STEPS else ""


def of_few_steps(findings: Sequence[Finding], steps: StepTimes) -> list[Finding]:
    """``findings`` with the doubt that few steps leave of whoever is named."""
    doubt = _doubt_of_few(steps)
    if not doubt:
        return list(findings)
    return [
        replace(each, confidence=LOW, evidence=f"{each.evidence}; but {doubt}") if each.blames else each
        for each in findings
    ]


def gpu_doubt(traces: Sequence[RankTrace]) -> str:
    """Why less can be said of GPUs than their records show; empty if nothing speaks against them."""
    doubts = [trace.gpu_doubt for trace in traces if trace.gpu is not None]
    told = sorted({doubt for doubt in doubts if doubt})
    if not told:
        return ""
    of = "" if len(doubts) == 1 else f" (of {sum(map(bool, doubts))} of {len(doubts)} ranks)"
    return f"{told[0].split(':')[0]}{of}"


def within(findings: Sequence[Finding], whole_s: float) -> list[Finding]:
    """``findings``, the surest first, each with no more of ``whole_s`` than those before it leave."""
    found = []
    for finding in findings:
        found.append(replace(finding, lost_s=min(finding.lost_s, whole_s)))
        whole_s -= found[-1].lost_s
    return found


@dataclass(frozen=True, slots=True)
class AnalysisContext:
    """What the findings rest on."""

    traces: Sequence[RankTrace]
    rows: pd.DataFrame
    """Matched collectives with exposed waits."""
    steps: StepTimes
    parts: WorkParts
    groups: Sequence[ChargedGroup]
    losses: Floats
    """Seconds by (step, trace, part), a mean over ranks; the last part is what nothing explains."""
    own_losses: Floats
    """What of ``losses`` is the late rank's own excess work, and not waiting for it."""
    expected_ranks: int
    """Ranks of the job, read or not."""
    gpu: pd.DataFrame
    """The table ``gpu``; empty if no GPU activity was traced."""
    idle: pd.DataFrame
    """The table ``idle``."""
    copies: pd.DataFrame
    """The table ``copies``."""
    network: Network = field(default_factory=Network)
    """What is known of the links between the nodes."""

    def calls_within(self, phase: str) -> str:
        """The OS call in which the ranks spend most of a phase, in words; empty if they make none."""
        calls = [trace.calls[trace.calls["step"].isin(self.steps.numbers)] for trace in self.traces]
        mine = pd.concat([each[each["phase"] == phase] for each in calls])
        if mine.empty:
            return ""
        count = len(self.steps.numbers) * len(self.traces) * NS_PER_S
        by_function = mine.groupby("function")["total_ns"].sum().sort_values(ascending=False) / count
        return f"; the host is in {by_function.index[0]}() for {by_function.iloc[0]:.3g} s of it"

    def nodes(self) -> dict[str, list[int]]:
        """Traces of each node."""
        found: dict[str, list[int]] = {}
        for index, trace in enumerate(self.traces):
            found.setdefault(trace.node, []).append(index)
        return found

    def ranks(self, members: Sequence[int]) -> str:
        """``0, 3``; a process of unknown rank by its name."""
        traces = [self.traces[index] for index in members]
        return ", ".join(str(trace.rank) if trace.rank >= 0 else trace.name for trace in traces)

    def who(self, members: Sequence[int]) -> str:
        """``rank 3``, ``ranks 0, 3``, or the names of processes of unknown rank."""
        known = any(self.traces[index].rank >= 0 for index in members)
        return f"rank{'s' if len(members) > 1 else ''} {self.ranks(members)}" if known else self.ranks(members)

    def worst_step(self, by_step: Floats) -> int | None:
        """The step with the most of ``by_step``, shape (steps,)."""
        return int(self.steps.numbers[int(np.argmax(by_step))]) if len(by_step) and by_step.max() > 0 else None

    def time_in(self, part_names: Sequence[str]) -> Floats:
        """Seconds of useful work of each trace in parts of each step, shape (steps, traces)."""
        columns = [index for index, name in enumerate(self.parts.names) if name in part_names]
        found = np.zeros((len(self.steps.numbers), len(self.traces)))
        for index, trace in enumerate(self.traces):
            start, end = (trace.steps[name].to_numpy(np.float64) for name in ("start_ns", "end_ns"))
            at, there = self._steps_of(trace)
            within = self.parts.between(index, start[at], end[at])
            found[there, index] = within[:, columns].sum(axis=1) / NS_PER_S
        return found

    def work_by_step(self) -> Floats:
        """Seconds of each trace in each part, from the end of one step to that of the next: (steps, traces, parts)."""
        found = np.zeros((len(self.steps.numbers), len(self.traces), len(self.parts.names)))
        for index, trace in enumerate(self.traces):
            end = step_ends_ns(trace)
            begin = np.append(trace.steps["start_ns"].to_numpy(np.float64)[:1], end[:-1])
            at, there = self._steps_of(trace)
            found[there, index] = self.parts.between(index, begin[at], end[at]) / NS_PER_S
        return found

    def _steps_of(self, trace: RankTrace) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Places of the counted steps among those of ``trace``, and which of the counted ones it has."""
        at = pd.Index(trace.steps["step"]).get_indexer(pd.Index(self.steps.numbers))
        return at[at >= 0], at >= 0
