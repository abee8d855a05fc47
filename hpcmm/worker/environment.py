"""Who this rank is, from what the scheduler put into the environment, and what the rank's libraries find there."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError

_SLURM = {
    "rank": "SLURM_PROCID",
    "local_rank": "SLURM_LOCALID",
    "world_size": "SLURM_NTASKS",
    "job_id": "SLURM_JOB_ID",
}
_SUBMITIT_LOCAL = {
    "rank": "SUBMITIT_LOCAL_GLOBALID",
    "local_rank": "SUBMITIT_LOCAL_LOCALID",
    "world_size": "SUBMITIT_LOCAL_NTASKS",
    "job_id": "SUBMITIT_LOCAL_JOB_ID",
}


@dataclass(frozen=True)
class RankEnvironment:
    """The place of one rank in its job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    job_id: str
    node: str
    master_addr: str
    master_port: int

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> RankEnvironment:
        """Raises HpcmmError, naming the variable, if the environment is not a rank's."""
        # A job on submitit's local executor may itself have been started within a Slurm job.
        names = _SUBMITIT_LOCAL if environ.get("SUBMITIT_EXECUTOR") == "local" else _SLURM
        wanted = [*names.values(), "MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in wanted if name not in environ]
        if missing:
            raise HpcmmError(
                f"{', '.join(missing)} not set: a rank starts through the run's submission.sh, whose environment "
                "srun must pass on (see --export in cluster.srun), or with cluster=local."
            )
        return cls(
            rank=int(environ[names["rank"]]),
            local_rank=int(environ[names["local_rank"]]),
            world_size=int(environ[names["world_size"]]),
            local_world_size=_ranks_on_this_node(environ, int(environ[names["world_size"]])),
            job_id=environ[names["job_id"]],
            node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
        )

    def identity(self) -> dict[str, Any]:
        """What the rank's metrics file says of it; see :meth:`hpcmm.runs.metrics.MetricsWriter.start`."""
        return {name: getattr(self, name) for name in ("rank", "local_rank", "world_size", "node", "job_id")}

    def export(self, environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
        """Set the variables that PyTorch, DeepSpeed and Accelerate look for."""
        environ["RANK"] = str(self.rank)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


def _ranks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """From Slurm's ``2(x3),1``, three nodes of two tasks and one of one; all ranks if Slurm says nothing."""
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    if environ.get("SUBMITIT_EXECUTOR") == "local" or not listed:
        return world_size
    counts: list[int] = []
    for tasks, repeated in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", listed):
        counts += [int(tasks)] * int(repeated or 1)
    return counts[int(environ.get("SLURM_NODEID", "0"))]


def threads_per_rank(config: RunConfig) -> int:
    """OpenMP threads of a rank: ``parallel.threads_per_rank``, else its processor cores."""
    return config.parallel.threads_per_rank or config.cluster.cpus_per_rank


def bound_threads(config: RunConfig) -> None:
    """Tell OpenMP and BLAS by their variable, which they read when torch and numpy are imported; one that is set stays.

    Without it their pools take all cores of the node, which its ranks share.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config)))
