"""Steps and phases from the NVTX ranges of a program that knows nothing of hpcmm.

A loop usually names its repetitions (``iteration 12``, ``training_step_7``, ``ProfilerStep#3``, ``step``), and within
them its phases. Such ranges become steps by themselves only if it is clear: one at a time on its thread, with a name
that says so, which cover most of the time from one to the next, and no other ranges that could be meant as well.
Otherwise the candidates are listed, and the user chooses. ``docs/bottlenecks.md`` has the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.choice import Choice
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, first_claims
from hpcmm.analysis.range_names import (
    NUMBER,
    Cycles,
    counted,
    cycles_by_rule,
    is_library,
    is_operator,
    looks_like_a_step,
    matching,
    never_a_step,
    part_of_a_step,
    plain,
    templates,
    without_counters,
    without_micro_batches,
)
from hpcmm.annotate import schema
from hpcmm.reports.report import PUSH_POP, UNKNOWN

MIN_STEPS = 3
MIN_COVER = 0.5
"""Of the time from one range's start to the next one's, as a median: less is a part of a step."""
COUNTED_STEPS, COUNTED_COVER = 5, 0.8
"""The same for ranges whose name does not say that they are steps, but counts up."""
RIVAL_COVER = 0.1
RIVAL_CALLS = 2.0
"""Ranges of another name that come about as often, and not within the first ones, make the choice unclear."""
WITHIN = 0.5
MAX_LABELS = 50
"""Of the ranges of a thread so many kinds are looked at as parts of a loop."""
MAX_PHASES = 30
LEAST_PHASE = 0.002
"""Of the time of all steps, if each took the usual time: what takes less is no phase, unless it is called one."""
OPENED_SHARE = 0.5
"""A phase of this share of the steps is opened if its own parts cover as much of it: its parts are phases, too."""
MAX_OPENED = 3
MAX_TOLD = 6
NVTX_COLUMNS = ["start_ns", "end_ns", "closed", "pid", "tid", "end_tid", "kind", "domain", "name", "payload"]
_NOTHING = pd.DataFrame(columns=NVTX_COLUMNS)


@dataclass(frozen=True, slots=True)
class Adopted:
    """Ranges as those of domain hpcmm (NVTX_COLUMNS): ``step`` with its number, and phases."""

    ranges: pd.DataFrame
    steps: str = ""
    """What the steps are called, with ``{n}`` for a number; empty if none were taken."""
    phases: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    """What could be chosen instead, in words."""
    labels: frozenset[str] = frozenset()
    """All that could be chosen instead, of threads that launch."""
    other_loops: tuple[str, ...] = ()
    """Ranges that are as clearly steps of another loop, before or after the one that was taken, in words."""
    left_out: tuple[str, ...] = ()
    """Names of ranges beside the steps that may be steps as well, but differ from them by more than numbers."""
    stepped_before: frozenset[int] = frozenset()
    """Processes that ran steps before the first of those that were chosen."""
    begins: str = ""
    """The range with which most steps begin, if no range is one: ``steps`` is empty then."""
    begin_rules: tuple[str, ...] = ()
    """What steps begin by then, and could begin by as well, as :func:`~hpcmm.analysis.range_names.cycles_by_rule` says
    it."""


def adopt(ranges: pd.DataFrame, choice: Choice, launches: pd.DataFrame | None = None) -> Adopted:
    """Steps and phases among ``ranges`` (RANGE_COLUMNS of :mod:`hpcmm.reports.report`).

    ``launches``: pid and launch_tid of all that GPUs did. If there is any, only a thread that launches runs steps,
    unless the user says which ranges are steps, and none of them is of such a thread.
    """
    if ranges.empty:
        return Adopted(_NOTHING)
    ranges = _labelled(ranges)
    candidates = step_candidates(ranges)
    launching = _launching(candidates, launches)
    told, labels = _told(candidates), frozenset(launching["label"])
    if choice.steps:
        matched = ranges[matching(ranges["name"], choice.steps)]
        of_launching = _launching(matched, launches)
        chosen = matched if of_launching.empty else of_launching
    else:
        chosen = _clear_steps(ranges, launching, choice.usual_steps)
    if chosen.empty:
        is_asked = not choice.steps and not choice.needs_step_ranges
        cycles, rules = _cycles(ranges, launching, choice.begin_rule) if is_asked else (pd.DataFrame(), [])
        if cycles.empty:
            return Adopted(_NOTHING, candidates=told, labels=labels)
        usual = str(cycles["name"].mode().iloc[0])  # the first step may begin with what comes once
        adopted = _adopted(ranges, cycles, choice.phases)
        return replace(adopted, candidates=told, labels=labels, begins=usual, begin_rules=tuple(rules))
    steps = pd.concat([_numbered(_on_one_thread(own)) for _, own in chosen.groupby("pid")])
    names = steps["name"].drop_duplicates() if len(steps) == steps["pid"].nunique() else steps["label"]
    adopted = replace(_adopted(ranges.drop(steps.index), steps, choice.phases), candidates=told, labels=labels)
    other_loops = _other_loops(launching, steps)
    return replace(
        adopted,
        steps=", ".join(map(plain, names.astype(str).drop_duplicates()[:MAX_TOLD])),
        other_loops=() if choice.steps else _told(other_loops),
        left_out=() if choice.steps else _left_out(ranges[~ranges["label"].isin(other_loops["label"])], steps),
        stepped_before=_stepped_before(ranges, steps),
    )


def adopt_phases(ranges: pd.DataFrame, steps: pd.DataFrame, expression: str) -> Adopted:
    """Phases that ``expression`` matches, within ``steps`` that the program has named for hpcmm (NVTX_COLUMNS)."""
    ranges = _labelled(ranges)
    ranges = ranges[~((ranges["domain"] == schema.DOMAIN) & ranges["name"].isin(_OWN_STEPS))]
    return _adopted(ranges, steps.assign(label=""), expression)


def _labelled(ranges: pd.DataFrame) -> pd.DataFrame:
    """``ranges`` with what each is called but for numbers, as ``label``."""
    known = templates(ranges["name"].cat.categories.to_list())
    return ranges.assign(label=known[ranges["name"].cat.codes.to_numpy()])


_OWN_STEPS = (schema.STEP, schema.AUTOMATIC_STEP)


def _adopted(ranges: pd.DataFrame, steps: pd.DataFrame, expression: str) -> Adopted:
    parts = [_phases_of(ranges, own, expression) for _, own in steps.groupby("pid")]
    phases = pd.concat(parts, ignore_index=True)
    rows = pd.concat([steps.assign(name=schema.STEP), phases], ignore_index=True)
    rows = rows.assign(domain=schema.DOMAIN, kind=PUSH_POP)[NVTX_COLUMNS].astype({"payload": "Int64", "closed": bool})
    longest = (phases["end_ns"] - phases["start_ns"]).groupby(phases["name"]).sum().sort_values(ascending=False)
    return Adopted(rows, phases=tuple(map(str, longest.index)))


def _launching(candidates: pd.DataFrame, launches: pd.DataFrame | None) -> pd.DataFrame:
    """Those of threads that launch something, or, if the launches are not known, of processes that use a GPU."""
    if launches is None or launches.empty:
        return candidates
    known = launches[launches["launch_tid"] != UNKNOWN]
    if known.empty:
        return candidates[candidates["pid"].isin(launches["pid"])]
    threads = pd.MultiIndex.from_frame(known[["pid", "launch_tid"]].drop_duplicates())
    return candidates[pd.MultiIndex.from_frame(candidates[["pid", "tid"]]).isin(threads)]


def _clear_steps(ranges: pd.DataFrame, candidates: pd.DataFrame, usual: str) -> pd.DataFrame:
    """The ranges of ``candidates`` that are steps: those with the label ``usual``, or without one the clear ones."""
    if usual:
        same = candidates[candidates["label"] == usual]
    else:
        clear = _clear(ranges, candidates)
        same = candidates.iloc[:0]
        if clear is not None:
            same = candidates[(candidates["domain"] == clear[0]) & (candidates["label"] == clear[1])]
    keys = ["pid", "tid", "domain", "label"]
    alike = ranges[ranges["label"].isin(same["label"])]
    theirs = pd.MultiIndex.from_frame(alike[keys].astype({"domain": object}))
    return alike[theirs.isin(pd.MultiIndex.from_frame(same[keys]))]


def _cycles(ranges: pd.DataFrame, candidates: pd.DataFrame, rule: str) -> tuple[pd.DataFrame, list[str]]:
    """Steps of a loop whose phases alone are ranges, and the rules by which they could be cut on all its processes.

    They are cut by ``rule``, or the first of these. Named by the range with which they begin; empty if it is not clear
    that they are a training loop's.
    """
    ways: list[tuple[pd.DataFrame, dict[str, Cycles]]] = []
    for pid, own in candidates.groupby("pid"):
        tid = int(str(own.groupby("tid")["total_ns"].sum().idxmax()))
        labels = own.loc[own["tid"] == tid, "label"].head(MAX_LABELS)  # which take most time
        mine = ranges[(ranges["pid"] == pid) & (ranges["tid"] == tid) & ranges["label"].isin(labels)]
        parts = outermost(mine[~mine["label"].isin(_holders(mine))])
        ways.append((parts, cycles_by_rule(parts["label"], parts["end_ns"] - parts["start_ns"])))
    rules = [each for each in (ways[0][1] if ways else ()) if all(each in found for _, found in ways)]
    rule = rule or next(iter(rules), "")
    if rule not in rules:
        return pd.DataFrame(), rules
    found: list[pd.DataFrame] = []
    for parts, known in ways:
        begins, whole = known[rule].begins, known[rule].is_step
        end = np.append(parts["start_ns"].to_numpy(np.int64)[begins[1:]], parts["end_ns"].max())
        cut = parts.iloc[begins]
        steps = cut.assign(end_ns=end, closed=True, name=cut["label"], label="", end_tid=cut["tid"])[whole]
        steps["payload"] = np.arange(len(steps))
        found.append(steps.set_axis(-1 - np.arange(len(steps)) - sum(len(each) for each in found)))
    return pd.concat(found), rules


def _holders(ranges: pd.DataFrame) -> set[str]:
    """Labels of ``ranges`` of one thread that hold several ranges of another label each: an epoch, a run."""
    starts = {str(label): np.sort(own["start_ns"].to_numpy(np.int64)) for label, own in ranges.groupby("label")}
    held = set()
    for label, own in ranges.groupby("label"):
        bounds = own[["start_ns", "end_ns"]].to_numpy(np.int64)
        inside = [np.diff(np.searchsorted(at, bounds), axis=1) for other, at in starts.items() if other != label]
        if any(float(np.median(each)) > 1 for each in inside):
            held.add(str(label))
    return held


def _on_one_thread(ranges: pd.DataFrame) -> pd.DataFrame:
    """The steps among ``ranges`` of one process: on the thread that has most of them, none within another."""
    on_thread = (ranges["end_ns"] - ranges["start_ns"]).groupby(ranges["tid"]).sum()
    return outermost(ranges[ranges["tid"] == on_thread.idxmax()])


def _other_loops(candidates: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Those of ``candidates`` that are clearly steps, before or after all ``steps``."""
    named = candidates["label"].map(looks_like_a_step).astype(bool) & (candidates["cover"] >= MIN_COVER)
    apart = (candidates["last_ns"] <= steps["start_ns"].min()) | (candidates["first_ns"] >= steps["end_ns"].max())
    found: pd.DataFrame = candidates[named & apart & ~candidates["label"].isin(steps["label"])]
    return found


def _left_out(ranges: pd.DataFrame, steps: pd.DataFrame) -> tuple[str, ...]:
    """Names of ``ranges`` beside ``steps``, on their threads, that look like steps and last half as long at least."""
    found: list[str] = []
    for (pid, tid), own in steps.groupby(["pid", "tid"]):
        mine = ranges[(ranges["pid"] == pid) & (ranges["tid"] == tid) & ~ranges["label"].isin(own["label"])]
        mine = mine[mine["label"].map(looks_like_a_step).astype(bool)]
        start, end = mine["start_ns"].to_numpy(np.int64), mine["end_ns"].to_numpy(np.int64)
        beside = IntervalSet.union_of(own["start_ns"], own["end_ns"]).covered_within(start, end) == 0
        is_long = end - start >= WITHIN * float((own["end_ns"] - own["start_ns"]).median())
        found += map(str, mine.loc[beside & is_long, "name"])
    return tuple(found)


def _stepped_before(ranges: pd.DataFrame, steps: pd.DataFrame) -> frozenset[int]:
    """Processes with ranges that are called as their ``steps`` and lie on the same thread before these."""
    found = set()
    for pid, own in steps.groupby("pid"):
        same = (ranges["pid"] == pid) & (ranges["tid"] == own["tid"].iloc[0]) & ranges["label"].isin(own["label"])
        if (ranges.loc[same, "start_ns"] < own["start_ns"].min()).any():
            found.add(int(str(pid)))
    return frozenset(found)


def outermost(ranges: pd.DataFrame) -> pd.DataFrame:
    """Those of one thread's ``ranges`` that lie in no other, in the order of time. They may overlap."""
    start, end = ranges["start_ns"].to_numpy(np.int64), ranges["end_ns"].to_numpy(np.int64)
    order = np.lexsort((-end, start))
    start, end = first_claims(start[order], end[order])
    return ranges.iloc[order[end > start]]


def _numbered(steps: pd.DataFrame) -> pd.DataFrame:
    """``steps`` of one process with their number as ``payload``: from the name, else their own payload if that counts,
    else their place."""
    number = counted([str(name) for name in steps["name"]])
    if number is not None:
        return steps.assign(payload=pd.array(number, dtype="Int64"))
    told = steps["payload"]
    counts = bool(told.notna().all()) and bool((np.diff(told.to_numpy(np.int64)) > 0).all())
    return steps if counts else steps.assign(payload=pd.array(range(len(steps)), dtype="Int64"))


def in_words(adopted: Sequence[Adopted]) -> str:
    """Which ranges of all reports are steps and phases; empty if none were taken."""
    steps = list(dict.fromkeys(each.steps for each in adopted if each.steps))
    begins = list(dict.fromkeys(each.begins for each in adopted if each.begins))
    phases = list(dict.fromkeys(phase for each in adopted for phase in each.phases))
    if not steps and not phases:
        return ""
    told = [f"steps are the NVTX ranges {' and '.join(map(repr, steps))}"] if steps else []
    told += [f"steps begin with each NVTX range {' or '.join(map(repr, begins))}"] if begins else []
    several = ", ".join(phases[:MAX_TOLD]) + (f" and {len(phases) - MAX_TOLD} more" if len(phases) > MAX_TOLD else "")
    told += [f"phases are {several}"] if phases else ["no ranges within them are phases"]
    loops = list(dict.fromkeys(loop for each in adopted for loop in each.other_loops))
    told += [f"another loop is {' and '.join(loops[:MAX_TOLD])}"] if loops else []
    left = [plain(name) for each in adopted for name in each.left_out]
    told += [f"{len(left)} ranges that may be steps are left out, as {left[0]!r}"] if left else []
    return f"{', '.join(told)}; --steps and --phases choose others"


def step_candidates(ranges: pd.DataFrame) -> pd.DataFrame:
    """Ranges by process, thread, domain and label that come often enough, the longest in all first.

    Columns pid, tid, domain, label, calls, total_ns, median_ns, cover (of the time from one start to the next, as a
    median), counts (whether a number in their names goes up), first_ns and last_ns.
    """
    keys = ["pid", "tid", "domain", "label"]
    sizes = ranges.groupby(keys, observed=True)["start_ns"].transform("size")
    rows = []
    for key, own in ranges[sizes >= MIN_STEPS].groupby(keys, observed=True, sort=False):
        whole = outermost(own)
        if len(whole) < MIN_STEPS or is_library(str(key[2])) or is_operator(str(key[3])):
            continue
        start, end = whole["start_ns"].to_numpy(np.int64), whole["end_ns"].to_numpy(np.int64)
        length = end - start
        cover = float(np.median(length[:-1] / np.maximum(np.diff(start), 1)))
        counts = NUMBER in str(key[3]) and counted([str(name) for name in whole["name"]]) is not None
        rows.append((*key, len(whole), int(length.sum()), float(np.median(length)), cover, counts, start[0], end.max()))
    columns = [*keys, "calls", "total_ns", "median_ns", "cover", "counts", "first_ns", "last_ns"]
    return pd.DataFrame(rows, columns=columns).sort_values("total_ns", ascending=False, ignore_index=True)


def _clear(ranges: pd.DataFrame, candidates: pd.DataFrame) -> tuple[str, str] | None:
    """Domain and label of the ranges that are clearly steps; None if it is not clear."""
    never = candidates["label"].map(never_a_step).astype(bool)
    named = candidates["label"].map(looks_like_a_step).astype(bool)
    counts = candidates["counts"].astype(bool) & ~never
    covering = candidates[named & (candidates["cover"] >= MIN_COVER)]
    if covering.empty:
        enough = (candidates["calls"] >= COUNTED_STEPS) & (candidates["cover"] >= COUNTED_COVER)
        covering = candidates[counts & enough]
    if covering.empty:
        return None
    best = covering.iloc[0]
    rivals = candidates[
        (named | counts)
        & (candidates["pid"] == best["pid"])
        & ((candidates["label"] != best["label"]) | (candidates["tid"] != best["tid"]))
        & (candidates["cover"] >= RIVAL_COVER)
        & (candidates["first_ns"] < best["last_ns"])  # a loop before or after is another one
        & (candidates["last_ns"] > best["first_ns"])
        & candidates["calls"].between(best["calls"] / RIVAL_CALLS, best["calls"] * RIVAL_CALLS)
    ]
    if any(not _lie_within(ranges, rival, best) for _, rival in rivals.iterrows()):
        return None
    return str(best["domain"]), str(best["label"])


def _lie_within(ranges: pd.DataFrame, inner: pd.Series, outer: pd.Series) -> bool:
    """Whether both are on one thread, and most ranges of the candidate ``inner`` begin within one of ``outer``."""
    if inner["tid"] != outer["tid"]:
        return False

    def of(candidate: pd.Series) -> pd.DataFrame:
        same = [ranges[key] == candidate[key] for key in ("pid", "tid", "domain", "label")]
        return ranges[np.logical_and.reduce(same)]

    whole = of(outer)
    around = IntervalSet.union_of(whole["start_ns"], whole["end_ns"])
    start = of(inner)["start_ns"].to_numpy(np.int64)
    return float((around.covered_within(start, start + 1) > 0).mean()) >= WITHIN


def _told(candidates: pd.DataFrame) -> tuple[str, ...]:
    """The candidates in words, those of all processes together."""
    if candidates.empty:
        return ()
    by_label = candidates.groupby("label", sort=False).agg({"calls": "max", "median_ns": "median", "total_ns": "sum"})
    by_label = by_label.sort_values("total_ns", ascending=False).head(MAX_TOLD)
    return tuple(
        f"'{label}' ({row['calls']:.0f} x {row['median_ns'] / NS_PER_S:.3g} s)" for label, row in by_label.iterrows()
    )


def _phases_of(ranges: pd.DataFrame, steps: pd.DataFrame, expression: str) -> pd.DataFrame:
    """Phases within ``steps``, of one process, on the thread that runs these; named without what counts."""
    pid, tid = steps["pid"].iloc[0], steps["tid"].iloc[0]
    mine = ranges[(ranges["pid"] == pid) & (ranges["tid"] == tid) & (ranges["end_tid"] == tid)]
    mine = mine[~mine["label"].isin(steps["label"].unique()) & ~_holds_a_step(mine, steps)]
    if expression:
        chosen = mine[matching(mine["name"], expression)] if len(mine) else mine
    else:
        own = ~mine["domain"].astype(str).map(is_library).astype(bool)
        operator = mine["label"].map(is_operator).astype(bool)
        mine = mine[own & ~operator]
        chosen = pd.concat([_parts(mine, steps), _between(mine, steps)])
    # hpcmm's own phases carry the size of their batch.
    size = chosen["payload"].where(chosen["domain"] == schema.DOMAIN)
    name = pd.Series(without_counters(chosen["name"].cat.remove_unused_categories()), index=chosen.index)
    alike = {each: without_micro_batches(each) for each in name.unique()}
    named: pd.DataFrame = chosen.assign(name=name.map(alike), payload=size)
    return named


def _holds_a_step(ranges: pd.DataFrame, steps: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which of ``ranges`` begin no later and end no earlier than a step (sorted), and are longer: an epoch, a run."""
    begin, end = steps["start_ns"].to_numpy(np.int64), steps["end_ns"].to_numpy(np.int64)
    start, finish = ranges["start_ns"].to_numpy(np.int64), ranges["end_ns"].to_numpy(np.int64)
    first = np.minimum(np.searchsorted(begin, start, side="left"), len(begin) - 1)
    longer = finish - start > end[first] - begin[first]
    held: npt.NDArray[np.bool_] = (begin[first] >= start) & (end[first] <= finish) & longer
    return held


def _usual_ns(steps: pd.DataFrame) -> float:
    """All steps if each took the usual time: one that compiles is as long as thousands of others."""
    lengths_ns = steps["end_ns"] - steps["start_ns"]
    return float(lengths_ns.median()) * len(lengths_ns) if len(lengths_ns) else 0.0


def _is_large(taken_ns: pd.Series, steps: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which labels, by what they take in all, are phases."""
    # A host that runs ahead is in the forward pass for no time, and launches all of its kernels there.
    tells = taken_ns.index.map(lambda label: part_of_a_step(str(label)) != "").to_numpy(dtype=bool)
    large: npt.NDArray[np.bool_] = tells | (taken_ns >= LEAST_PHASE * _usual_ns(steps)).to_numpy(bool)
    return large


def _between(ranges: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The outermost ranges that lie between steps (sorted), such as the loading of the next batch."""
    inner = IntervalSet.union_of(steps["start_ns"], steps["end_ns"])
    start, end = ranges["start_ns"].to_numpy(np.int64), ranges["end_ns"].to_numpy(np.int64)
    within = (start >= steps["start_ns"].min()) & (end <= steps["end_ns"].max())
    outer = outermost(ranges[within & (inner.covered_within(start, np.maximum(end, start + 1)) == 0)])
    taken_ns = (outer["end_ns"] - outer["start_ns"]).groupby(outer["label"]).sum()
    kept = taken_ns[_is_large(taken_ns, steps)].nlargest(MAX_PHASES).index
    found: pd.DataFrame = outer[outer["label"].isin(kept)]
    return found


def _parts(ranges: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """What the steps consist of: the outermost ranges within them, and the parts of such as hold nearly all of them."""
    whole_ns = _usual_ns(steps)
    inside = _begin_within(ranges, steps)
    found = []
    outer = steps
    for _ in range(MAX_OPENED):
        level = outermost(inside)
        taken_ns = (level["end_ns"] - level["start_ns"]).groupby(level["label"]).sum()
        kept = taken_ns[_is_large(taken_ns, steps)].nlargest(MAX_PHASES).index
        found.append(level[level["label"].isin(kept)])
        opened = taken_ns[taken_ns >= OPENED_SHARE * whole_ns].index
        outer = level[level["label"].isin(opened)]
        inside = _begin_within(inside.drop(level.index), outer)
        below = outermost(inside)
        if outer.empty or (below["end_ns"] - below["start_ns"]).sum() < OPENED_SHARE * taken_ns[opened].sum():
            break
    return pd.concat(found) if found else ranges.iloc[:0]


def _begin_within(ranges: pd.DataFrame, outer: pd.DataFrame) -> pd.DataFrame:
    around = IntervalSet.union_of(outer["start_ns"], outer["end_ns"])
    start = ranges["start_ns"].to_numpy(np.int64)
    inside: pd.DataFrame = ranges[around.covered_within(start, start + 1) > 0]
    return inside
