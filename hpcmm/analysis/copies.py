"""Copies of one device by direction and memory: how much they move, how fast, and how much of it nothing hides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.intervals import NS_PER_S, IntervalSet
from hpcmm.analysis.trace import RankTrace, rows_of_ranks
from hpcmm.reports.report import COPY

TO_DEVICE, TO_HOST, ON_DEVICE, PEER, ON_HOST, OTHER_DIRECTION = (
    "host to device",
    "device to host",
    "device to device",
    "peer to peer",
    "host to host",
    "unknown",
)
PAGEABLE, PINNED, MANAGED, DEVICE = "pageable", "pinned", "managed", "device"

_DIRECTIONS = {
    1: TO_DEVICE, 2: TO_HOST, 3: TO_DEVICE, 4: TO_HOST, 5: ON_DEVICE, 6: ON_DEVICE, 7: ON_DEVICE, 8: ON_DEVICE,
    9: ON_HOST, 10: PEER, 11: TO_DEVICE, 12: TO_HOST, 13: ON_DEVICE,
}  # fmt: skip
"""By copyKind; arrays are on the device, and the last three are pages of unified memory that move by themselves."""
_UNIFIED = {11, 12, 13}
_MEMORY = {0: PAGEABLE, 1: PINNED, 2: DEVICE, 3: DEVICE, 4: MANAGED, 5: DEVICE, 6: MANAGED}
"""By srcKind and dstKind."""
_HOST_MEMORY = {PAGEABLE, PINNED, MANAGED}

LARGE_BYTES = 1 << 20
"""A copy from this size on is a large one."""

COLUMNS = ["device", "direction", "memory", "copies", "bytes", "large_copies", "copy_ns", "exposed_ns"]


def told(copy_kind: int, source: int, target: int) -> tuple[str, str]:
    """Direction of a copy and the kind of its host memory, from nsys' numbers; ``unknown`` and empty if not told."""
    here, there = _MEMORY.get(source, ""), _MEMORY.get(target, "")
    direction = _DIRECTIONS.get(copy_kind)
    if direction is None:
        from_host, to_host = here in {PAGEABLE, PINNED}, there in {PAGEABLE, PINNED}
        by_memory = {(True, True): ON_HOST, (True, False): TO_DEVICE, (False, True): TO_HOST}
        direction = by_memory.get((from_host, to_host), ON_DEVICE) if here and there else OTHER_DIRECTION
    if copy_kind in _UNIFIED:
        return direction, MANAGED
    if direction in {ON_DEVICE, PEER}:
        return direction, DEVICE
    memory = there if direction == TO_HOST else here
    return direction, memory if memory in _HOST_MEMORY else ""


def of_device(activities: pd.DataFrame, compute: IntervalSet, comm: IntervalSet) -> pd.DataFrame:
    """Copies among the ``activities`` of one device by direction and memory (COLUMNS), longest first.

    Copies of one kind that run at a time count once in copy_ns; exposed is what neither ``compute`` nor ``comm`` hides.
    """
    own = activities[activities["kind"] == COPY]
    if own.empty:
        return pd.DataFrame(columns=COLUMNS)
    codes, kinds = pd.MultiIndex.from_frame(own[["copy_kind", "source", "target"]]).factorize()
    labels = [told(*(int(number) for number in kind)) for kind in kinds]
    found = {label: _row(own[np.isin(codes, _of(labels, label))], compute, comm) for label in dict.fromkeys(labels)}
    rows = [(*label, *row) for label, row in found.items()]
    table = pd.DataFrame(rows, columns=COLUMNS[1:]).sort_values("copy_ns", ascending=False, ignore_index=True)
    return table.assign(device=int(own["device"].iloc[0]))[COLUMNS]


def _of(labels: Sequence[tuple[str, str]], label: tuple[str, str]) -> npt.NDArray[np.intp]:
    return np.array([index for index, each in enumerate(labels) if each == label], dtype=np.intp)


def _row(own: pd.DataFrame, compute: IntervalSet, comm: IntervalSet) -> tuple[int, int, int, int, int]:
    moved = own["bytes"].clip(lower=0)
    when = IntervalSet.union_of(own["start_ns"], own["end_ns"])
    exposed = when.subtract(compute).subtract(comm)
    return len(own), int(moved.sum()), int((moved >= LARGE_BYTES).sum()), when.total_ns, exposed.total_ns


OFFLOAD = "offload"
OFFLOAD_COPIES = 3
"""Large copies to or from pinned memory make an offload from so many on, if they take half of the exposed copying."""


def what_moves(table: pd.DataFrame) -> str:
    """What most of the exposed copying of one device's rows of ``copies`` is: OFFLOAD, or direction and memory."""
    if table.empty or table["exposed_s"].sum() <= 0:
        return ""
    pinned = table[(table["memory"] == PINNED) & table["direction"].isin([TO_DEVICE, TO_HOST])]
    large = pinned[(pinned["large_copies"] >= OFFLOAD_COPIES) & (2 * pinned["large_copies"] >= pinned["copies"])]
    if float(large["exposed_s"].sum()) >= float(table["exposed_s"].sum()) / 2:
        return OFFLOAD
    most = table.iloc[int(table["exposed_s"].to_numpy(np.float64).argmax())]
    return f"{most['direction']}, {most['memory']}"


def in_words(table: pd.DataFrame) -> str:
    """Direction, memory, bytes and rate of the copies of one device that nothing hides, most of it first."""
    parts = []
    for row in table[table["exposed_s"] > 0].nlargest(2, "exposed_s").to_dict("records"):
        memory = f" ({row['memory']} memory)" if row["memory"] in _HOST_MEMORY else ""
        rate = f" at {row['bytes_per_s'] / 1e9:.3g} GB/s" if row["bytes_per_s"] > 0 else ""
        size = f", {row['bytes'] / 1e9:.3g} GB{rate}" if row["bytes"] > 0 else ""
        where = "between GPUs (peer to peer)" if row["direction"] == PEER else row["direction"]
        told = f"{row['copies']} copies {where}{memory}{size}, {row['exposed_s']:.3g} s of them exposed"
        parts.append(told)
    told = f"; there {'; '.join(parts)}" if parts else ""
    if what_moves(table) == OFFLOAD:
        told += (
            "; large copies of pinned memory, as an offload of optimizer states or parameters to the host makes them"
        )
    return told


TABLE_COLUMNS = [
    "rank", "node", "pid", "device", "direction", "memory", "copies", "bytes", "large_copies", "copy_s", "exposed_s",
    "bytes_per_s",
]  # fmt: skip


def copies_table(traces: Sequence[RankTrace]) -> pd.DataFrame:
    """The ``copies`` table (TABLE_COLUMNS), longest first within a device."""
    table = rows_of_ranks((trace, trace.copies) for trace in traces)
    if table is None:
        return pd.DataFrame(columns=TABLE_COLUMNS)
    table = table.assign(copy_s=table["copy_ns"] / NS_PER_S, exposed_s=table["exposed_ns"] / NS_PER_S)
    is_known = (table["copy_s"] > 0) & (table["bytes"] > 0)
    return table.assign(bytes_per_s=(table["bytes"] / table["copy_s"]).where(is_known))[TABLE_COLUMNS]


ADVICE = {
    "offload": "keep more on the GPU (no offload, or of a part), or move it on a stream beside the computation; a "
    "larger batch for each transfer",
    "host to device, pageable": "pinned memory and copies beside the computation: DataLoader(pin_memory=True), "
    "non_blocking=True",
    "host to device, pinned": "copies beside the computation: non_blocking=True, the next batch on a stream of its own",
    "device to host, pageable": "fewer copies to the host (.cpu(), .item(), logging), into pinned memory with "
    "non_blocking=True",
    "device to host, pinned": "fewer copies to the host (.cpu(), .item(), logging), on a stream of their own",
    "device to device, device": "fewer copies on the GPU: views instead of .clone(), .contiguous() and torch.cat",
    "peer to peer, device": "copies between GPUs on a stream of their own; collectives of NCCL for many of them",
    **dict.fromkeys(
        ("host to device, managed", "device to host, managed", "device to device, managed"),
        "prefetch unified memory (cudaMemPrefetchAsync): its pages move when touched; or allocate on the device",
    ),
}
"""What to try against copies without computation, by what :func:`what_moves` tells."""
