"""What each process group is for, and who is in it: told by the ranks, or else seen from what they exchange.

A rank tells it by a mark (:class:`hpcmm.annotate.schema.GroupMark`). The name that one member tells holds for all of
them, for ``torch.distributed`` gives a group the same name on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from hpcmm.analysis.trace import RankTrace
from hpcmm.annotate.schema import AXES, GroupMark, axis_of
from hpcmm.ranges import write_ranges

TOLD, SEEN = "told", "seen"
"""How the purpose of a group is known (column ``axis_basis``)."""


def with_record(trace: RankTrace, record: Mapping[int, Mapping[str, GroupMark]]) -> RankTrace:
    """``trace`` with what the run directory tells of its rank's groups, if its report tells of none."""
    return trace if trace.groups else replace(trace, groups=record.get(trace.rank, {}))


MOST_NAMED = 5
NO_REPORT, NO_COMMUNICATION = "no report", "no communication in their reports"


class Unseen(NamedTuple):
    """Ranks whose communication no report shows: ``missing`` of ``size``; nobody knows of how many if ``size`` is 0."""

    missing: int
    size: int
    of: str = "ranks"
    lack: str = NO_REPORT
    """What they have not."""

    def __str__(self) -> str:
        return f"{self.missing} of {self.size} {self.of}" if self.size else "the others of its communicator"

    def in_words(self, *, with_steps: bool = False) -> str:
        """``2 of 4 ranks have no report``."""
        return f"{self} have {self.lack}" + (" with steps" if with_steps and self.lack == NO_REPORT else "")


def unseen_ranks(rows: pd.DataFrame, traces: Sequence[RankTrace], expected_ranks: int) -> Unseen:
    """Which of the ranks that collectives may wait for are not among ``traces``; ``missing`` is 0 if none.

    They are counted among all ``expected_ranks`` and in each group of matched ``rows`` whose size NCCL or a mark tells.
    A rank whose communication was not recorded while its peers' was is as one without a report there.
    """
    sizes = {name: member.size for trace in traces for name, member in trace.communicators.items()}
    sizes |= {group: len(mark.ranks) for group, mark in told(traces).items() if mark.ranks}
    unseen = [Unseen(expected_ranks - len(traces), expected_ranks)]
    if rows.empty:
        return unseen[0]
    if silent := silent_ranks(traces):
        names = ", ".join(traces[at].name for at in silent[:MOST_NAMED]) + (", ..." if len(silent) > MOST_NAMED else "")
        lack = f"{NO_COMMUNICATION} ({names})"
        lack = lack if unseen[0].missing <= 0 else f"{NO_REPORT}, or {lack}"
        unseen.append(Unseen(unseen[0].missing + len(silent), expected_ranks, lack=lack))
    seen = rows.loc[rows["ranks"] > 0, ["group", "ranks", "basis"]].drop_duplicates("group")
    for group, ranks, basis in seen.itertuples(index=False):
        if size := sizes.get(group, 0):
            unseen.append(Unseen(size - ranks, size, "ranks of a communicator"))
        elif ranks == expected_ranks == 1 and basis.startswith("kernel order"):  # NCCL runs no kernel for one rank
            unseen.append(Unseen(1, 0))
    return max(unseen)


def silent_ranks(traces: Sequence[RankTrace]) -> list[int]:
    """Positions of the ranks whose communication was not recorded, though that of others was.

    A process of unknown rank that uses a GPU and exchanges nothing, such as an evaluation beside the training, is none.
    """
    silent = [at for at, trace in enumerate(traces) if trace.collectives.empty]
    if len(silent) == len(traces):
        return []
    return [at for at in silent if traces[at].rank >= 0 or traces[at].gpu is None]


def told(traces: Sequence[RankTrace]) -> dict[str, GroupMark]:
    """The marks of all groups, by the names that ``torch.distributed`` gives them."""
    return {group: mark for trace in traces for group, mark in trace.groups.items()}


def with_groups(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> pd.DataFrame:
    """Rows of collectives with ``axis`` (what the group is for; empty if no rank tells), ``axis_basis``, and
    ``group_ranks``, such as ``0-3``: as they are told, or else those that take part; empty if the rank of one of these
    is unknown."""
    marks = told(traces)
    names = {group: axis_of(mark.name) or mark.name for group, mark in marks.items()}
    by_group = rows.groupby("group")["rank"].unique()
    members = {str(group): write_ranges(ranks) for group, ranks in by_group.items() if min(ranks) >= 0}
    members |= {group: write_ranges(mark.ranks) for group, mark in marks.items() if mark.ranks}
    axis = rows["group"].map(names).fillna("") if names else ""
    found = rows.assign(axis=axis, group_ranks=[members.get(group, "") for group in rows["group"]])
    return found.assign(axis_basis=np.where(found["axis"] != "", TOLD, ""))


def labels(rows: pd.DataFrame) -> pd.Series[str]:
    """For each row ``tensor group of ranks 0-1``; if nothing is known of what a group is for, ``group NAME``."""
    groups = rows[["group", "axis", "group_ranks"]].drop_duplicates("group")
    told = {
        group: f"{axis} group of ranks {ranks}" if axis and ranks else f"{axis} group" if axis else f"group {group}"
        for group, axis, ranks in groups.itertuples(index=False)
    }
    return rows["group"].map(told).astype(str)


def mesh(traces: Sequence[RankTrace]) -> dict[str, int]:
    """The size of each axis that has groups of several ranks, outermost first; of unequal groups the largest."""
    sizes: dict[str, int] = {}
    for mark in told(traces).values():
        axis = axis_of(mark.name)
        if axis in AXES and len(mark.ranks) > 1:
            sizes[axis] = max(sizes.get(axis, 1), len(mark.ranks))
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def chain_of_pairs(rows: pd.DataFrame) -> tuple[int, float]:
    """How many ranks each chain connects that pairs of ranks make by exchanging ``rows``, and how often a pair does so
    in a step; zeros unless all of it is chains of one length, of three ranks or more.

    Pairs alone can be of anything, and those of a ring have no end.
    """
    pairs = [tuple(sorted(each)) for each in rows.groupby("group")["trace"].unique()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return 0, 0.0
    neighbours: dict[int, set[int]] = {}
    for one, other in pairs:
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    lengths, ends = set(), {trace for trace, beside in neighbours.items() if len(beside) == 1}
    reached = 0
    for end in ends:
        chain, following = [end], neighbours[end]
        while following:
            chain.append(min(following))
            following = neighbours[chain[-1]] - set(chain)
        lengths.add(len(chain))
        reached += len(chain)
    is_chains = len(lengths) == 1 and reached == 2 * len(neighbours) and max(map(len, neighbours.values())) == 2
    steps = max(rows["step"].nunique(), 1)
    often = rows["instance"].nunique() / len(set(pairs)) / steps
    return (lengths.pop(), often) if is_chains else (0, 0.0)


def stages(traces: Sequence[RankTrace]) -> tuple[tuple[int, ...], ...]:
    """Traces of each pipeline stage, as the pipeline groups tell them: the n-th rank of each is of stage n.

    Empty if they do not tell. A library may have groups of two neighbours, too, so that the longest counts.
    """
    longest: dict[int, tuple[int, ...]] = {}
    for mark in told(traces).values():
        if axis_of(mark.name) == "pipeline":
            for rank in mark.ranks:
                longest[rank] = max(longest.get(rank, ()), tuple(sorted(mark.ranks)), key=len)
    if not traces or any(trace.rank not in longest for trace in traces):
        return ()
    count = {len(longest[trace.rank]) for trace in traces}
    if len(count) != 1 or min(count) < 2:
        return ()
    found: list[list[int]] = [[] for _ in range(count.pop())]
    for index, trace in enumerate(traces):
        found[longest[trace.rank].index(trace.rank)].append(index)
    return tuple(map(tuple, found)) if all(found) else ()
