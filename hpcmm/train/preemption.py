"""The end of training before its last step, which all ranks agree on.

The batch script makes the run directory's ``stop`` file when Slurm warns it of the time limit or of a preemption. Rank
0, which runs on the same node, sees it there at once; the other ranks learn of it by a maximum over all ranks of one
number after each step. No signal has to reach a rank, for it would reach its profiler, too, which dies of it.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.environment import RankEnvironment


class StopRequest:
    """Whether training is to stop. A ``SIGUSR1`` to any rank asks for it as well."""

    def __init__(self, run: RunDir, rank_env: RankEnvironment) -> None:
        """All ranks call this together. Installs the signal's handler, so call it on the main thread."""
        self._file = run.stop_request if rank_env.rank == 0 else None
        self._signalled = False
        self._alone = rank_env.world_size == 1
        # On the CPU, so that no rank has to wait for its GPU to read a number.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._wanted = torch.zeros(1, dtype=torch.int32)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop by now: the same answer on all ranks, who call this together."""
        wanted = self._signalled or (self._file is not None and self._file.exists())
        if self._alone:
            return wanted
        self._wanted[0] = wanted
        dist.all_reduce(self._wanted, op=dist.ReduceOp.MAX, group=self._group)
        return bool(self._wanted)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True
