"""Stopping in time: what the job's script and the ranks tell each other by two files in the run directory.

The script makes ``stop`` when Slurm warns it of the time limit or of a preemption. The ranks then save a checkpoint and
make ``stopped``, and the script puts the job back into the queue. Rank 0, which runs on the same node as the script,
sees ``stop`` within a second; the other ranks learn of it by a maximum over all ranks of one number. No signal has to
reach a rank, for it would reach its profiler, too, which dies of it.

>>> for step in range(first, steps):
...     train(step)
...     if annotate.should_stop():
...         save_checkpoint(step)
...         annotate.stopped()
...         break

It needs the standard library alone; ``torch.distributed`` is used if the script has imported it.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RUN_DIR = "HPCMM_RUN_DIR"
"""The environment variable that names the run directory to each rank."""

RESTART_COUNT = "HPCMM_RESTART_COUNT"
"""The environment variable that tells each rank how often the job's script had started before; 0 at first."""

STOP, STOPPED = "stop", "stopped"
"""Names of the two files."""

_LOOK_S = 1.0
"""Seconds between two looks at a file: on a shared file system each look is a question to its server."""


class StopRequest:
    """Whether the ranks of a run are to stop."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._asked = False
        self._looked_s = -_LOOK_S
        self._agreed = False
        self._agreement = _Agreement()

    def ask(self) -> None:
        """Ask for a stop from within this process. May be called in a signal's handler."""
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop by now.

        The same answer on all ranks, who call this together, if ``torch.distributed`` is initialised. Else each rank
        answers for itself.
        """
        distributed = _distributed()
        if distributed is None:
            return self._is_asked(looks=True)
        if not self._agreed:
            self._agreed = self._agreement.any(distributed, self._is_asked(looks=distributed.get_rank() == 0))
        return self._agreed

    def agreed_with(self, numbers: Sequence[float]) -> tuple[bool, list[float]]:
        """As :meth:`agreed`, and the sum of each number over all ranks, by the same collective."""
        distributed = _distributed()
        if distributed is None:
            return self._is_asked(looks=True), list(numbers)
        asked = float(self._is_asked(looks=distributed.get_rank() == 0))
        askers, *sums = self._agreement.sums(distributed, [asked, *numbers])
        self._agreed = self._agreed or askers > 0
        return self._agreed, sums

    def note_stopped(self) -> None:
        """Say that a checkpoint is saved, and that the job is to go on from it. Raises OSError if that cannot be."""
        (self._run_dir / STOPPED).touch()

    def _is_asked(self, *, looks: bool) -> bool:
        if looks and not self._asked and time.monotonic() - self._looked_s >= _LOOK_S:
            self._looked_s = time.monotonic()
            self._asked = (self._run_dir / STOP).exists()
        return self._asked


class _Agreement:
    """A maximum or sum over all ranks of numbers on the CPU, so that no rank has to wait for its GPU to read them."""

    def __init__(self) -> None:
        self._world: Callable[[], Any] = lambda: None
        self._group: Any = None
        self._device = "cpu"

    def any(self, distributed: Any, wanted: bool) -> bool:
        """Whether ``wanted`` is true on any rank. All ranks call this together."""
        torch = sys.modules["torch"]
        self._join(distributed)
        flag = torch.tensor([int(wanted)], dtype=torch.int32, device=self._device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def sums(self, distributed: Any, numbers: list[float]) -> list[float]:
        """The sum of each number. All ranks call this together."""
        torch = sys.modules["torch"]
        self._join(distributed)
        values = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        distributed.all_reduce(values, group=self._group)
        return [float(each) for each in values.tolist()]

    def _join(self, distributed: Any) -> None:
        world = distributed.group.WORLD
        if self._world() is not world:  # the first call, or the script has made its groups anew
            self._world = weakref.ref(world)
            self._group, self._device = _group_on_cpu(distributed)


def _group_on_cpu(distributed: Any) -> tuple[Any, str]:
    """A process group (None: the default one) and the device of its tensors."""
    if distributed.get_backend() == "gloo":
        return None, "cpu"
    if distributed.is_gloo_available():
        return distributed.new_group(backend="gloo"), "cpu"
    return None, "cuda"


def _distributed() -> Any:
    """``torch.distributed`` if this script has initialised it for several ranks."""
    module: Any = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized() or module.get_world_size() == 1:
        return None
    return module


_requests: dict[str, StopRequest] = {}


def should_stop() -> bool:
    """Whether the script should save a checkpoint now and stop. False outside of hpcmm.

    Call it after each step. If ``torch.distributed`` is initialised, all ranks call it together and get one answer;
    else each rank sees it for itself, some seconds before or after the others.
    """
    request = _request()
    return request is not None and request.agreed()


def stopped() -> None:
    """Say that the script stops with a whole checkpoint: its job goes back into the queue, and on from there.

    Without this word the job ends as the script ends. Rank 0 says it for all ranks, so call it when all of them have
    saved their parts. Does nothing outside of hpcmm. Raises OSError if the run directory cannot be written.
    """
    request = _request()
    if request is not None and os.environ.get("RANK", "0") == "0":
        request.note_stopped()


def _request() -> StopRequest | None:
    run_dir = os.environ.get(RUN_DIR)
    if not run_dir:
        return None
    if run_dir not in _requests:
        _requests[run_dir] = StopRequest(Path(run_dir))
    return _requests[run_dir]
