"""OS runtime calls of one report by process, thread and function; and when its step thread was blocked in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.trace import MainThread, RankTrace

WAITPID_FUNCTIONS = frozenset({"wait", "wait3", "wait4", "waitid", "waitpid"})
_COMMUNICATION_WAITS = (
    "epoll_pwait",
    "epoll_wait",
    "futex",
    "poll",
    "ppoll",
    "pselect",
    "pthread_cond_clockwait",
    "pthread_cond_timedwait",
    "pthread_cond_wait",
    "pthread_mutex_lock",
    "pthread_rwlock_",
    "recv",
    "sched_yield",
    "select",
    "sem_",
)
"""Starts of the names of calls in which a thread waits for other threads or for the network. Not sleeps, not files."""

_EXCHANGES = ("recv", "send", "writev")

MIN_STALL_NS = 300_000_000
STALL_TIMES = 10.0
"""A stall is so many times as long as 99% of the gaps between a process's calls."""

STEP_THREAD, OTHER_THREAD = "step", "other"

OSRT_COLUMNS = [
    "process_role",
    "thread_role",
    "function",
    "calls",
    "total_s",
    "union_s",
    "in_step_s",
    "p50_s",
    "p95_s",
    "max_s",
]


def blocked_intervals(osrt: pd.DataFrame, pid: int, tid: int) -> IntervalSet | None:
    """When thread ``tid`` waited in the OS for other threads or the network; None if its calls were not traced."""
    mine = osrt[(osrt["pid"] == pid) & (osrt["tid"] == tid)]
    if mine.empty:
        return None
    waits = [name for name in mine["function"].cat.categories if is_waiting(name)]
    chosen = mine[mine["function"].isin(waits)]
    return IntervalSet.union_of(chosen["start_ns"], chosen["end_ns"])


def is_waiting(function: str) -> bool:
    """Whether a thread waits in this call for other threads or the network."""
    return function.startswith(_COMMUNICATION_WAITS)


def main_thread(osrt: pd.DataFrame, pid: int) -> MainThread | None:
    """What the first thread of a process, whose tid is the pid, did in the OS; None if its calls were not traced."""
    mine = osrt[osrt["pid"] == pid]
    main = mine["tid"] == pid
    if not main.any():
        return None
    sends = [name for name in mine["function"].cat.categories if name.startswith(_EXCHANGES)]
    exchanges = mine[~main & mine["function"].isin(sends)]
    first_and_last = [exchanges["start_ns"].min(), exchanges["end_ns"].max()] if len(exchanges) else []
    calls = mine.loc[main, ["start_ns", "end_ns", "function"]].reset_index(drop=True)
    return MainThread(calls, np.array(first_and_last, dtype=np.int64))


def stalled_intervals(osrt: pd.DataFrame, pid: int) -> IntervalSet:
    """When no thread of a process entered or left an OS call for far longer than it is usual for the process.

    Of a process whose calls are all long, or few, nothing can be said, and the set is empty.
    """
    mine = osrt[osrt["pid"] == pid]
    # Starts lie in the order of time, nearly; a stable sort makes use of that.
    ends = np.sort(mine["end_ns"].to_numpy(np.int64), kind="stable")
    times = np.sort(np.concatenate((mine["start_ns"].to_numpy(np.int64), ends)), kind="stable")
    # Between two neighbouring times of any thread the whole process neither entered nor left a call.
    gaps = np.diff(times)
    if len(gaps) < 1000:
        return IntervalSet.empty()
    limit = max(MIN_STALL_NS, STALL_TIMES * float(np.quantile(gaps, 0.99)))
    quiet = np.flatnonzero(gaps > limit)
    return IntervalSet(times[quiet], times[quiet + 1])


def summarise(
    osrt: pd.DataFrame, roles: dict[int, str], step_thread: tuple[int, int], steps: IntervalSet
) -> pd.DataFrame:
    """One row a process role, thread role and function, longest union first.

    ``total_s`` adds up all threads; ``union_s`` counts a moment once however many threads wait; ``in_step_s`` is what
    of the union lies within steps. ``roles`` names each pid's role; ``step_thread`` is the (pid, tid) that runs steps.
    """
    if osrt.empty:
        return pd.DataFrame(columns=OSRT_COLUMNS)
    functions = osrt["function"].cat.categories
    role_names = sorted(set(roles.values()) | {"other"})
    code, pids = pd.factorize(osrt["pid"].to_numpy())
    role = np.array([role_names.index(roles.get(int(pid), "other")) for pid in pids], dtype=np.int64)[code]
    on_step_thread = (osrt["pid"].to_numpy() == step_thread[0]) & (osrt["tid"].to_numpy() == step_thread[1])
    group = (role * 2 + on_step_thread) * len(functions) + osrt["function"].cat.codes.to_numpy()
    table = _by_group(group, osrt["start_ns"].to_numpy(np.int64), osrt["end_ns"].to_numpy(np.int64), steps)
    code = table.pop("group").to_numpy()
    table["function"] = np.asarray(functions)[code % len(functions)]
    table["thread_role"] = np.where(code // len(functions) % 2 == 1, STEP_THREAD, OTHER_THREAD)
    table["process_role"] = np.asarray(role_names)[code // len(functions) // 2]
    order = ["process_role", "thread_role", "union_s", "function"]
    return table[OSRT_COLUMNS].sort_values(order, ascending=[False, False, False, True], ignore_index=True)


def _by_group(group: np.ndarray, start: np.ndarray, end: np.ndarray, steps: IntervalSet) -> pd.DataFrame:
    """Counts, sums, unions and quantiles of call durations by group number."""
    if group.max() < np.iinfo(np.int16).max:
        group = group.astype(np.int16)  # which numpy sorts in linear time
    order = np.argsort(group, kind="stable")
    present, calls = np.unique(group, return_counts=True)
    rows = [
        _measure(start[members], end[members], steps) for members in np.split(order, np.cumsum(calls)[:-1].astype(int))
    ]
    table = pd.DataFrame(rows, columns=["total_s", "union_s", "in_step_s", "p50_s", "p95_s", "max_s"]) / NS_PER_S
    return table.assign(group=present.astype(np.int64), calls=calls)


def _measure(start: np.ndarray, end: np.ndarray, steps: IntervalSet) -> tuple[float, ...]:
    """Sum, union, union within ``steps``, median, 95th percentile and maximum of calls, in nanoseconds."""
    union = IntervalSet.union_of(start, end)
    in_steps = int(steps.covered_within(union.start_ns, union.end_ns).sum())
    length = end - start
    p50, p95 = np.quantile(length, [0.50, 0.95])
    return float(length.sum()), union.total_ns, in_steps, p50, p95, length.max()


def calls_by_phase(osrt: pd.DataFrame, pid: int, tid: int, segments: pd.DataFrame) -> pd.DataFrame:
    """Time of the step thread in each OS function: step, phase, function, total_ns. A call counts where it began."""
    mine = osrt[(osrt["pid"] == pid) & (osrt["tid"] == tid)]
    start = mine["start_ns"].to_numpy(np.int64)
    index = np.searchsorted(segments["start_ns"].to_numpy(np.int64), start, side="right") - 1
    inside = (index >= 0) & (start < np.append(segments["end_ns"].to_numpy(np.int64), 0)[index])
    rows = segments.iloc[index[inside]]
    frame = pd.DataFrame(
        {
            "step": rows["step"].to_numpy(),
            "phase": rows["phase"].to_numpy(),
            "function": mine["function"].astype(object).to_numpy()[inside],
            "total_ns": (mine["end_ns"] - mine["start_ns"]).to_numpy()[inside],
        }
    )
    return frame.groupby(["step", "phase", "function"]).agg({"total_ns": "sum"}).reset_index()


def osrt_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """OS runtime calls of every rank: rank, role, thread_role, function and OSRT_COLUMNS' times; longest first."""
    frames = [trace.osrt.assign(rank=trace.rank) for trace in traces]
    columns = ["rank", *OSRT_COLUMNS]
    table = pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    table = table.rename(columns={"process_role": "role"})
    order = ["rank", "role", "thread_role", "total_s", "function"]
    return table.sort_values(order, ascending=[True, True, True, False, True], ignore_index=True)
