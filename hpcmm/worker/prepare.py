"""What has to be there before any rank starts: ``python -m hpcmm.worker prepare RUN_DIR``, once a job, on one node.

Compiled ops are built and the task's data is made, unless an earlier run left them. A line says which.
"""

from __future__ import annotations

import fcntl
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcmm.config.schema import RunConfig, TaskName
from hpcmm.node.cache import cache_dir, extensions_dir
from hpcmm.worker.compiled_ops import build_ops, ops_are_built
from hpcmm.workloads.anomaly.data_root import ensure_data
from hpcmm.workloads.anomaly.llm_folder import ensure_llm


def prepare(config: RunConfig) -> None:
    """Build and make what is missing, one process at a time. Cheap when nothing is."""
    if importlib.util.find_spec("deepspeed") is None:
        return  # a script of the user's, in an environment without it
    folder = cache_dir(config.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder / "prepare.lock"):
        ops = extensions_dir(config.cluster)
        if not ops_are_built(ops):
            build_ops(ops)
        if config.task.name is TaskName.anomaly:
            ensure_data(config)
            ensure_llm(config)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
