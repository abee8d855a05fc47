"""Who this rank is, from what the scheduler put into the environment, and what the rank's libraries find there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any

from hpcmm.annotate import stopping
from hpcmm.annotate.schema import CAPTURE_STEPS
from hpcmm.config.command import is_launcher
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.files import json_object, open_regular, read_json_object
from hpcmm.runs import attempts
from hpcmm.runs.ownership import exchangeable
from hpcmm.runs.run_dir import RunDir

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
            node=_node(environ),
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


def _node(environ: Mapping[str, str]) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def _ranks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """From Slurm's ``2(x3),1``, three nodes of two tasks and one of one; all ranks if Slurm says nothing."""
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    if environ.get("SUBMITIT_EXECUTOR") == "local" or not listed:
        return world_size
    counts: list[int] = []
    for tasks, repeated in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", listed):
        counts += [int(tasks)] * int(repeated or 1)
    return counts[int(environ.get("SLURM_NODEID", "0"))]


def scratch_dir(given: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """``cluster.scratch_dir`` with its variables, else the first of SLURM_TMPDIR, TMPDIR and /tmp that can be used.

    Raises HpcmmError if it cannot be written, or others could replace what lies in it.
    """
    named = [environ.get("SLURM_TMPDIR"), environ.get("TMPDIR"), "/tmp"] if given is None else [given]  # noqa: S108
    problems = []
    for each in filter(None, named):
        folder = _VARIABLE.sub(lambda found: environ.get(found[1] or found[2], found[0]), each)
        problem = "names a variable that the job does not have" if "$" in folder else _problem_of(folder)
        if problem is None:
            return Path(os.path.realpath(folder))
        problems.append(f"{folder} {problem}")
    raise HpcmmError(f"launch.stage has no folder to copy to: {'; '.join(problems)}. Set cluster.scratch_dir.")


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def _problem_of(folder: str) -> str | None:
    try:
        facts = Path(folder).stat()
    except OSError as error:
        return f"is not there ({error.strerror})"
    if not folder.startswith("/") or not stat.S_ISDIR(facts.st_mode):
        return "is not the absolute path of a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    found = exchangeable(Path(folder) / "copy")
    return None if found is None else f"is not safe: {found.why}, so another user could replace the copy"


STAGE_DIR, STAGED = "HPCMM_STAGE_DIR", "HPCMM_STAGED"
"""Variables of a rank: the folder with this node's copies of ``launch.stage``, each under its source's name, and a JSON
object that has the copy of each source."""
NODES, NODE_RANK = "HPCMM_NODES", "HPCMM_NODE_RANK"
"""Variables of a rank: how many nodes the job has, and which of them, from 0, this one is."""

_OF_THE_SCRIPT = (attempts.SCRIPT_BEGAN, attempts.SRUN_BEGAN)
_OF_A_RANK = (
    *(stopping.RUN_DIR, stopping.RESTART_COUNT, attempts.CAPTURE_BEGAN, attempts.COMMAND_BEGAN),
    *(STAGE_DIR, STAGED, NODES, NODE_RANK, CAPTURE_STEPS),
)
_MOST_BYTES = 64 << 20
_held: list[IO[bytes]] = []


def forget_outer_run(environ: MutableMapping[str, str] = os.environ, *, has_script: bool) -> None:
    """Drop what another run told its ranks, one of which has launched this run.

    Its folders may be gone, or be another user's by now. A job's script has set its own marks anew.
    """
    for name in (*_OF_A_RANK, *(() if has_script else _OF_THE_SCRIPT)):
        environ.pop(name, None)


def use_copies(run: RunDir, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell the rank, by its environment, of this node's copies, and hold these as long as this process lives.

    Raises HpcmmError if this node has none.
    """
    from hpcmm.worker.stage import LOCK  # noqa: PLC0415 -- few runs stage

    node = _node(environ)
    nodes = read_json_object(run.staged, _MOST_BYTES, within=run.root).get("nodes")
    found = nodes.get(node) if isinstance(nodes, dict) else None
    try:
        if found is None:
            raise HpcmmError(f"{run.staged} names no copy of launch.stage on {node}: launch the run again.")
        folder, places = Path(found["folder"]), found["places"]
        held = open_regular(folder / LOCK)
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError as error:
        raise _gone(node, error) from error
    _require_own(folder, node)
    _held.append(held)
    environ.update({STAGE_DIR: str(folder / "data"), STAGED: json.dumps(places)})


def _require_own(folder: Path, node: str) -> None:
    """Raises HpcmmError if it is not a folder of this user that nobody else can write."""
    try:
        facts = folder.lstat()
    except OSError as error:
        raise _gone(node, error) from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise HpcmmError(f"The copy of launch.stage in {folder} on {node} is not yours alone: launch the run again.")


def _gone(node: str, error: OSError) -> HpcmmError:
    return HpcmmError(
        f"The copy of launch.stage is gone from {node} ({error.strerror}): did something clean its scratch folder?"
    )


def with_local_paths(config: RunConfig, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """``config`` with the copy of each file or folder that the user named for a workload and that is staged.

    Raises HpcmmError if another user could have written the copies.
    """
    copies = json_object(environ.get(STAGED, "{}")) if config.launch.stage else {}
    if config.task._target_ is None or not copies:
        return config
    from hpcmm.config.workload import load_workload  # noqa: PLC0415 -- PyYAML, which a script may not have

    workload = load_workload(config.task._target_)
    _require_own(Path(environ[STAGE_DIR]).parent, _node(environ))
    for key, path in workload.given_paths(config).items():
        named = path and str(Path(path).expanduser().absolute())
        for source, copy in copies.items():
            if named and (named == source or named.startswith(f"{source}/")):
                *sections, name = key.split(".")
                setattr(reduce(getattr, sections, config), name, copy + named.removeprefix(source))
    return config


def threads_per_rank(config: RunConfig) -> int:
    """OpenMP threads of a rank, or of a worker that it starts: ``parallel.threads_per_rank``, else its cores."""
    cluster = config.cluster
    workers = cluster.gpus_per_node if cluster.ranks_per_node == 1 and cluster.gpus_per_node else 1
    return config.parallel.threads_per_rank or max(1, cluster.cpus_per_rank // workers)


def tell_launchers(
    config: RunConfig, rank_env: RankEnvironment, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Tell a process that starts the workers of its node itself where all nodes meet.

    torchrun takes its options from ``PET_`` variables; what the user has set of these stays. If it is certain that the
    process is no worker itself, it is given no rank: its workers would inherit that.
    """
    cluster = config.cluster
    is_alone = cluster.ranks_per_node == 1
    node_rank = str(rank_env.rank) if is_alone else environ.get("SLURM_NODEID", "0")
    environ.update({NODES: str(cluster.nodes), NODE_RANK: node_rank})
    if not is_alone:
        return
    for name, value in {
        "NODE_RANK": node_rank,
        "PET_NNODES": str(cluster.nodes),
        "PET_NODE_RANK": node_rank,
        "PET_MASTER_ADDR": rank_env.master_addr,
        "PET_MASTER_PORT": str(rank_env.master_port),
        "PET_RDZV_ENDPOINT": f"{rank_env.master_addr}:{rank_env.master_port}",
        "PET_RDZV_ID": rank_env.job_id,
    }.items():
        environ.setdefault(name, value)
    if cluster.gpus_per_node:
        environ.setdefault("PET_NPROC_PER_NODE", str(cluster.gpus_per_node))
    if is_launcher(config):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            environ.pop(name, None)


def bound_threads(config: RunConfig) -> None:
    """Tell OpenMP and BLAS by their variable, which they read when torch and numpy are imported; one that is set stays.

    Without it their pools take all cores of the node, which its ranks share.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config)))
