"""What a dry run adds to the script, as comments of the shell: what each rank will run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from hpcmm.config.rank_selection import profiled_ranks
from hpcmm.config.schema import RunConfig, TaskName
from hpcmm.launch.script import python_of, rank_command

if TYPE_CHECKING:
    from hpcmm.launch.plan import Plan


def rank_comment(planned: Plan) -> str:
    """The command of each rank, what it ends in, and which ranks a profiler wraps."""
    config = planned.config
    lines = [
        f"srun starts {config.world_size} ranks, each as:",
        f"  {shlex.join(rank_command(config, planned.run))}",
        f"which runs, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, {_task(planned)}",
        f"under a profiler: {_profiled(config)}",
    ]
    return "".join(f"# {printable}\n" for line in lines for printable in line.splitlines())


def _task(planned: Plan) -> str:
    task = planned.config.task
    if task.name is TaskName.script:
        return shlex.join([python_of(planned.config), str(planned.code.script), *task.args])
    if task.name is TaskName.function:
        arguments = ", ".join(f"{key}={value!r}" for key, value in task.kwargs.items())
        return f"{task.target} as a function of ({arguments})"
    return f"the task {task.name}"


def _profiled(config: RunConfig) -> str:
    if config.profile.tool is None:
        return "none"
    ranks = profiled_ranks(config.profile.ranks, config.world_size, config.cluster.ranks_per_node)
    listed = ", ".join(map(str, sorted(ranks)[:16])) + (" ..." if len(ranks) > 16 else "")
    return f"{config.profile.tool}, with the flags of profiles/nsys/{config.profile.flags_file}, on ranks {listed}"
