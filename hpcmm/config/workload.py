"""What a run trains, found by the name of its task: the half of a workload that needs no torch."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING

from hpcmm.config.schema import RunConfig

if TYPE_CHECKING:
    from hpcmm.evaluate.evaluation import Evaluation
    from hpcmm.serve.served import ServedModel

_TARGETS = {"anomaly": "hpcmm.workloads.anomaly.workload.AnomalyWorkload"}
"""The class of each workload by the name of its task."""


class Workload:
    """A workload to the commands of a login node. A method that is left out says that the workload cannot do this."""

    def evaluation(self) -> Evaluation | None:
        """How ``hpcmm.evaluate`` scores its runs; None if it cannot."""
        return None

    def served(self) -> ServedModel | None:
        """The page that ``hpcmm.serve`` shows of its runs; None if there is none."""
        return None


def workload_of(config: RunConfig) -> Workload | None:
    """The workload of a run; None for a script or a function of the user's."""
    return _workload(str(config.task.name))


def shipped_workloads() -> list[Workload]:
    """Every workload that a task of ``conf/task`` names."""
    return [workload for name in sorted(_TARGETS) if (workload := _workload(name)) is not None]


@functools.cache
def _workload(task: str) -> Workload | None:
    if task not in _TARGETS:
        return None
    module, _, name = _TARGETS[task].rpartition(".")
    workload = getattr(import_module(module), name)()
    assert isinstance(workload, Workload)
    return workload
