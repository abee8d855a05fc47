"""NCCL kernels as collectives: the true times of annotated ones, and instances if nothing is annotated.

On CUDA a range of hpcmm.comm covers the enqueue only. Its kernel is the one that the range launched, by correlation id;
that gives start and end, while the range's name gives group and sequence.

Without such ranges an instance is known by its place: the k-th kernel of one operation on a communicator. The
communicator is what NCCL's own ranges carry as payload if nsys exported it, else the stream, counted in the order of
the stream ids of a device. That holds while all ranks issue the same collectives and the captures begin together, so
:func:`confirm_order` checks it against the times and withdraws it if they do not bear it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.trace import OUTSIDE
from hpcmm.reports.report import KERNEL, UNKNOWN, CudaEvents

Integers = npt.NDArray[np.int64]

BY_NAME, BY_KERNEL, BY_ORDER = "range", "range, GPU time", "kernel order"
"""How a row of ``collectives`` came about (column ``basis``): the range's own times, the times of the kernel that the
range launched, or no range of hpcmm at all."""
UNCONFIRMED = "kernel order, not confirmed"

SEND_RECV = "send_recv"
"""Sends and receives in one kernel: point-to-point, or an all-to-all made of them."""
GENERIC = "nccl"
"""Several operations in one kernel."""
_OPS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgatherv": "all_gather",
    "reducescatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "sendrecv": SEND_RECV,
    "alltoall": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
}
UNTOLD = (SEND_RECV, GENERIC)
"""What a kernel does not tell: who needs whom in it."""
_OP_NAMES = "AllReduce|AllGatherV?|ReduceScatter|Broadcast|Reduce|SendRecv|AllToAll|Gather|Scatter"
_KERNEL = re.compile(
    rf"""nccl(?:\w*Dev)?Kernel(?:Debug)?_ | ncclKernel(?:{_OP_NAMES}|Send|Recv)
    | nccl(?:{_OP_NAMES})(?:Ring|Tree|CollNet|NVLS)\w*Kernel_""",
    re.VERBOSE,
)
"""NCCL's names since 2.4, and those of forks."""
_OP = re.compile(f"({_OP_NAMES})", re.IGNORECASE)
_KERNEL_OF = {
    "all_to_all": {SEND_RECV, "all_to_all"},
    "send": {SEND_RECV},
    "recv": {SEND_RECV},
    "gather": {SEND_RECV, "gather"},
    "scatter": {SEND_RECV, "scatter"},
    "barrier": {"all_reduce"},
}
"""Kernels that run an operation, if they are not named like it; a generic kernel runs any."""
_TORCH_OP = re.compile(r"nccl:_?(all_reduce|all_gather|reduce_scatter|broadcast|reduce|all_to_all|gather|scatter)")
"""PyTorch's own range around the launch."""
CONFIRMED_SHARE = 0.9
"""Instances of an operation whose members must overlap."""
CONFIRMED_CHANGE = 0.05
"""How much the distance between two members' ends may change, as a share of the time between two instances."""
MIN_INSTANCES = 8


_MANGLED, _LENGTH = re.compile(r"_?_ZL?(?:N[rVK]*)?(?:St)?(?=\d)"), re.compile(r"\d{1,4}")
_BRACKETS = re.compile(r"([<>(])")
_UNNAMED = re.compile(r"(?:\(anonymous namespace\)|<unnamed>|\{anonymous\}|\b_GLOBAL__N_\w*)::")


def plain_name(name: str) -> str:
    """``vllm::cross_device_reduce_1stage`` of the short, the whole, or the mangled name of a kernel."""
    if mangled := _MANGLED.match(name):
        at, parts = mangled.end(), []
        while length := _LENGTH.match(name, at):
            at = length.end() + int(length[0])
            parts.append(name[length.end() : at])
        return _UNNAMED.sub("", "::".join(parts))
    depth, kept = 0, []
    for piece in _BRACKETS.split(_UNNAMED.sub("", name)):
        if piece == "(" and not depth:
            break
        if not depth and piece not in "<>":
            kept.append(piece)
        depth = max(0, depth + {"<": 1, ">": -1}.get(piece, 0))
    return "".join(kept).strip().rpartition(" ")[2]


def kernel_op(name: str) -> str | None:
    """The operation that an NCCL kernel's name tells; None for other kernels."""
    name = plain_name(name)
    if not _KERNEL.match(name):
        return None
    told = _OP.search(name)
    return _OPS[told[1].lower()] if told else GENERIC


def _of_name(activities: pd.DataFrame, told: Callable[[str], object]) -> npt.NDArray[np.object_]:
    """``told`` of every activity's name, asked once a name."""
    answers = np.array([*map(told, activities["name"].cat.categories.astype(str)), None], dtype=object)
    found: npt.NDArray[np.object_] = answers[activities["name"].cat.codes.to_numpy()]
    return found


def is_nccl(activities: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which of ``activities`` are kernels of NCCL."""
    named = np.array([op is not None for op in _of_name(activities, kernel_op)], dtype=np.bool_)
    return (activities["kind"] == KERNEL).to_numpy(np.bool_) & named


_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_EXCHANGE = re.compile(r"\b(?:all ?reduce|all ?gather|reduce ?scatter|all ?to ?all)\b")
_PHRASES = re.compile(r"\b(?:in place|zero copy|all pairs|(?:block|warp) pipeline|p 2 p)\b")
_HOW = re.compile(
    r"kernel|impl|fused|fusion|norm|rms|rmsnorm|moe|moereduce|moefinalize|helix|custom|simple|naive|prototype|style"
    r"|inkling|one|two|shot|stage|oneshot|twoshot|lamport|sync|push|pull|inplace|direct|hier|hierarchical|hybrid|cube"
    r"|mesh|full|fullmesh|multimem|mc|nvls|mnnvl|symm|mem|lsa|gin|pure|ring|tree|ll|packet|rs|ag|low|latency|lat"
    r"|precision|quantized|intra|inter|intranode|internode|nodes?|d|v|bf|fp|f|half|float|bfloat|\d+"
)
"""How libraries say in the names of such kernels by which way they exchange data, and what they do on the way."""
_NAMED = re.compile(
    r"""cross_device_(?:reduce|all_gather)\w* | multimem_(?:one_shot_)?reduce_kernel
    | (?:alltoall|barrier|broadcast|fcollect|rdxn|reduce|reducescatter|sync)(?:_all)?_on_stream_kernel\w*
    | nvshmemi_(?!init_array|team_)\w+ | exchangeSplitAndOffset\w* | allToAllMetadataDevice
    | k?userbuffers_\w+ | mscclKernel\w* | rccl\w*Kernel\w* | uc[cpt]_\w+
    | moeA2A(?:Dispatch|Combine)Kernel | a2a_(?:dispatch|combine)_(?:send|recv)_kernel
    | (?:cached_)?notify_(?:dispatch|combine) | cached_notify | clean_low_latency_buffer
    | hybrid_(?:dispatch|combine)_impl | Ep(?:Dispatch|Combine)(?:Intra|Inter)Node\w*""",
    re.VERBOSE,
)
"""Names that do not say the operation: of vLLM, PyTorch's symmetric memory, NVSHMEM, TensorRT-LLM, user buffers of
Transformer Engine, MSCCL, RCCL, UCC and UCX, pplx, DeepEP and MORI."""
_OWN_NAMESPACE = re.compile(
    r"(?:^|::)(?:mscclpp|c10d::symmetric_memory|quickreduce|deep_ep|dpsk::ep|uccl|hybrid_ep|nccl_ep|mori::moe|mooncake"
    r"|pplx\w*)::"
)
_LOCAL = re.compile(r"get_dispatch_layout|query_|update_|clean_mask|.{0,80}(?:_epilogue|SupportProbe)")
"""Namespaces in which kernels communicate, but for those whose names begin like _LOCAL."""
_OF_EXPERTS = frozenset({"dispatch", "combine", "dispatch_impl", "combine_impl"})
"""DeepEP's kernels without their namespace. Others are called so, too."""
_BESIDE_THEM = re.compile(
    r"(?:cached_)?notify_(?:dispatch|combine)|cached_notify|get_dispatch_layout|clean_low_latency_buffer|nvshmemi?_\w+"
)
"""Names that tell that these are DeepEP's."""


def communicates(name: str) -> bool:
    """Whether a kernel's name says that it exchanges data with other GPUs.

    All of the name has to say so: ``all_reduce_loss`` and ``MoeAllToAllPermute`` are of kernels that compute.
    """
    if kernel_op(name) is not None:
        return True
    name = plain_name(name)
    function = name.rpartition("::")[2]
    of_library = _OWN_NAMESPACE.search(name) and not _LOCAL.match(function)
    return bool(_says_how(function) or _NAMED.fullmatch(function) or of_library)


def waits_for_all(name: str) -> bool:
    """Whether a kernel that communicates leaves only after all of its group have come, by its name.

    The exchange of experts' tokens is not one: its length follows from their number, too.
    """
    words = " ".join(_WORDS.findall(plain_name(name).rpartition("::")[2])).lower()
    return bool(re.search(r"\ball ?reduce\b|\bcross device reduce\b|\bbarrier\b", words))


def _says_how(function: str) -> bool:
    """Whether a name is made of an operation of several GPUs and words of _HOW, as ``oneShotAllReduceKernel`` is."""
    words = " ".join(_WORDS.findall(function)).lower()
    rest, operations = _EXCHANGE.subn("", words)
    if not operations or not (function.isascii() and function.isidentifier()):
        return False
    return all(_HOW.fullmatch(word) for word in _PHRASES.sub("", rest).split())


def is_communication(activities: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which of ``activities`` are kernels of NCCL or of another library that exchange data with other GPUs."""
    kernel = (activities["kind"] == KERNEL).to_numpy(np.bool_)
    named = np.array(_of_name(activities, communicates) == np.True_, dtype=np.bool_)
    names = activities["name"].cat
    present = pd.unique(names.codes.to_numpy()[kernel])
    used = [str(name) for name in names.categories[present[present >= 0]]]
    theirs = _of_experts(used)
    if not theirs:
        return kernel & named
    of_experts = _of_name(activities, lambda name: name in theirs)
    return kernel & (named | np.array(of_experts == np.True_, dtype=np.bool_))


def _of_experts(used: Sequence[str]) -> set[str]:
    """Which of a GPU's kernels without a namespace are DeepEP's, by what else runs there.

    None, if the report has namespaces: DeepEP has one. Else ``combine`` comes after ``dispatch``, and a program with
    communication of NCCL alone may call kernels of its own like one of the two.
    """
    plain = {name: plain_name(name) for name in used}
    found = {name for name, function in plain.items() if function in _OF_EXPERTS}
    if not found or any("::" in function for function in plain.values()):
        return set()
    if any(_BESIDE_THEM.fullmatch(function) for function in plain.values()):
        return found
    dispatched = {plain[name].removesuffix("_impl") for name in found}
    others = [name for name in used if communicates(name)]
    both = dispatched == {"dispatch", "combine"} and bool(others)
    is_theirs = both or ("dispatch" in dispatched and any(kernel_op(name) is None for name in others))
    return found if is_theirs else set()


def nccl_kernels(activities: pd.DataFrame) -> pd.DataFrame:
    """The NCCL kernels among ``activities``, with their operation as ``op``."""
    kernels = activities[is_nccl(activities)]
    return kernels.assign(op=_of_name(kernels, kernel_op)).reset_index(drop=True)


def timed_by_kernels(collectives: pd.DataFrame, kernels: pd.DataFrame) -> pd.DataFrame:
    """Collectives of one process with the times of the NCCL kernels that they launched, ``basis`` and ``device``.

    ``collectives``: start_ns, end_ns, tid and op of ranges in domain hpcmm.comm, sorted by start; ``kernels``: NCCL
    kernels of the same process. A range whose operation is not the kernel's keeps its own times, as all do on other
    backends.
    """
    collectives = collectives.assign(basis=BY_NAME, device=pd.array([None] * len(collectives), dtype="Int64"))
    index = _enclosing(collectives, kernels)
    op = np.append(collectives["op"].to_numpy(object), "")[index]
    fits = [
        at >= 0 and ran in {name, GENERIC, *_KERNEL_OF.get(name, set())}
        for at, name, ran in zip(index, op, kernels["op"], strict=True)
    ]
    mine = kernels[["start_ns", "end_ns", "device"]][fits]
    if mine.empty:
        return collectives
    spans = mine.groupby(index[fits]).agg({"start_ns": "min", "end_ns": "max", "device": "first"})
    rows = collectives.index[spans.index.to_numpy(np.int64)]
    collectives.loc[rows, ["start_ns", "end_ns", "device"]] = spans.to_numpy(np.int64)
    collectives.loc[rows, "basis"] = BY_KERNEL
    # The kernel is there, so the enqueue has happened, even if the capture lost its end.
    collectives.loc[rows, "closed"] = True
    return collectives


def _enclosing(ranges: pd.DataFrame, kernels: pd.DataFrame) -> Integers:
    """For each kernel the position in ``ranges`` of the one that began last before its launch, on the launching thread,
    and has not ended by then; else -1."""
    found = np.full(len(kernels), -1, dtype=np.int64)
    launch, tid = kernels["launch_ns"].to_numpy(np.int64), kernels["launch_tid"].to_numpy(np.int64)
    for thread in np.unique(tid[launch != UNKNOWN]):
        own = np.flatnonzero(ranges["tid"].to_numpy(np.int64) == thread)
        own = own[np.argsort(ranges["start_ns"].to_numpy(np.int64)[own], kind="stable")]
        at = np.flatnonzero((tid == thread) & (launch != UNKNOWN))
        if not len(own):
            continue
        position = np.searchsorted(ranges["start_ns"].to_numpy(np.int64)[own], launch[at], side="right") - 1
        holds = (position >= 0) & (ranges["end_ns"].to_numpy(np.int64)[own[position]] >= launch[at])
        found[at] = np.where(holds, own[position], -1)
    return found


def collectives_of_kernels(kernels: pd.DataFrame, events: CudaEvents) -> pd.DataFrame:
    """Collectives of one device that no range of hpcmm names, from its NCCL ``kernels`` in the order of their start.

    Columns as hpcmm.analysis.trace.COLLECTIVE_COLUMNS, ``basis`` and ``device``; 0 bytes where unknown.
    """
    calls = events.nccl_calls[events.nccl_calls["pid"].isin(kernels["pid"])]
    call = _latest_call(calls, kernels)
    communicator = np.append(calls["communicator"].to_numpy(object), "")[call]
    streams = {stream: f"stream {order}" for order, stream in enumerate(np.unique(kernels["stream"].to_numpy()))}
    by_stream = kernels["stream"].map(streams).to_numpy(object)
    within = _enclosing(calls, kernels)
    frame = pd.DataFrame(
        {
            "op": _torch_op(kernels, events),
            "group": np.where(communicator != "", communicator, by_stream),
            "occurrence": 0,
            "bytes": np.append(calls["bytes"].to_numpy(np.int64), 0)[within],
            "start_ns": kernels["start_ns"].to_numpy(np.int64),
            "end_ns": kernels["end_ns"].to_numpy(np.int64),
            "closed": True,
            "step": OUTSIDE,
            "phase": "",
            "basis": BY_ORDER,
            "device": kernels["device"].astype("Int64"),
        }
    )
    # Counted by what the kernel tells: PyTorch's ranges may begin later than the capture on one of the ranks.
    place = frame.groupby(["group", kernels["op"].to_numpy(object)]).cumcount()
    return frame.assign(sequence=place.astype(np.int64))


def _latest_call(calls: pd.DataFrame, kernels: pd.DataFrame) -> Integers:
    """The NCCL call with a communicator that came last before each kernel's launch, on its thread: grouped calls launch
    when their group ends."""
    forever = calls.assign(end_ns=np.iinfo(np.int64).max)
    return _enclosing(forever, kernels)


def _torch_op(kernels: pd.DataFrame, events: CudaEvents) -> npt.NDArray[np.object_]:
    """Operations of kernels: as PyTorch calls them where it annotated the launch, else as the kernel is named."""
    ranges = events.ranges[events.ranges["pid"].isin(kernels["pid"])]
    told = _of_name(ranges, lambda name: (match := _TORCH_OP.match(name)) and match[1])
    torch = np.array([op is not None for op in told], dtype=np.bool_)
    index = _enclosing(ranges[torch], kernels)
    better = np.concatenate((told[torch], np.array([None], dtype=object)))[index]
    op = kernels["op"].to_numpy(object)
    return np.where(np.isin(op, [SEND_RECV, GENERIC]) & (better != None), better, op)  # noqa: E711


def with_basis(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ``basis`` and ``device`` also if no GPU was traced."""
    basis = rows["basis"].fillna(BY_NAME) if "basis" in rows else BY_NAME
    device = rows["device"].astype("Int64") if "device" in rows else pd.array([None] * len(rows), dtype="Int64")
    return rows.assign(basis=basis, device=device)


def without_size(rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which collectives' bytes are not known, and stand as 0: neither hpcmm's ranges nor NCCL's payload tell them."""
    if "basis" not in rows:
        return np.zeros(len(rows), dtype=np.bool_)
    known = (rows["bytes"] > 0) | ~rows["basis"].isin([BY_ORDER, UNCONFIRMED])
    return ~known.to_numpy(np.bool_)


def in_phase_of_launch(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` of matched collectives, of which those whose launch is not known are of the phase in which another rank
    launched the same one."""
    known = rows["launched"].fillna(True).astype(bool) if "launched" in rows else pd.Series(True, index=rows.index)
    rows = rows.drop(columns="launched", errors="ignore")
    if known.all():
        return rows
    told = rows["phase"].where(known).groupby(rows["instance"]).transform("first")
    return rows.assign(phase=rows["phase"].where(known | told.isna(), told))


def by_order(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are instances by their place alone."""
    return rows["basis"] == BY_ORDER if "basis" in rows else pd.Series(False, index=rows.index)


def confirm_order(rows: pd.DataFrame, clock_error_ns: float) -> pd.DataFrame:
    """Withdraw matches by order that the times do not bear out; ``rows`` as those of hpcmm.analysis.collectives.match.

    Asked for each operation of each group. If the clocks are good to half the time between instances, the members of
    an instance have to overlap, as they do wherever each needs all others. Where they are not, every member must have
    every instance, and the ends must differ between the members by what changes little from instance to instance. Where
    neither holds, none of the instances counts as complete.
    """
    ordered = by_order(rows)
    if not ordered.any():
        return rows
    basis = rows["basis"].to_numpy(object, copy=True)
    complete = rows["complete"].to_numpy(bool, copy=True)
    for _, own in rows[ordered & (rows["ranks"] > 1)].groupby(["group", "op"]):
        if not (_overlap(own, clock_error_ns) or _in_step(own)):
            at = rows.index.get_indexer(own.index)
            basis[at], complete[at] = UNCONFIRMED, False
    flags = {name: rows[name].to_numpy(bool) & complete for name in ("synchronising", "needs_all")}
    return rows.assign(basis=basis, complete=complete, **flags)


def _overlap(own: pd.DataFrame, clock_error_ns: float) -> bool:
    """Whether a clock this good shows that the members of nearly all instances overlap in time."""
    times = own[own["complete"].astype(bool)].groupby("instance").agg({"start_ns": ["min", "max"], "end_ns": "min"})
    if times.empty:
        return False
    last, first_end = times["start_ns", "max"].to_numpy(np.int64), times["end_ns", "min"].to_numpy(np.int64)
    spacing = np.diff(np.sort(times["start_ns", "min"].to_numpy(np.int64)))
    if len(spacing) and 2 * clock_error_ns >= float(np.median(spacing)):
        return False
    return float((last <= first_end + clock_error_ns).mean()) >= CONFIRMED_SHARE


def _in_step(own: pd.DataFrame) -> bool:
    """Whether all members have all instances, and end them at a distance that stays nearly the same."""
    ends = own.pivot_table(index="instance", columns="trace", values="end_ns", aggfunc="first").sort_values(
        own["trace"].iloc[0]
    )
    if len(ends) < MIN_INSTANCES or not own["complete"].all() or ends.isna().to_numpy().any():
        return False
    values = ends.to_numpy(np.float64)
    change = np.abs(np.diff(values - values[:, :1], axis=0))
    return float(np.median(change, axis=0).max()) <= CONFIRMED_CHANGE * float(np.median(np.diff(values[:, 0])))
