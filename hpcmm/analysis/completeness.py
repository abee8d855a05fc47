"""Whether the records of a GPU are all there, and who else used it: before any of its time counts as idle.

A gap between two records is idle time if nothing was to be done in it. Launches without records say that there was, and
that the report lost what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet, Times
from hpcmm.analysis.trace import OUTSIDE, RankTrace
from hpcmm.ranges import write_ranges
from hpcmm.reports.report import IMPOSSIBLE, NO_LAUNCH, UNKNOWN, UNRECORDED

UUID = "uuid "
"""What the name of a GPU begins with if no two GPUs share it."""
MIN_LAUNCHES = 8
"""So many launches in a row without a record are no accident; nor is one whose record has times that cannot be."""
LACKING_SHARE = 0.1
"""From this share of all launches on, every one without a record counts."""
MOST_UNTRACED = 0.05
"""A step whose GPU records are missing for more than this share of it counts in no mean."""
_NEVER, _FOREVER = -(1 << 60), 1 << 60


def untraced(activities: pd.DataFrame, calls: pd.DataFrame, steps: pd.DataFrame, is_lossy: bool) -> IntervalSet:
    """When records of a process's GPU work are missing, far beyond the capture if they end before it does.

    ``activities`` and ``calls`` are those of one process (see hpcmm.reports.report.CudaEvents). ``is_lossy``: nsys
    says that it lost records, or may have. Then steps without any launch or record count as well: without that, a
    program that launches nothing uses no GPU.
    """
    lacking = _without_records(activities, calls).missing
    silent = _silent(activities, calls, steps) if is_lossy else IntervalSet.empty()
    return IntervalSet.union_of(
        np.concatenate((lacking.start_ns, silent.start_ns)), np.concatenate((lacking.end_ns, silent.end_ns))
    )


class _Lacking(NamedTuple):
    """Launches without a record that count."""

    missing: IntervalSet
    """When what they launched ran."""
    record: npt.NDArray[np.int64]
    """Of each of them, what became of it; when it ran is what tells where it belongs, for a host runs ahead."""


def _without_records(activities: pd.DataFrame, calls: pd.DataFrame) -> _Lacking:
    """From each launch without a record, once all that was launched before has ended, to what was launched after it."""
    record = calls["record"].to_numpy(np.int64)
    lost = np.isin(record, [UNRECORDED, IMPOSSIBLE])
    if not lost.any():
        return _Lacking(IntervalSet.empty(), record[:0])
    launch, start, end = (activities[name].to_numpy(np.int64) for name in ("launch_ns", "start_ns", "end_ns"))
    known = np.flatnonzero(launch != UNKNOWN)
    order = known[np.argsort(launch[known], kind="stable")]
    ended = np.append(_NEVER, np.maximum.accumulate(end[order]))
    begins = np.append(np.minimum.accumulate(start[order][::-1])[::-1], _FOREVER)
    at = calls["start_ns"].to_numpy(np.int64)[lost]
    place = np.searchsorted(launch[order], at, side="right")
    low, high = np.maximum(at, ended[place]), begins[place]
    weight = np.where(record[lost] == IMPOSSIBLE, MIN_LAUNCHES, 1)
    enough = np.bincount(place, weights=weight)[place] >= MIN_LAUNCHES
    enough |= lost.sum() >= max(MIN_LAUNCHES, LACKING_SHARE * (record != NO_LAUNCH).sum())
    # Records that do not tell their launch may be of these launches.
    stray = IntervalSet.union_of(start[launch == UNKNOWN], end[launch == UNKNOWN])
    enough &= stray.covered_within(low, high) == 0
    return _Lacking(IntervalSet.union_of(low[enough], high[enough]), record[lost][enough & (low < high)])


def _silent(activities: pd.DataFrame, calls: pd.DataFrame, steps: pd.DataFrame) -> IntervalSet:
    """Stretches of whole steps in which nothing was launched and nothing ran."""
    calls = calls[calls["record"] != NO_LAUNCH]
    begin, end = (steps[name].to_numpy(np.int64) for name in ("start_ns", "end_ns"))
    if not len(begin):
        return IntervalSet.empty()
    seen = IntervalSet.union_of(
        np.concatenate((activities["start_ns"], calls["start_ns"])),
        np.concatenate((activities["end_ns"], calls["end_ns"])),
    )
    low, high = np.append(_NEVER, seen.end_ns), np.append(seen.start_ns, _FOREVER)
    first = np.searchsorted(begin, low, side="left")
    last = np.searchsorted(end, high, side="right") - 1
    whole = first <= last
    first, last = first[whole], last[whole]
    low, high = low[whole], high[whole]
    return IntervalSet.union_of(
        np.where(low == _NEVER, _NEVER, begin[first]), np.where(high == _FOREVER, _FOREVER, end[last])
    )


def in_words(missing: IntervalSet, activities: pd.DataFrame, calls: pd.DataFrame, steps: pd.DataFrame) -> str:
    """Which records are missing, in a sentence; empty if it is less than a step, or a tenth of a capture without steps.

    Work that had not ended when the capture did left no record either, which is no loss.
    """
    told = ""
    if len(missing):
        told = _of_steps(missing, steps) if len(steps) else _of_capture(missing, activities, calls)
    if not told:
        return ""
    record = _without_records(activities, calls).record
    lacking, impossible = (int((record == kind).sum()) for kind in (UNRECORDED, IMPOSSIBLE))
    if impossible and not lacking:
        return ""  # which is said where these are left out
    why = (
        f"{lacking:,} launches there have none" if lacking else "no launch is there either, and nsys may have lost them"
    )
    return f"{told}: {why}, so this time counts neither as idle nor as busy"


def _of_steps(missing: IntervalSet, steps: pd.DataFrame) -> str:
    number = steps["step"].to_numpy(np.int64)
    begin, end = (steps[name].to_numpy(np.int64) for name in ("start_ns", "end_ns"))
    lost = missing.covered_within(begin, end)
    touched = lost > MOST_UNTRACED * (end - begin)
    if not touched.any() or lost.sum() < np.median(end - begin):
        return ""
    there = np.flatnonzero(~touched)
    if not len(there):
        return "GPU records are missing in every step"
    first, last = int(there[0]), int(there[-1])
    in_one_piece = len(there) == last - first + 1
    if in_one_piece and first == 0:
        return f"GPU records end after step {number[last]} of {number[-1]}"
    if in_one_piece and last == len(number) - 1:
        return f"GPU records begin with step {number[first]} of {number[-1]}"
    return f"GPU records are missing in steps {write_ranges(number[touched].tolist(), ', ')}"


MISSING_SHARE = 0.1


def _of_capture(missing: IntervalSet, activities: pd.DataFrame, calls: pd.DataFrame) -> str:
    """Of a capture without steps, which ends with its last CUDA call or record."""
    first = min(int(activities["start_ns"].min()), int(calls["start_ns"].min()))
    last = max(int(activities["end_ns"].max()), int(calls["end_ns"].max()))
    lost = int(missing.covered_within([first], [last])[0])
    if lost < MISSING_SHARE * (last - first):
        return ""
    return f"GPU records are missing for {lost / NS_PER_S:.3g} of {(last - first) / NS_PER_S:.3g} s"


@dataclass(frozen=True, slots=True)
class Sharing:
    """The GPU behind a process's device."""

    gpu: str
    """Tells it from all others of the report; of the run, if it begins with UUID."""
    others: IntervalSet
    """When other processes used it."""


def sharing(activities: pd.DataFrame, collective: npt.NDArray[np.bool_], pid: int, device: int) -> Sharing:
    """Who used the GPU that process ``pid`` calls ``device``; ``activities`` are those of the whole report.

    If the report does not tell GPUs apart, processes whose device has the same number use the same one, unless
    NCCL's kernels (``collective``) of both run at once: NCCL refuses two ranks on one GPU.
    """
    process = activities["pid"].to_numpy(np.int64)
    own = (process == pid) & (activities["device"] == device).to_numpy(bool)
    told = str(activities["gpu"].iloc[int(own.argmax())])
    there = (activities["gpu"] == told).to_numpy(bool)
    if not told:
        there = there & (activities["device"] == device).to_numpy(bool)
    start, end = (activities[name].to_numpy(np.int64) for name in ("start_ns", "end_ns"))
    found = [pid]
    busy: list[tuple[Times, Times]] = []
    mine = IntervalSet.union_of(start[own & collective], end[own & collective])
    for user in np.unique(process[there & (process != pid)]):
        theirs = there & (process == user)
        at_once = mine.intersect(IntervalSet.union_of(start[theirs & collective], end[theirs & collective]))
        if told or not len(at_once):
            found.append(int(user))
            busy.append((start[theirs], end[theirs]))
    others = IntervalSet.empty()
    if busy:
        others = IntervalSet.union_of(*(np.concatenate(times) for times in zip(*busy, strict=True)))
    return Sharing(told or f"device {device} of process {min(found)}", others)


_COARSE_NS = 100_000
"""Clocks of two reports do not agree on shorter gaps."""


def busy(activities: pd.DataFrame, gpus: Mapping[int, str]) -> dict[str, IntervalSet]:
    """When the GPUs that have a UUID did something, by what tells them apart; ``gpus``: that by device."""
    found = {}
    for device, gpu in gpus.items():
        if gpu.startswith(UUID):
            own = activities[activities["device"] == device]
            wide = IntervalSet.union_of(own["start_ns"], own["end_ns"] + _COARSE_NS)
            found[gpu] = IntervalSet(wide.start_ns, wide.end_ns - _COARSE_NS)
    return found


def without_other_reports(traces: Sequence[RankTrace], paths: Sequence[Path]) -> list[RankTrace]:
    """``traces``, all on one clock and each of the report at its path, with nothing idle while a process of another
    report used the same GPU."""
    found = list(traces)
    for index, trace in enumerate(traces):
        for gpu, own in trace.busy.items():
            others = [
                each.busy[gpu]
                for each, path in zip(traces, paths, strict=True)
                if path != paths[index] and gpu in each.busy
            ]
            if others:
                starts, ends = ([getattr(each, name) for each in others] for name in ("start_ns", "end_ns"))
                used = IntervalSet.union_of(np.concatenate(starts), np.concatenate(ends)).subtract(own)
                found[index] = _without(found[index], gpu, used)
    return found


def _without(trace: RankTrace, gpu: str, used: IntervalSet) -> RankTrace:
    """``trace`` with nothing idle on ``gpu`` while another process ``used`` it. Which gaps that were is not known: all
    kinds of idle time lose the same share."""
    if trace.gpu is None:
        return trace
    rows = trace.gpu
    mine, inside = (rows["gpu"] == gpu).to_numpy(bool), (rows["step"] != OUTSIDE).to_numpy(bool)
    covered = used.covered_within(rows["start_ns"].to_numpy(np.int64), rows["end_ns"].to_numpy(np.int64))
    # The row of what lies outside the steps spans them.
    covered = np.where(inside, covered, np.maximum(covered - covered[mine & inside].sum(), 0))
    names = [str(name) for name in rows if str(name).startswith("idle_") and name != "idle_sync_ns"]
    idle = rows[names].to_numpy(np.float64).sum(axis=1)
    shared = np.where(mine, np.minimum(covered, idle), 0.0)
    left = np.divide(idle - shared, idle, out=np.ones(len(rows)), where=idle > 0)
    rows = rows.assign(
        shared_ns=rows["shared_ns"] + shared, **{name: rows[name] * left for name in (*names, "idle_sync_ns")}
    )
    return replace(trace, gpu=rows, starved=trace.starved and trace.starved.subtract(used))
