"""Names of the NVTX domains and ranges: what the ranks write and the analysis reads.

In domain ``hpcmm`` a ``step`` range (its integer payload is the step's number) encloses phase ranges, all pushed and
popped on the thread that trains; the payload of a phase is the size of the batch that it computes on. In domain
``hpcmm.comm`` each collective is one range that starts at its enqueue and ends when its work is complete, named
``all_reduce group=0 seq=12 bytes=4096``, or ``send group=0 seq=12 bytes=4096 peer=3``. Marks in domain ``hpcmm`` tell
which rank a process is, what its process groups are for, and how many tokens its experts got.
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
    r"(?: peer=(?P<peer>[0-9]{1,7}))?(?: in=(?P<sent>[0-9]{1,19}) out=(?P<received>[0-9]{1,19}))?"
)
_GROUP = re.compile(r"process group=(?P<group>\S+) name=(?P<name>\S+) ranks=(?P<ranks>[0-9,:-]*)")
_SPAN = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7})(?::([0-9]{1,7}))?)?")
_TOKENS = re.compile(r"experts layer=(?P<layer>\S*) tokens=(?P<tokens>[0-9]{1,19})")
_MOST_CHARACTERS = 255
"""Of a name: so much of it is read."""
_MOST_RANKS = 1 << 17
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
    sent: int | None = None
    """Bytes of an all-to-all's input, if its output has another size: the ranks do not exchange equal parts."""
    received: int | None = None
    """Bytes of its output."""

    def format(self) -> str:
        told = f"{self.op} group={quote(self.group, safe='')} seq={self.sequence} bytes={self.bytes}"
        told += "" if self.peer is None else f" peer={self.peer}"
        return told if self.sent is None else f"{told} in={self.sent} out={self.received}"

    @classmethod
    def parse(cls, text: str) -> CollectiveName | None:
        """The name's parts, or None if ``text`` is not a collective's name."""
        match = _COLLECTIVE.fullmatch(text)
        if match is None:
            return None
        sequence, size = int(match["seq"]), int(match["bytes"])
        if max(sequence, size) > _INT64_MAX:
            return None
        peer, sent, received = (
            None if match[key] is None else min(int(match[key]), _INT64_MAX) for key in ("peer", "sent", "received")
        )
        return cls(match["op"], unquote(match["group"]), sequence, size, peer, sent, received)


def format_rank(rank: int) -> str:
    """Name of the mark in domain ``hpcmm`` by which a process tells its rank: one capture may hold several."""
    return f"process rank={rank}"


def parse_rank(text: str) -> int | None:
    """The rank in such a mark's name, or None if ``text`` is another name."""
    match = _RANK.fullmatch(text)
    return int(match[1]) if match else None


AXES = ("pipeline", "data", "sequence", "tensor", "expert")
"""What a process group may be for. A group along several axes is named after all of them: ``data x sequence``."""
REPLICAS = "replicas of experts"
"""The group of the ranks that hold the same experts, over which their gradients are averaged."""
_SHORT = {
    **dict.fromkeys(("pp", "pipe"), "pipeline"),
    **dict.fromkeys(("dp", "ddp", "fsdp", "hsdp", "replicate", "shard"), "data"),
    **dict.fromkeys(("cp", "sp", "context", "ulysses"), "sequence"),
    **dict.fromkeys(("tp", "model"), "tensor"),
    **dict.fromkeys(("ep", "moe"), "expert"),
    **dict.fromkeys(("efsdp", "edp"), REPLICAS),
}
_FILLERS = frozenset({"mesh", "group", "parallel", "dim", "and", "x", "with", "without", "the", "of"})


def axis_of(name: str) -> str:
    """The axis or axes that another library's name of a group stands for, such as ``data x sequence`` for
    ``mesh_dp_shard_cp``; empty if it stands for none.
    """
    words = {word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in _FILLERS}
    if len(words) > 1:
        words.discard("model")  # Megatron's "tensor model parallel group"
    found = {_SHORT.get(word, word if word in AXES else "") for word in words}
    if "" in found:
        return ""
    if REPLICAS in found or found == {"data", "expert"}:
        return REPLICAS
    return " x ".join(axis for axis in AXES if axis in found)


@dataclass(frozen=True)
class GroupMark:
    """What a process group is for, told by a mark in domain ``hpcmm``.

    ``group`` is the name that ``torch.distributed`` gives it, as in :class:`CollectiveName`; ``name`` says what it is
    for. ``ranks`` are its members, as ranks of the job; empty if they are too many for a name.
    """

    group: str
    name: str
    ranks: tuple[int, ...]

    def format(self) -> str:
        told = f"process group={quote(self.group, safe='')} name={quote(self.name, safe='')} ranks="
        ranks = _spans(self.ranks)
        return told + (ranks if len(told) + len(ranks) <= _MOST_CHARACTERS else "")

    @classmethod
    def parse(cls, text: str) -> GroupMark | None:
        """The mark's parts, or None if ``text`` is another name."""
        match = _GROUP.fullmatch(text)
        if match is None:
            return None
        spans = [_SPAN.fullmatch(part) for part in match["ranks"].split(",")] if match["ranks"] else []
        if any(span is None for span in spans):
            return None
        ranges = [range(int(s[1]), int(s[2] or s[1]) + 1, max(1, int(s[3] or 1))) for s in spans if s is not None]
        if sum(map(len, ranges)) > _MOST_RANKS:
            return None
        return cls(unquote(match["group"]), unquote(match["name"]), tuple(rank for each in ranges for rank in each))


def _spans(ranks: tuple[int, ...]) -> str:
    """``0-3,8``; ranks at one distance, as along an axis of a mesh, are ``0-12:4``."""
    left, spans = sorted(ranks), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = next((n for n, rank in enumerate(left) if rank != left[0] + n * step), len(left))
        count = count if count > 2 or step == 1 else 1
        span = str(left[0]) if count == 1 else f"{left[0]}-{left[count - 1]}"
        spans.append(span + (f":{step}" if step > 1 and count > 1 else ""))
        left = left[count:]
    return ",".join(spans)


def format_expert_tokens(tokens: int, layer: str = "") -> str:
    """Name of the mark by which a rank tells how many tokens its experts of a layer got."""
    return f"experts layer={quote(layer, safe='')} tokens={tokens}"


def parse_expert_tokens(text: str) -> int | None:
    """The number of tokens in such a mark's name, or None if ``text`` is another name."""
    match = _TOKENS.fullmatch(text)
    return int(match["tokens"]) if match else None
