"""OS runtime calls of one report by process, thread and function; and when its step thread was blocked in them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hpcmm.analysis.intervals import IntervalSet

NS_PER_S = 1e9

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
    """When thread ``tid`` waited in the OS for other threads or the network; None where its calls were not traced."""
    mine = osrt[(osrt["pid"] == pid) & (osrt["tid"] == tid)]
    if mine.empty:
        return None
    waits = [name for name in mine["function"].cat.categories if name.startswith(_COMMUNICATION_WAITS)]
    chosen = mine[mine["function"].isin(waits)]
    return IntervalSet.union_of(chosen["start_ns"], chosen["end_ns"])


def summarise(
    osrt: pd.DataFrame, roles: dict[int, str], step_thread: tuple[int, int], steps: IntervalSet
) -> pd.DataFrame:
    """One row a process role, thread role and function, longest union first.

    ``total_s`` adds up all threads; ``union_s`` counts a moment once however many threads wait; ``in_step_s`` is what
    of the union lies within steps. ``roles`` names each pid's role; ``step_thread`` is the (pid, tid) that runs steps.
    """
    if osrt.empty:
        return pd.DataFrame(columns=OSRT_COLUMNS)
    pid, tid = osrt["pid"].to_numpy(), osrt["tid"].to_numpy()
    functions = osrt["function"].cat.categories
    role_names = sorted(set(roles.values()) | {"other"})
    role_code = pd.Series(pid).map({key: role_names.index(role) for key, role in roles.items()})
    role = role_code.fillna(role_names.index("other")).to_numpy(np.int64)
    on_step_thread = ((pid == step_thread[0]) & (tid == step_thread[1])).astype(np.int64)
    group = (role * 2 + on_step_thread) * len(functions) + osrt["function"].cat.codes.to_numpy(np.int64)
    table = _by_group(group, osrt["start_ns"].to_numpy(np.int64), osrt["end_ns"].to_numpy(np.int64), steps)
    code = table.pop("group").to_numpy()
    table["function"] = np.asarray(functions)[code % len(functions)]
    table["thread_role"] = np.where(code // len(functions) % 2 == 1, STEP_THREAD, OTHER_THREAD)
    table["process_role"] = np.asarray(role_names)[code // len(functions) // 2]
    order = ["process_role", "thread_role", "union_s", "function"]
    return table[OSRT_COLUMNS].sort_values(order, ascending=[False, False, False, True], ignore_index=True)


def _by_group(group: np.ndarray, start: np.ndarray, end: np.ndarray, steps: IntervalSet) -> pd.DataFrame:
    """Counts, sums, unions and quantiles of call durations by group number."""
    duration = end - start
    order = np.lexsort((duration, group))
    sorted_duration = duration[order]
    present, first, calls = np.unique(group[order], return_index=True, return_counts=True)
    # Groups are laid one after another on a single axis, so that one union serves all of them.
    low = int(start.min())
    width = int(end.max()) - low + 1
    dense = np.searchsorted(present, group)
    union = IntervalSet.union_of(start - low + dense * width, end - low + dense * width)
    owner = union.start_ns // width
    covered = steps.covered_within(
        union.start_ns % width + low, union.start_ns % width + low + union.end_ns - union.start_ns
    )
    return pd.DataFrame(
        {
            "group": present,
            "calls": calls,
            "total_s": np.add.reduceat(sorted_duration, first) / NS_PER_S,
            "union_s": np.bincount(owner, union.end_ns - union.start_ns, len(present)) / NS_PER_S,
            "in_step_s": np.bincount(owner, covered, len(present)) / NS_PER_S,
            "p50_s": _quantile(sorted_duration, first, calls, 0.50) / NS_PER_S,
            "p95_s": _quantile(sorted_duration, first, calls, 0.95) / NS_PER_S,
            "max_s": sorted_duration[first + calls - 1] / NS_PER_S,
        }
    )


def _quantile(values: np.ndarray, first: np.ndarray, count: np.ndarray, level: float) -> np.ndarray:
    """Linear-interpolation quantile of each sorted run of ``values``."""
    position = (count - 1) * level
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, count - 1)
    low, high = values[first + below], values[first + above]
    interpolated: np.ndarray = low + (high - low) * (position - below)
    return interpolated


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
