"""What an analysis gives: the tables, each made when it is asked for, and what the page is drawn from."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hpcmm.analysis.advice import WITHOUT_PYTHON
from hpcmm.analysis.choice import NO_WHOLE_STEP
from hpcmm.analysis.clock import CommonClock
from hpcmm.analysis.findings import in_percent
from hpcmm.analysis.phases import StepTimes
from hpcmm.analysis.range_names import communicates
from hpcmm.analysis.trace import RankTrace
from hpcmm.reports.report import TEXT_AS_PYTHON
from hpcmm.text import listed

LITTLE_COVER = 0.25
"""Of the time from step to step: what is called a step and covers less is a part of one."""
LITTLE_COMMUNICATION, MOST_NAMED = 0.02, 5
"""Phases of communication are named from this part of the time on, and so many of them."""


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that the tables and the page are made of. Times of ``traces`` are run time, in nanoseconds."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    """Each made when it is first asked for."""
    traces: tuple[RankTrace, ...]
    collectives: pd.DataFrame
    """Matched collectives with waits, in nanoseconds."""
    steps: StepTimes
    wait_matrix: np.ndarray
    """Seconds a step that each trace (row) waited for each other (column)."""
    clock: CommonClock
    complete: bool
    failed_run: str = ""
    """The run directory, where that notes that the run failed."""
    failed_before_steps: bool = False
    """Neither the run directory nor a report knows of a step before that."""
    throughput: str = ""
    """Tokens, operations and memory in words, as the ranks noted them."""
    ranges: str = ""
    """Which of the program's own NVTX ranges are taken for steps and phases; empty if they are hpcmm's."""
    window: str = ""
    """Which part of the run is looked at, in words; empty if that is all of it."""
    line_to_add: str = ""
    """The line that would give the run's script steps; empty if nothing lacks them."""

    @property
    def no_steps(self) -> str:
        """That there are none to compare, in words."""
        stepping = [trace.steps for trace in self.traces if len(trace.steps)]
        if self.ranges and len(stepping) > 1 and all(own["closed"].any() for own in stepping):
            return "The ranks number their steps differently, so that no step is one of all ranks"
        if stepping:
            return "No step was closed on all ranks"
        cut = self.tables["coverage"]["reason"].str.contains(NO_WHOLE_STEP, regex=False).any()
        return "No whole step lies in the window" if cut else "No steps are annotated"

    @property
    def counts_steps(self) -> bool:
        """Whether losses are those of a step, of all ranks or, if these have none in common, of each GPU."""
        return len(self.steps.numbers) > 0 or bool(self.tables["gpu"]["step"].notna().any())

    @property
    def joined_windows(self) -> str:
        """That several reports are windows of one process's capture; empty if none are."""
        joined = [trace for trace in self.traces if len(trace.windows_ns)]
        if not joined:
            return ""
        count = max(len(trace.windows_ns) for trace in joined) + 1
        whose = joined[0].name if len(joined) == 1 else f"each of {len(joined)} ranks"
        return f"; {count} reports of {whose} are windows of one capture, read together"

    @property
    def ranks_with_steps(self) -> tuple[int, int]:
        """How many there are, and of how many; several reports of a rank count once."""
        merit = {"found": 0, "other_run": 2, "wrong_job": 2}
        coverage = self.tables["coverage"].assign(merit=lambda each: each["status"].map(merit).fillna(1))
        coverage = coverage[coverage["merit"] < 2].sort_values("merit", kind="stable")
        ranks = coverage[~(coverage["rank"].duplicated() & coverage["rank"].notna())]
        return int((ranks["status"] == "found").sum()), len(ranks)

    @property
    def looked_at(self) -> str:
        """Which reports are looked at, if some are of other runs; else empty."""
        coverage = self.tables["coverage"]
        if not (coverage["status"] == "other_run").any():
            return ""
        names = list(coverage.loc[coverage["status"].isin(["found", "truncated"]), "report"].unique())
        return f"; looked at: {listed(names)}"

    @property
    def waits_unseen(self) -> bool:
        """Whether several ranks have steps, and no collective was recorded."""
        several = sum(len(trace.steps) > 0 for trace in self.traces) > 1
        return several and not len(self.tables["collectives"])

    def nothing_stands_out(self, step: str) -> str:
        """That no cause takes a worthwhile part of ``step``, and what keeps this from being sure, without a full stop.

        Who waits for whom leads if it was not recorded: waiting may be most of the step.
        """
        if not self.waits_unseen:
            return f"Nothing stands out: no cause takes 2% of the {step}{self.nobody_to_blame}"
        names, share = self._phases_of_communication()
        if share < LITTLE_COMMUNICATION:
            told = "Whether ranks wait for one another was not recorded; nothing else stands out: no cause takes 2% of "
            return f"{told}the {step}{self._little_cover}"
        listed = ", ".join(names[:MOST_NAMED]) + ", ..." * (len(names) > MOST_NAMED)
        told = f"Phases {listed}, communication by their names, take"
        if len(names) == 1:
            told = f"Phase {listed}, communication by its name, takes"
        return (
            f"{told} {in_percent(share)} of the {step}; who waits for whom was not recorded, and nothing else stands "
            f"out{self._little_cover}"
        )

    def _phases_of_communication(self) -> tuple[list[str], float]:
        """Phases that communicate by their names, the longest first, and which part of a rank's time they take."""
        steps, table = self.steps, self.tables["phases_summary"]
        own = table[(table["within"] == "") & table["rank"].isin(list(steps.periods_s))]
        by_name = own.groupby("phase")["s_per_step"].sum().sort_values(ascending=False) / len(steps.periods_s)
        by_name = by_name[[communicates(str(name)) for name in by_name.index]]
        whole_s = steps.mean_s if steps.adjoin else steps.period_s
        return [str(name) for name in by_name.index], float(by_name.sum()) / whole_s

    @property
    def nobody_to_blame(self) -> str:
        """That no rank is, or what keeps this from being known."""
        unseen = (self.tables["coverage"]["steps"] == 0).any()
        usual = "; ranks that were not seen may be late" if unseen else ", and no rank is to blame"
        return self._little_cover or usual

    @property
    def _little_cover(self) -> str:
        if self.steps.mean_s < LITTLE_COVER * self.steps.period_s:
            return f"; but most of the time lies between the steps, which are {self.steps.mean_s:.2g} s long"
        return ""

    @property
    def names(self) -> dict[int, str]:
        """What to call each trace, by its number in column ``rank``, which is made up if its rank is unknown."""
        return {trace.rank: trace.name for trace in self.traces}


@dataclass(frozen=True, slots=True)
class Selection:
    """Some tables of a run, without what the page is made of."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    complete: bool


_WHOSE = re.compile(r"^process [0-9]+(?:, GPU [0-9]+)?: ")
"""What a reason begins with if it is of one process of a report."""


def usual_reason(coverage: pd.DataFrame) -> str:
    """What is wrong with most reports of table ``coverage``; empty if nothing is."""
    told = coverage[["report", "reason"]].fillna("").astype(str).itertuples(index=False)
    reasons = [_WHOSE.sub("", reason.removeprefix(f"{report}: ")) for report, reason in told if reason]
    return Counter(reasons).most_common(1)[0][0] if reasons else ""


def why_failed(folder: str) -> str:
    """One sentence for a run that failed before its first step."""
    return f"the run failed before its first step; python -m hpcmm.jobs why {shlex.quote(folder)} tells why."


_STEP_LINES = {
    "lightning": "Trainer(..., callbacks=[hpcmm.annotate.callbacks.LightningSteps()])",
    "accelerate": "for batch in hpcmm.annotate.callbacks.accelerate_steps(accelerator, loader):",
    "transformers": "Trainer(..., callbacks=[hpcmm.annotate.hf.StepAnnotation()])",
    "deepspeed": "for batch in hpcmm.annotate.steps(loader):, or around each engine.train_batch()",
    WITHOUT_PYTHON: 'nvtxRangePushA("step"); around each repetition of its loop, and nvtxRangePop(); after it',
}


def step_line(framework: str) -> str:
    """The line of a script that gives it steps, by what it trains with."""
    return _STEP_LINES.get(framework, "for batch in hpcmm.annotate.steps(loader):")


TABLES = (
    "bottlenecks",
    "clock",
    "collectives",
    "comm_bytes",
    "comm_wait",
    "copies",
    "coverage",
    "delays",
    "efficiency",
    "environment",
    "gpu",
    "idle",
    "kernels",
    "osrt",
    "phases",
    "phases_summary",
    "projection",
    "startup",
    "steps",
    "waitpid",
    "waitpid_windows",
)
UNITS = ("_s", "_s_per_step", "_bytes_per_s", "_share", "_ppm", "_efficiency", "_scaling", "bus_bytes")
"""Ends of the names of columns that hold real numbers."""
INTEGERS = frozenset(
    {
        "attempt",
        "bytes",
        "calls",
        "collectives",
        "events",
        "late_rank",
        "messages",
        "nodes",
        "rank",
        "rank_order",
        "ranks",
        "reports",
    }
    | {"gpu", "sequence", "slowest_rank", "step", "steps", "waited_for_rank", "pid", "device", "kernels", "copies"}
    | {"open_calls", "large_copies", "gaps"}
)
FLAGS = frozenset({"communication", "complete", "corrected", "estimators_disagree", "loading", "warmup"})
RATIOS = frozenset({"variation", "load_balance", "load_balance_in_node", "load_balance_between_nodes"})


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with a type for each column that has none: an empty table has the types of a full one.

    Columns that their maker has given a type keep it.
    """
    kinds = {name: _kind(str(name)) for name, dtype in frame.dtypes.items() if pd.api.types.is_object_dtype(dtype)}
    return frame.astype(kinds) if kinds else frame


def _kind(name: str) -> str:
    if name in INTEGERS:
        return "Int64"
    if name in FLAGS:
        return "bool"
    if name in RATIOS or name.endswith(UNITS):
        return "float64"
    return "str"


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by name, each made when it is first asked for, and once."""

    def __init__(self, makers: Mapping[str, Callable[[], pd.DataFrame]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._made:
            with pd.option_context(*TEXT_AS_PYTHON):
                self._made[name] = typed(self._makers[name]())
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
