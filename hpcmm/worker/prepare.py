"""What has to be there before any rank starts: ``python -m hpcmm.worker.prepare RUN_DIR``, once a job, on one node.

Compiled ops are built and the task's data is made, unless an earlier run left them. A line says which.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from hpcmm.config import config_file
from hpcmm.config.schema import RunConfig, TaskName
from hpcmm.errors import HpcmmError
from hpcmm.node import startup
from hpcmm.node.cache import cache_dir, extensions_dir, one_at_a_time
from hpcmm.runs.attempts import begin_attempt
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.compiled_ops import build_ops, ops_are_built
from hpcmm.workloads.anomaly.data_root import ensure_data
from hpcmm.workloads.anomaly.llm_folder import ensure_llm


def prepare(config: RunConfig) -> None:
    """Build and make what is missing, one process at a time. Cheap when nothing is."""
    if importlib.util.find_spec("deepspeed") is None:
        return  # a script of the user's, in an environment without it
    with one_at_a_time(cache_dir(config.cluster) / "prepare.lock"):
        ops = extensions_dir(config.cluster)
        if not ops_are_built(ops):
            build_ops(ops)
        if config.task.name is TaskName.anomaly:
            ensure_data(config)
            ensure_llm(config)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m hpcmm.worker.prepare RUN_DIR", file=sys.stderr)
        return 2
    try:
        run = RunDir(Path(arguments[0]))
        prepare(config_file.load(run.config))
        began = os.environ.get(startup.SCRIPT_BEGAN)
        begin_attempt(run, began_s=float(began) if began else None)
    except HpcmmError as error:
        print(f"hpcmm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
