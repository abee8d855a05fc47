"""Expert imbalance: ranks of an expert group wait for the one whose experts got more tokens than the others'.

Tokens go to their experts in one all-to-all, and come back in another, in which each rank sends what it received in the
first. What lies between the two is the rank's **load**: in bytes, or in tokens if the program told them
(``annotate.expert_tokens``). The experts compute between the two. A group whose ranks exchange equal parts, as they do
to divide sequences, has no such pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import CAUSES, HIGH, MEDIUM, AnalysisContext, Finding, kind_of_part
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.trace import NO_SIZE

UNEQUAL = 1.1
"""Loads are unequal from so many times their mean on."""
AS_FAST = 1.5
"""A rank that takes longer than so many times its peers' time for the same load is slow itself."""
MOST = 0.5
"""The share of a late rank's longer work that lies between the exchanges, or correlation of loads and times."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """What the experts of each rank of a group had to do in each step; shapes (steps, members)."""

    members: tuple[int, ...]
    """Traces."""
    ranks: str
    load: Floats
    unit: str
    """What the load is counted in: ``bytes`` or ``tokens``."""
    busy_s: Floats
    """Between the exchanges."""
    waited_s: float
    """Exposed waiting of all members in the group's exchanges, over all steps."""

    def times_mean(self) -> Floats:
        """Each member's load over the mean of the group, over all steps."""
        whole = self.load.sum(axis=0)
        return np.asarray(whole / max(float(whole.mean()), 1e-9))


def expert_groups(context: AnalysisContext) -> list[ExpertGroup]:
    """Groups with a load that is known, on at least two ranks."""
    rows = context.rows
    if rows.empty:
        return []
    inside = rows[
        (rows["op"] == "all_to_all") & rows["step"].isin(context.steps.numbers) & rows["complete"].astype(bool)
    ]
    uneven = inside.loc[inside["received"] != NO_SIZE, "group"].unique()
    found = [_group(context, of_group) for _, of_group in inside[inside["group"].isin(uneven)].groupby("group")]
    return [group for group in found if group is not None]


def _group(context: AnalysisContext, rows: pd.DataFrame) -> ExpertGroup | None:
    members = tuple(sorted(rows["trace"].unique().tolist()))
    if len(members) < 2:
        return None

    def matrix(values: pd.Series[float]) -> Floats:
        wide = rows.assign(value=values).pivot_table(index="instance", columns="trace", values="value", aggfunc="first")
        return wide.loc[order, list(members)].to_numpy(np.float64)

    steps = rows.groupby("instance").agg(step=("step", "first"), start_ns=("start_ns", "min"))
    steps = steps.sort_values("start_ns")
    order = steps.index
    equal = rows["received"] == NO_SIZE
    sent, received = (matrix(rows[name].where(~equal, rows["bytes"])) for name in ("sent", "received"))
    start, end = matrix(rows["start_ns"]), matrix(rows["end_ns"])
    load = np.zeros((len(context.steps.numbers), len(members)))
    busy = np.zeros_like(load)
    place = np.searchsorted(context.steps.numbers, steps["step"].to_numpy())
    for there, back in _pairs(sent, received, place):
        load[place[there]] += received[there]
        busy[place[there]] += np.maximum(start[back] - end[there], 0.0) / NS_PER_S
    if not load.any():
        return None
    told = _told_tokens(context, members)
    waited = float(rows["exposed_wait_ns"].sum()) / NS_PER_S
    ranks = str(rows["group_ranks"].iloc[0])
    return ExpertGroup(
        members, ranks, load if told is None else told, "bytes" if told is None else "tokens", busy, waited
    )


def _pairs(sent: Floats, received: Floats, step: npt.NDArray[np.intp]) -> list[tuple[int, int]]:
    """Exchanges in the order of their start whose bytes come back in a later one of the same step, each once."""
    found: list[tuple[int, int]] = []
    unpaired: list[int] = []
    for index in range(len(sent)):
        unpaired = [each for each in unpaired if step[each] == step[index]]
        if np.array_equal(sent[index], received[index]):
            continue  # how many tokens will come, or parts of a sequence
        for there in reversed(unpaired):
            if np.array_equal(sent[there], received[index]) and np.array_equal(received[there], sent[index]):
                found.append((there, index))
                unpaired.remove(there)
                break
        else:
            unpaired.append(index)
    return found


def _told_tokens(context: AnalysisContext, members: Sequence[int]) -> Floats | None:
    """Tokens by step and member; None unless all members told theirs."""
    columns = []
    for index in members:
        told = context.traces[index].expert_tokens
        if told is None:
            return None
        by_step = told.groupby("step")["tokens"].sum().reindex(context.steps.numbers)
        columns.append(by_step.to_numpy(np.float64))
    tokens = np.column_stack(columns)
    return tokens if np.isfinite(tokens).all() and tokens.any() else None


def explain_by_experts(context: AnalysisContext, straggler: Finding, groups: Sequence[ExpertGroup]) -> Finding:
    """``straggler`` as one of its experts' load, if that is why it computes longer; else as it is."""
    if straggler.kind != "compute" or straggler.rank is None:
        return straggler
    trace = next(index for index, each in enumerate(context.traces) if each.rank == straggler.rank)
    group = next((each for each in groups if trace in each.members), None)
    if group is None:
        return straggler
    own = group.members.index(trace)
    times = float(group.times_mean()[own])
    busy, load = group.busy_s.mean(axis=0), group.load.mean(axis=0)
    others = np.arange(len(group.members)) != own
    longer = float(busy[own] - np.median(busy[others]))
    pace = busy / np.maximum(load, 1e-9)
    is_slow = pace[own] > AS_FAST * np.median(pace[others])
    if times < UNEQUAL or is_slow or longer < MOST * _longer_in_all(context, trace, group):
        return straggler
    told = f"{straggler.evidence}; {_in_words(group, context.traces[trace].name, times)}"
    told += f", and compute {longer:.3g} s a step longer than their peers between the two exchanges"
    sure = straggler.confidence if group.unit == "tokens" or straggler.confidence != HIGH or times > 2 else MEDIUM
    return replace(straggler, kind="experts", cause=CAUSES["experts"], evidence=told, confidence=sure)


def _longer_in_all(context: AnalysisContext, trace: int, group: ExpertGroup) -> float:
    """Seconds a step by which a rank computes longer than its peers, wherever."""
    compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
    work = context.work_by_step()[:, :, compute].sum(axis=2).mean(axis=0)
    return float(work[trace] - np.median(work[[each for each in group.members if each != trace]]))


def _in_words(group: ExpertGroup, who: str, times: float) -> str:
    counted = "tokens that the program told" if group.unit == "tokens" else "bytes of the all-to-all"
    of = f"the group of ranks {group.ranks}" if group.ranks else "its group"
    return f"the experts of {who} get {times:.2f} times the mean of {of} ({counted})"


def find_expert_imbalance(
    context: AnalysisContext, losses: Floats, groups: Sequence[ExpertGroup], taken: npt.NDArray[np.bool_]
) -> Finding | None:
    """What of ``losses`` (steps, traces, parts + 1) comes of loads that differ by turns; None if they explain nothing.

    ``taken`` (traces,): whose delays other rows hold.
    """
    compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
    by_step = losses[:, :, compute].sum(axis=(1, 2))
    groups = [group for group in groups if not taken[list(group.members)].any() and _follows(group)]
    if not groups or not by_step.any():
        return None
    # Ranks that get more work longer, and the others of their group wait for them in its exchanges.
    longer = sum(float(np.maximum(g.busy_s - np.median(g.busy_s, axis=1, keepdims=True), 0.0).sum()) for g in groups)
    caused = sum(group.waited_s for group in groups) + longer
    lost = min(caused / len(context.traces) / len(context.steps.numbers), float(by_step.mean()))
    worst = max(groups, key=lambda group: group.waited_s)
    member = int(worst.times_mean().argmax())
    who, times = context.traces[worst.members[member]].name, float(worst.times_mean()[member])
    most = float((worst.load.max(axis=1) / np.maximum(worst.load.mean(axis=1), 1e-9)).mean())
    told = (
        f"in a step the largest load of a rank's experts is {most:.2f} times the mean, and computation follows the load"
    )
    told += f"; over all steps {_in_words(worst, who, times)}"
    step = context.worst_step(by_step)
    rows = f"collectives: op=all_to_all group_ranks={worst.ranks}" + ("" if step is None else f" step={step}")
    sure = HIGH if worst.unit == "tokens" else MEDIUM
    return Finding("experts", CAUSES["experts"], lost, None, "", "", told, sure, rows, step)


def _follows(group: ExpertGroup) -> bool:
    """Whether loads differ, and the time between the exchanges goes with them."""
    mean = np.maximum(group.load.mean(axis=1), 1e-9)
    if float((group.load.max(axis=1) / mean).mean()) < UNEQUAL:
        return False
    load, busy = (values - values.mean(axis=1, keepdims=True) for values in (group.load, group.busy_s))
    spread = float(load.std() * busy.std())
    return spread > 0 and float((load * busy).mean()) / spread > MOST
