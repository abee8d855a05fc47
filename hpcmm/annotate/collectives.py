"""An NVTX range around every collective of the process, whoever calls it.

PyTorch sends each collective through its dispatcher as an operator of the ``c10d`` library: those of
``torch.distributed``'s Python functions, those that C++ code such as DistributedDataParallel's reducer starts, and what
the functional collectives of compiled graphs, DTensor and tensor parallelism end in. :func:`install` puts a recording
kernel in front of the real one there, so DeepSpeed's internal collectives are seen without any knowledge of DeepSpeed.

The kernel stands at the dispatch key ``BackendSelect``. It is part of every call, whatever the device, and lies below
autograd, which ``torch.inference_mode`` and the functional collectives leave out.

A range starts at the enqueue. On CPU backends it ends when the work is complete, on whichever thread completes it; on
CUDA it ends with the enqueue, since the kernel itself is in the profiler's GPU trace.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hpcmm.annotate import groups, schema
from hpcmm.annotate.ranges import profiler_attached, receive_begins, tell_rank

OP_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
}
"""The dispatcher's operators of the ``c10d`` library, with the field's name of each."""

POINT_TO_POINT = frozenset({"send", "recv"})

PEERS = frozenset({"dst", "src", "root_rank"})
"""Arguments of the operators that name the other rank of a send or receive, or the root."""


_AT_EXIT_S = 60.0


class CollectiveRecorder:
    """Starts and ends the ranges, and numbers the collectives of each process group."""

    def __init__(self) -> None:
        import nvtx  # noqa: PLC0415 -- a Python that no profiler watches may not have it

        self._nvtx = nvtx
        self._sequences: dict[str, int] = {}
        """Number of the latest collective, by group name."""
        self._open: dict[dist.Work, Any] = {}
        """Ranges whose work runs on. Holding the work keeps its identity, which a later ``wait`` is matched by."""
        self._storages: dict[dist.Work, set[int]] = {}
        """The addresses that each of these works reads and writes."""
        self._watched: SimpleQueue[tuple[dist.Work, torch.futures.Future[Any]] | None] = SimpleQueue()
        self._watcher: Thread | None = None
        self.recorded: Counter[tuple[str, str]] = Counter()
        """Ranges started, by (group name, op)."""
        self.bytes: Counter[Exchange] = Counter()
        """Their payload, of groups of several ranks."""

    def record(
        self,
        op: str,
        device: str,
        arguments: tuple[Any, ...],
        blocking: bool,
        call: Callable[[], Any],
        peer: int | None = None,
    ) -> Any:
        """Run ``call`` with a range around it, and return what it returned.

        ``peer`` is the operation's other rank or root, as a rank of its group.
        """
        if op == "recv":
            receive_begins()
        group = _group(arguments)
        sequence, whom = self._sequence(op, group), None if peer is None else _rank_in_job(group, peer)
        size = _bytes(op, arguments)
        name = schema.CollectiveName(op, group.group_name, sequence, size, whom, *_uneven(op, arguments))
        range_id = self._nvtx.start_range(name.format(), domain=schema.COMM_DOMAIN)
        self.recorded[group.group_name, op] += 1
        self.bytes[_exchange(op, group, whom)] += size if group.size() > 1 else 0
        try:
            result = call()
            work = _work(result) if device == "cpu" else None
            if work is not None and blocking:
                work.wait()
        except BaseException:
            self._nvtx.end_range(range_id)
            raise
        if work is None or blocking:
            self._nvtx.end_range(range_id)
        else:
            self._end_later(work, range_id, arguments)
        return result

    def _sequence(self, op: str, group: dist.ProcessGroup) -> int:
        """The number of this collective in its group, the same on every rank of the group.

        Counted here, from the group's own number at first sight, because Gloo's counts sends and receives too, which
        only two ranks take part in. Those carry the number of the collective before them.
        """
        name = group.group_name
        if name not in self._sequences:
            groups.seen(group)
            self._sequences[name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        if op not in POINT_TO_POINT:
            self._sequences[name] += 1
        return self._sequences[name]

    def _end_later(self, work: dist.Work, range_id: Any, arguments: tuple[Any, ...]) -> None:
        """End the range when the work is complete: at its ``wait``, or when its future is done, whichever is first.

        The future is waited for by a thread of our own. A callback on it would run before Gloo calls the work
        complete, and would hang where C++ code waits for the work while it holds Python's lock, as
        DistributedDataParallel's constructor does.
        """
        self._open[work] = range_id
        self._storages[work] = {tensor.untyped_storage().data_ptr() for tensor in _tensors(arguments)}
        try:
            future = work.get_future()
        except RuntimeError:  # Gloo's send, receive and reduce-scatter have none, and all are waited for
            return
        if self._watcher is None:
            self._watcher = Thread(target=self._watch, name="hpcmm-collectives", daemon=True)
            self._watcher.start()
            atexit.register(self._finish, self._watcher)
        self._watched.put((work, future))

    def _finish(self, watcher: Thread) -> None:
        """Wait for what nobody has waited for: a thread that is in C++ code when the interpreter ends aborts it."""
        self._watched.put(None)
        watcher.join(_AT_EXIT_S)

    def _watch(self) -> None:
        while (watched := self._watched.get()) is not None:
            work, future = watched
            # The error of a failed collective belongs to whoever waits for its work; only its end matters here.
            with contextlib.suppress(Exception):
                future.wait()
            self.waited(work)

    def waited(self, work: dist.Work) -> None:
        """End the range of a work that is complete, unless that has been done."""
        self._storages.pop(work, None)
        range_id = self._open.pop(work, None)
        if range_id is not None:
            self._nvtx.end_range(range_id)

    def tensor_waited(self, tensor: torch.Tensor) -> None:
        """End the ranges of works whose result ``tensor`` is: C++ code has waited for them."""
        address = tensor.untyped_storage().data_ptr()
        for work in [work for work, storages in list(self._storages.items()) if address in storages]:
            self.waited(work)


class Exchange(NamedTuple):
    """What is counted together."""

    group: str
    """As ``torch.distributed`` names it."""
    op: str
    peer: int | None
    """Of a send or receive the other rank of the job; of a collective None."""


def _exchange(op: str, group: dist.ProcessGroup, peer: int | None) -> Exchange:
    return Exchange(group.group_name, op, peer if op in POINT_TO_POINT else None)


class ByteCounter:
    """Counts what is exchanged, and no more."""

    def __init__(self) -> None:
        self.bytes: Counter[Exchange] = Counter()
        """Payload, of groups of several ranks."""

    def record(
        self,
        op: str,
        _device: str,
        arguments: tuple[Any, ...],
        _blocking: bool,
        call: Callable[[], Any],
        peer: int | None = None,
    ) -> Any:
        """Count, and return what ``call`` returns."""
        group = _group(arguments)
        if group.size() > 1:
            whom = None if peer is None else _rank_in_job(group, peer)
            self.bytes[_exchange(op, group, whom)] += _bytes(op, arguments)
        return call()


@contextlib.contextmanager
def counted_bytes() -> Iterator[Counter[Exchange]]:
    """Count the payload of this process' collectives meanwhile, with or without a profiler.

    A payload is the largest of a collective's input and output, as in the table ``comm_bytes``. The counter is filled
    when this ends.
    """
    found: Counter[Exchange] = Counter()
    if _installed is not None:
        before = _installed[0].bytes.copy()
        try:
            yield found
        finally:
            found.update(_installed[0].bytes - before)
        return
    counter = ByteCounter()
    library = _intercept(counter)
    try:
        yield found
    finally:
        if library is not None:
            library._destroy()  # type: ignore[no-untyped-call]
        found.update(counter.bytes)


def _group(arguments: Iterable[Any]) -> dist.ProcessGroup:
    """The process group among an operator's arguments."""
    return next(dist.ProcessGroup.unbox(each) for each in arguments if isinstance(each, torch.ScriptObject))


def _rank_in_job(group: dist.ProcessGroup, rank: int) -> int | None:
    """The rank in the job of a group's member; None for a group that ``torch.distributed`` does not know."""
    try:
        return dist.get_global_rank(group, rank)
    except (RuntimeError, ValueError):
        return None


def _bytes(op: str, arguments: Iterable[Any]) -> int:
    """The largest of the operation's inputs and outputs; a barrier's tensor is only there to choose the device."""
    if op == "barrier":
        return 0
    return max((sum(t.numel() * t.element_size() for t in _tensors([each])) for each in arguments), default=0)


def _uneven(op: str, arguments: Sequence[Any]) -> tuple[int, int] | tuple[()]:
    """Bytes of an all-to-all's input and output, if they differ; the output is its first argument."""
    if op != "all_to_all":
        return ()
    received, sent = (_bytes("", [each]) for each in arguments[:2])
    return () if sent == received else (sent, received)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments, which may be lists of tensors and lists of lists."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _work(result: Any) -> dist.Work | None:
    """The handle in an operator's result: alone, last of a tuple, or absent from a blocking operator's."""
    last = result[-1] if isinstance(result, (list, tuple)) and result else result
    return dist.Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


_installed: tuple[CollectiveRecorder, list[torch.library.Library]] | None = None


def install(*, force: bool = False) -> CollectiveRecorder | None:
    """Annotate every collective of this process from now on; once is enough for all groups, later ones included.

    Returns None, and changes nothing, when no profiler is attached (unless ``force``). All ranks should call it at
    the same place of their program, since the numbers of sends and receives are only known from here on.
    """
    global _installed  # noqa: PLW0603 -- the dispatcher that it changes is global, too
    if _installed is None:
        if not (profiler_attached() or force):
            return None
        recorder = CollectiveRecorder()
        library = _intercept(recorder)
        _installed = (recorder, [] if library is None else [library, _notice_tensors(recorder)])
        _notice_waits(recorder)
        if dist.is_initialized():
            tell_rank()
    return _installed[0]


_KEY = "BackendSelect"


def _intercept(recorder: CollectiveRecorder | ByteCounter) -> torch.library.Library | None:
    """Register the recording kernels; they last as long as the returned library. None if PyTorch does not let us."""
    try:
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    except AttributeError as error:  # not documented by PyTorch
        print(f"hpcmm: this PyTorch lets nobody see its collectives ({error}): none is recorded.", file=sys.stderr)
        return None
    library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
    for operator, op in OP_NAMES.items():
        if hasattr(torch.ops.c10d, operator):  # each version has some more
            kernel = _recording_kernel(recorder, operator, op, below)
            library.impl(operator, kernel, _KEY, with_keyset=True)  # type: ignore[no-untyped-call]
    return library


def _notice_tensors(recorder: CollectiveRecorder) -> torch.library.Library:
    """Let ``wait_tensor`` end the ranges of works whose result is waited for; likewise."""
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    functional = torch.library.Library("_c10d_functional", "IMPL")  # type: ignore[no-untyped-call]
    if hasattr(torch.ops._c10d_functional, "wait_tensor"):
        wait = _wait_kernel(recorder, torch.ops._c10d_functional.wait_tensor.default, below)
        functional.impl("wait_tensor", wait, _KEY, with_keyset=True)  # type: ignore[no-untyped-call]
    return functional


def _recording_kernel(
    recorder: CollectiveRecorder | ByteCounter, operator: str, op: str, below: Any
) -> Callable[..., Any]:
    """``below``: the dispatch keys that come after the kernel's own."""
    overload = getattr(torch.ops.c10d, operator).default
    argument_names = [argument.name for argument in overload._schema.arguments]
    async_at = argument_names.index("async_op") if "async_op" in argument_names else None
    peer_at = next((place for place, name in enumerate(argument_names) if name in PEERS), None)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        device = next((tensor.device.type for tensor in _tensors(arguments)), "cpu")
        if device == "meta":  # a compiler looks at shapes, and nothing is sent
            return overload.redispatch(keyset & below, *arguments)
        # The dispatcher leaves out trailing arguments that have their default, here True.
        blocking = async_at is not None and async_at < len(arguments) and not arguments[async_at]
        # Redispatching lets go of Python's lock, for which a thread of Gloo's may wait while it holds Gloo's own.
        peer = arguments[peer_at] if peer_at is not None and peer_at < len(arguments) else None
        return recorder.record(
            op, device, arguments, blocking, lambda: overload.redispatch(keyset & below, *arguments), peer
        )

    return kernel


def _wait_kernel(recorder: CollectiveRecorder, overload: Any, below: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, tensor: torch.Tensor) -> Any:
        try:
            return overload.redispatch(keyset & below, tensor)
        finally:
            if tensor.device.type == "cpu":
                recorder.tensor_waited(tensor)

    return kernel


def _notice_waits(recorder: CollectiveRecorder) -> None:
    """Let ``Work.wait`` end the ranges of works that have no future."""
    wait = dist.Work.wait

    def wait_and_end(work: dist.Work, *arguments: Any, **keywords: Any) -> Any:
        try:
            return wait(work, *arguments, **keywords)
        finally:
            recorder.waited(work)

    dist.Work.wait = wait_and_end  # type: ignore[method-assign, assignment]
