"""Names of the NVTX domains and ranges: what the ranks write and the analysis reads.

In domain ``hpcmm`` a ``step`` range (its integer payload is the step's number) encloses phase ranges, all pushed and
popped on the thread that trains; the payload of a phase is the size of the batch that it computes on. In domain
``hpcmm.comm`` each collective is one range that starts at its enqueue and ends when its work is complete, named
``all_reduce group=0 seq=12 bytes=4096``, or ``send group=0 seq=12 bytes=4096 peer=3``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

DOMAIN = "hpcmm"
COMM_DOMAIN = "hpcmm.comm"
STEP = "step"
AUTOMATIC_STEP = "step (automatic)"
"""A step that hpcmm found by itself, numbered as ``step`` is; it counts only if its process has no ``step`` at all."""
CAPTURE_DOMAIN = "hpcmm.capture"
CAPTURE_RANGE = "window"
"""``nsys profile --capture-range=nvtx --nvtx-capture=window@hpcmm.capture`` waits for this one."""
CAPTURE_STEPS = "HPCMM_CAPTURE_STEPS"
"""The variable that tells a rank, and each Python that it starts, for which steps it opens: ``100:110``."""
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")

_RANK = re.compile(r"process rank=([0-9]{1,7})")
_COLLECTIVE = re.compile(
    r"(?P<op>\w+) group=(?P<group>\S+) seq=(?P<seq>[0-9]{1,19}) bytes=(?P<bytes>[0-9]{1,19})"
    r"(?: peer=(?P<peer>[0-9]{1,7}))?"
)
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class CollectiveName:
    """What the name of a collective's range carries.

    ``sequence`` is the process group's own number of the operation, so (group, op, sequence) names the same
    instance on every rank. ``bytes`` is the payload as nccl-tests count it: the largest of the rank's input and output.
    ``peer`` is the other rank of a send or receive, or the root of a broadcast, reduce, gather or scatter, as a rank of
    the job; None for all other operations, and in reports of earlier versions.
    """

    op: str
    group: str
    sequence: int
    bytes: int
    peer: int | None = None

    def format(self) -> str:
        told = f"{self.op} group={quote(self.group, safe='')} seq={self.sequence} bytes={self.bytes}"
        return told if self.peer is None else f"{told} peer={self.peer}"

    @classmethod
    def parse(cls, text: str) -> CollectiveName | None:
        """The name's parts, or None if ``text`` is not a collective's name."""
        match = _COLLECTIVE.fullmatch(text)
        if match is None:
            return None
        sequence, size = int(match["seq"]), int(match["bytes"])
        if max(sequence, size) > _INT64_MAX:
            return None
        peer = None if match["peer"] is None else int(match["peer"])
        return cls(match["op"], unquote(match["group"]), sequence, size, peer)


def format_rank(rank: int) -> str:
    """Name of the mark in domain ``hpcmm`` by which a process tells its rank: one capture may hold several."""
    return f"process rank={rank}"


def parse_rank(text: str) -> int | None:
    """The rank in such a mark's name, or None if ``text`` is another name."""
    match = _RANK.fullmatch(text)
    return int(match[1]) if match else None
