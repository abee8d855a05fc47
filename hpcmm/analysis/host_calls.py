"""Where the time of a capture goes that has neither steps nor GPU records: the OS calls of each worker's main thread.

A thread that is in no OS call runs its own code, or would if it had a core. One that waits for other threads or the
network waits for the other workers, whose data its communication threads exchange. So if one worker is longer in a call
of its own than the others, or runs longer, and each of them waits for as much longer, they wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hpcmm.analysis.findings import CAUSES, LOW, MEDIUM, Finding, doubted
from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.osrt import is_waiting
from hpcmm.analysis.process_groups import Unseen
from hpcmm.analysis.trace import MainThread, RankTrace

PARTS = 10
"""The loop is cut into so many equal parts: what holds in most of them, beyond their noise, is no accident."""
MOST_PARTS, STANDARD_ERRORS = 7, 3.0
MOST_CODE_PARTS, CODE_STANDARD_ERRORS = 9, 6.0
"""The same of a worker that runs: cores are shared by chance, and for a while."""
LEAST_SHARE = 0.02
"""What takes less of the loop is not worth a row."""
LATE_SHARE, UNSURE_SHARE = 0.05, 0.1
"""A worker is named from this share of the loop on; more is asked of what is not in most parts, or runs."""

FEWEST_WAITS, FEWEST_CALLS = 10, 20
SHORTEST_WAIT_NS, SHORTEST_CALL_NS = 10_000, 1_000_000
LONG_PAUSE = 10.0
"""A pause of so many times the mean one ends the start-up, if it is among the first :data:`FIRST` of all."""
FIRST, LAST = 0.6, 0.2
LEAST_CODE_SHARE = 0.01
"""A main thread that runs less than this share of the loop has another one train."""
LIFE_SHARE = 0.25
"""A rhythm of calls is that of the loop if it lasts until this share of the process's life is left."""
EVEN = 0.5
"""A rhythm has this share of its mean rate in each part at least."""
LEAST_MATCH = 0.5
"""The others must wait for this share of what the late worker is longer."""
PUT_OFF_NS, PUT_OFF_SHARE = 1_000_000, 0.1
"""A worker that is put off its core so often is not named for what it runs: other processes are to blame."""
LEAST_COMMON, SHORTEST_LOOP_NS = 0.5, 500_000_000
"""The loops that workers show must share this much of the shortest of them, and so much time."""

Floats = npt.NDArray[np.float64]

CODE, WAIT, OTHER_CALLS = "host_code", "host_wait", "host_other"
_PIPES = re.compile(r"^(p?poll|p?select|sem_|connect|accept)")
_INSTANT = re.compile(r"pthread_(cond_(signal|broadcast)|(mutex|rwlock|spin)_unlock)")
"""Calls that wait for nothing: who is in one of them for long was put off its core."""
_KINDS = (
    ("host_sleep", re.compile(r"sleep")),
    ("host_read", re.compile(r"^(p?read(v|64|$)|fread|fgets|getline|fscanf)")),
    ("host_open", re.compile(r"^(f?open|freopen|creat|[fl]?stat|access|readlink|opendir)")),
    ("host_write", re.compile(r"^(p?write|fwrite|f?puts|fflush|f?sync|fdatasync|msync|f?truncate|rename)")),
    ("host_child", re.compile(r"^(wait|v?fork|posix_spawn|exec|system|popen|pclose)")),
)
_STARTS_CHILDREN = re.compile(r"^(v?fork|posix_spawn)")
_SENDS = re.compile(r"^send")


def kind_of(function: str, *, has_children: bool) -> str:
    """What a call of the main thread is: a kind of finding.

    A process that has started others may wait for these in calls of :data:`_PIPES`, as for those of its data loader.
    """
    if _INSTANT.match(function):
        return CODE
    if _PIPES.search(function):
        return "host_pipe" if has_children else WAIT
    if is_waiting(function) or _SENDS.search(function):
        return WAIT
    return next((kind for kind, names in _KINDS if names.search(function)), OTHER_CALLS)


@dataclass(frozen=True, slots=True)
class Spent:
    """How the main thread of one worker spends the loop, in seconds."""

    trace: RankTrace
    by_kind: dict[str, Floats]
    """By kind, shape (PARTS,); CODE is what no call covers."""
    by_function: dict[str, tuple[str, float, int]]
    """Kind, seconds and calls."""
    put_off: float
    """The share of :data:`_INSTANT` calls that last a millisecond: their thread had to leave its core."""

    def total(self, kind: str) -> float:
        return float(self.by_kind[kind].sum()) if kind in self.by_kind else 0.0

    def parts(self, kind: str) -> Floats:
        return self.by_kind.get(kind, np.zeros(PARTS))

    def function(self, kind: str) -> str:
        """That of a kind in which it is longest; empty if there is none."""
        known = {name: taken for name, (of, taken, _) in self.by_function.items() if of == kind}
        return max(known, key=lambda name: known[name]) if known else ""


@dataclass(frozen=True, slots=True)
class Loop:
    """The time that counts, on the clock of the run, and how it is known."""

    start_ns: int
    end_ns: int
    basis: str

    @property
    def length_s(self) -> float:
        return (self.end_ns - self.start_ns) / NS_PER_S

    def __str__(self) -> str:
        return (
            f"the loop, {self.length_s:.3g} s from {self.start_ns / NS_PER_S:.3g} s after the start on ({self.basis})"
        )


def find(traces: Sequence[RankTrace], unseen: Unseen) -> tuple[list[Finding], float]:
    """Findings of a capture without steps and GPUs, those that name a worker first, and the seconds of its loop.

    ``unseen``: ranks that the others may wait for, although no report shows them. Empty, and 0 s, if OS calls were not
    traced for each of ``traces``, no loop shows in them, or another thread than the main one trains.
    """
    threads = [(trace, trace.main_thread) for trace in traces if trace.main_thread is not None]
    loop = find_loop([thread for _, thread in threads]) if threads and len(threads) == len(traces) else None
    if loop is None:
        return [], 0.0
    spent = [_spent(trace, thread, loop) for trace, thread in threads]
    if any(own.total(CODE) < LEAST_CODE_SHARE * loop.length_s for own in spent):
        return [], 0.0
    # Who is waited for may be a rank that no report shows.
    doubt = unseen.in_words() if unseen.missing > 0 else ""
    late = _late_worker(spent, loop)
    everybodys = sorted(_of_all(spent, loop, late), key=lambda finding: -finding.lost_s)
    return doubted([*late, *everybodys], doubt), loop.length_s


def find_loop(threads: Sequence[MainThread]) -> Loop | None:
    """The time in which all workers exchange data, or in which calls come again and again; None if neither shows.

    Start-up is no part of it: see :func:`_without_start_up`.
    """
    if all(len(thread.exchanges_ns) for thread in threads):
        found = [own for thread in threads if (own := _exchanging(thread)) is not None]
        found = found and [*found, *((int(each.exchanges_ns[0]), int(each.exchanges_ns[-1])) for each in threads)]
        basis = "while other threads send and receive"
    else:
        rhythms = [_rhythm(thread) for thread in threads]
        found = [own for own in rhythms if own is not None] if None not in rhythms else []
        basis = "while a call comes again and again"
    if not found:
        return None
    start, end = max(own[0] for own in found), min(own[1] for own in found)
    shortest = min(own[1] - own[0] for own in found)
    return Loop(start, end, basis) if end - start >= max(SHORTEST_LOOP_NS, LEAST_COMMON * shortest) else None


def _exchanging(thread: MainThread) -> tuple[int, int] | None:
    """From the first to the last time that the main thread waits while other threads exchange data."""
    calls = thread.calls
    waits = [name for name in calls["function"].cat.categories if kind_of(name, has_children=False) == WAIT]
    end = calls["end_ns"].to_numpy(np.int64)
    chosen = calls["function"].isin(waits).to_numpy(bool) & (end >= thread.exchanges_ns[0])
    chosen &= (end <= thread.exchanges_ns[-1]) & (end - calls["start_ns"].to_numpy(np.int64) >= SHORTEST_WAIT_NS)
    return _without_start_up(np.sort(end[chosen])) if chosen.sum() >= FEWEST_WAITS else None


def _rhythm(thread: MainThread) -> tuple[int, int] | None:
    """From the first to the last of the calls that come evenly until the process ends, of the longest such function."""
    calls = thread.calls
    end, length = calls["end_ns"], calls["end_ns"] - calls["start_ns"]
    long = length >= SHORTEST_CALL_NS
    life = int(end.max()) - int(calls["start_ns"].min()) if len(calls) else 0
    best, longest = None, 0
    for function in calls.loc[long, "function"].unique():
        chosen = long & (calls["function"] == function)
        if chosen.sum() < FEWEST_CALLS or length[chosen].sum() <= longest:
            continue
        times = np.sort(end[chosen].to_numpy(np.int64))
        own = _without_start_up(times)
        counts, _ = np.histogram(times, bins=PARTS, range=own)
        if counts.min() >= EVEN * counts.mean() and int(end.max()) - own[1] <= LIFE_SHARE * life:
            best, longest = own, int(length[chosen].sum())
    return best


def _without_start_up(times: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The first and the last of ``times``, which are sorted, that belong to the loop.

    A tenth is left out, and what lies before the last long pause among the first :data:`FIRST`, such as the imports
    between the exchange of addresses and the first step. So is what lies after a long pause at the end.
    """
    pauses = np.diff(times)
    long = np.flatnonzero(pauses > LONG_PAUSE * pauses.mean())
    begins = long[long < FIRST * len(pauses)] + 1
    ends = long[long >= (1.0 - LAST) * len(pauses)]
    first = max(len(times) // PARTS, int(begins.max(initial=0)))
    return int(times[first]), int(times[ends.min()] if len(ends) else times[-1])


def _spent(trace: RankTrace, thread: MainThread, loop: Loop) -> Spent:
    calls = thread.calls[(thread.calls["end_ns"] > loop.start_ns) & (thread.calls["start_ns"] < loop.end_ns)]
    start, end = calls["start_ns"].to_numpy(np.int64), calls["end_ns"].to_numpy(np.int64)
    names, codes = list(calls["function"].cat.categories), calls["function"].cat.codes.to_numpy()
    # Those of the whole capture: the processes of a loader are started before the loop.
    has_children = any(_STARTS_CHILDREN.search(name) for name in thread.calls["function"].unique())
    kinds = [kind_of(name, has_children=has_children) for name in names]
    edges = np.linspace(loop.start_ns, loop.end_ns, PARTS + 1).astype(np.int64)
    in_calls = IntervalSet.union_of(start, end).covered_within(edges[:-1], edges[1:])
    by_kind = {CODE: (np.diff(edges) - in_calls) / NS_PER_S}
    seconds = np.zeros((PARTS, len(names)))
    for part, (low, high) in enumerate(pairwise(edges.tolist())):
        within = np.clip(np.minimum(end, high) - np.maximum(start, low), 0, None)
        seconds[part] = np.bincount(codes, within, minlength=len(names)) / NS_PER_S
    for place, kind in enumerate(kinds):
        by_kind[kind] = by_kind.get(kind, np.zeros(PARTS)) + seconds[:, place]
    counts = np.bincount(codes, minlength=len(names))
    instant = np.array([bool(_INSTANT.match(name)) for name in names], dtype=bool)[codes]
    put_off = float(((end - start)[instant] >= PUT_OFF_NS).mean()) if instant.sum() >= FEWEST_CALLS else 0.0
    of_functions = zip(kinds, seconds.sum(axis=0).tolist(), counts.tolist(), strict=True)
    return Spent(trace, by_kind, dict(zip(names, of_functions, strict=True)), put_off)


def _late_worker(spent: Sequence[Spent], loop: Loop) -> list[Finding]:
    """What the worker does longer for which all others wait; empty if there is no such worker."""
    if len(spent) < 2:
        return []
    late = min(spent, key=lambda own: own.total(WAIT))
    others = [own for own in spent if own is not late]
    waited = np.array([own.parts(WAIT) for own in others])
    left = float(waited.sum(axis=1).min()) - late.total(WAIT)
    kinds = {kind for own in spent for kind in own.by_kind} - {WAIT}
    more = {kind: late.parts(kind) - np.median([own.parts(kind) for own in others], axis=0) for kind in kinds}
    other = "the other" if len(others) == 1 else "each of the others"
    waits = (
        f"it waits {late.total(WAIT):.3g} s for other threads or the network, {other} {waited.sum(axis=1).min():.3g} s"
        f"{'' if len(others) == 1 else ' or more'}"
    )
    found = []
    for kind in sorted(kinds, key=lambda kind: (-float(more[kind].sum()), kind)):
        longer = float(more[kind].sum())
        lost = min(longer, left)
        most, errors = (MOST_CODE_PARTS, CODE_STANDARD_ERRORS) if kind == CODE else (MOST_PARTS, STANDARD_ERRORS)
        often = _parts_with(np.minimum(more[kind], waited.min(axis=0) - late.parts(WAIT)), lost, errors)
        is_steady = often >= most
        least = LATE_SHARE if is_steady and kind != CODE else UNSURE_SHARE
        # Of a worker that sleeps until others have come, hardly anybody waits as long.
        if lost < max(least * loop.length_s, LEAST_MATCH * longer) or (kind == CODE and not is_steady):
            continue
        left -= lost
        told = (
            f"{_of_function(late, kind, loop)}, {longer:.3g} s longer than {other}; {waits}; so in {often} of {PARTS} "
            f"parts of {loop}"
        )
        found.append(_of_late(late, kind, lost, told, MEDIUM if is_steady and kind != CODE else LOW))
    return found


def _of_late(late: Spent, kind: str, lost_s: float, told: str, sure: str) -> Finding:
    """What ``late`` is longer in; nobody is named for what a thread runs that often loses its core."""
    function, rank = late.function(kind), late.trace.rank
    rows = f"osrt: rank={rank} thread_role=step" + (f" function={function}" if function else "")
    if kind == CODE and late.put_off >= PUT_OFF_SHARE:
        lost_core = f"{late.trace.name} lost its core in {late.put_off:.0%} of the calls that wait for nothing"
        return Finding("host_cores", CAUSES["host_cores"], lost_s, None, "", "", f"{lost_core}; {told}", LOW, rows)
    return Finding(kind, CAUSES[kind], lost_s, rank, late.trace.node, "", told, sure, rows, function=function)


def _parts_with(in_parts: Floats, lost_s: float, errors: float) -> int:
    """How many parts of the loop have their share of ``lost_s``, half of the mean at least; 0 if the mean of all is
    within so many standard ``errors``."""
    error = float(in_parts.std(ddof=1)) / np.sqrt(PARTS)
    return int((in_parts > lost_s / PARTS / 2).sum()) if in_parts.mean() > errors * error else 0


def _of_function(own: Spent, kind: str, loop: Loop) -> str:
    if kind == CODE:
        return f"its main thread is in no OS call for {own.total(kind):.3g} s (it runs, or waits for a core)"
    function = own.function(kind)
    _, taken, calls = own.by_function[function]
    whole = own.total(kind)
    of = "" if taken > (1.0 - LEAST_SHARE) * whole else f" of {whole:.3g} s in such calls"
    often = f"{calls} calls, one in {loop.length_s / calls:.3g} s" if calls > 1 else "one call"
    return f"its main thread is in {function}() for {taken:.3g} s{of} ({often})"


def _of_all(spent: Sequence[Spent], loop: Loop, late: Sequence[Finding]) -> list[Finding]:
    """What all workers spend on a kind of calls: the lower median, so that one of them alone does not count.

    If one is ``late``, waiting is what it waits itself: the rest is waiting for it, and counts there.
    """
    found = []
    for kind in sorted({kind for own in spent for kind in own.by_kind} - {CODE}):
        middle = 0 if kind == WAIT and late else (len(spent) - 1) // 2
        usual = sorted(spent, key=lambda own: own.total(kind))[middle]
        lost = usual.total(kind)
        if lost < LEAST_SHARE * loop.length_s:
            continue
        told = _of_function(usual, kind, loop)
        if len(spent) > 1:
            mean_s = np.mean([own.total(kind) for own in spent])
            told = f"{usual.trace.name}: {told}; all {len(spent)} workers {mean_s:.3g} s in such calls as a mean"
        function = usual.function(kind)
        is_usual = kind not in {WAIT, OTHER_CALLS} and usual.by_function[function][2] >= FEWEST_CALLS
        sure = MEDIUM if is_usual else LOW
        rows = f"osrt: rank={usual.trace.rank} thread_role=step function={function}"
        found.append(
            Finding(kind, CAUSES[kind], lost, None, "", "", f"{told}; in {loop}", sure, rows, function=function)
        )
    return found


_SAMPLE = "py-spy record --pid PID, or nsys profile --sample=cpu"
ADVICE = {
    "host_sleep": "look for time.sleep, or a library that polls, in the loop and in its Dataset: wait for the event",
    "host_read": "if it reads samples, load them in processes, or more of them: DataLoader(num_workers=N)",
    "host_open": "open fewer files; those of samples in processes beside the training: DataLoader(num_workers=N)",
    "host_write": "print, log or save less often, or from a thread of its own",
    "host_child": "start no child process within the loop",
    "host_pipe": "if it waits for its data loader, more of it: DataLoader(num_workers=N, prefetch_factor=M)",
    "host_other": f"see osrt.csv for these calls; where they come from tells {_SAMPLE}",
    "host_code": f"what it runs, steps and phases tell (hpcmm.annotate.steps), or {_SAMPLE}",
    "host_cores": "give each worker cores of its own, and see what else runs there (top); then capture again",
    "host_wait": "who waits for whom, ranges around collectives tell: hpcmm.annotate.collectives.install()",
}
"""By the kind of a finding."""
