"""What must hold of ``cluster``, and of the names that the run gives to files and jobs, before it may queue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hpcmm.config.schema import Executor, RunConfig
from hpcmm.resources import resource

_MOST_MEMORY_GB = 1e6
_LONGEST_NAME = 200
"""A folder's name has 255 characters at most, and this one gets the time appended."""
_OF_THE_RANKS = "hpcmm writes it from cluster.nodes, ranks_per_node and cpus_per_rank"
_OF_THE_CALL = "hpcmm would not learn which job was submitted"
_NOT_OPTIONS_OF_A_SITE = {
    "array": "sweep a key, such as train.seed=1,2,3",
    "dependency": "use after=JOB",
    "job-name": "use name=NAME",
    "output": "hpcmm writes all logs below runs_root",
    "time": "use cluster.time_limit_min",
    "nodes": _OF_THE_RANKS,
    "ntasks": _OF_THE_RANKS,
    "ntasks-per-node": _OF_THE_RANKS,
    "cpus-per-task": _OF_THE_RANKS,
    **dict.fromkeys(("parsable", "quiet", "test-only", "wait", "wrap", "help", "usage", "version"), _OF_THE_CALL),
}


def cluster_problems(config: RunConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong."""
    yield from _cluster(config)
    yield from _folders(config)
    yield from _shell_words(config)
    yield from _warning(config)
    yield from _container(config)


def is_unwritable(text: str) -> bool:
    """Whether no script, or no UTF-8 file, can hold ``text``."""
    return "\0" in text or any("\ud800" <= character <= "\udfff" for character in text)


def is_file_of(name: str, folder: str) -> bool:
    """Whether ``name`` is the plain name of a file in hpcmm's own ``folder``."""
    return any(name == entry.name and entry.is_file() for entry in resource(folder).iterdir())


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if cluster.gpus_per_node and cluster.ranks_per_node != cluster.gpus_per_node:
        yield (
            f"cluster.ranks_per_node is {cluster.ranks_per_node} and gpus_per_node is {cluster.gpus_per_node}: "
            "each rank drives one GPU, so make them equal."
        )
    if cluster.executor is Executor.local and cluster.nodes != 1:
        yield f"cluster.nodes is {cluster.nodes}, but the local executor has this machine alone: set cluster.nodes=1."
    if not is_file_of(cluster.template, "slurm"):
        yield f"cluster.template is {cluster.template!r}, but slurm/ holds no such file."
    if cluster.memory_gb is not None and not 0.001 <= cluster.memory_gb <= _MOST_MEMORY_GB:
        yield f"cluster.memory_gb is {cluster.memory_gb}, but must be the GB of a node's memory."


def _folders(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield f"name is {config.name!r}: use letters, digits, dots, dashes and underscores, for it names a folder."
    elif len(config.name) > _LONGEST_NAME:
        yield f"name has {len(config.name)} characters, but it names a folder: use at most {_LONGEST_NAME}."
    if not config.runs_root or not config.runs_root.isprintable() or "%" in config.runs_root:
        yield f"runs_root is {config.runs_root!r}: name a folder without control characters and percent signs."
    elif not _has_a_home(config.runs_root):
        yield f"runs_root is {config.runs_root!r}, but there is no such user's home."
    if cluster.cache_dir is not None and not _has_a_home(cluster.cache_dir):
        yield f"cluster.cache_dir is {cluster.cache_dir!r}, but there is no such user's home."


def _shell_words(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    for key, value in {**cluster.environment, **cluster.submit_environment}.items():
        if is_unwritable(value):
            yield f"cluster.environment.{key} holds bytes that a script cannot."
    for key in [*cluster.environment, *cluster.submit_environment]:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            yield f"cluster.environment has {key!r}, which is no name of an environment variable."
    for key in cluster.sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            yield f"cluster.sbatch has {key!r}, which is no long option of sbatch without its dashes."
        elif key in _NOT_OPTIONS_OF_A_SITE:
            yield f"cluster.sbatch.{key} cannot be given: {_NOT_OPTIONS_OF_A_SITE[key]}."


def _warning(config: RunConfig) -> Iterator[str]:
    warning_s, limit_s = config.cluster.stop_warning_s, 60 * config.cluster.time_limit_min
    if warning_s is not None and warning_s >= limit_s:
        yield (
            f"cluster.stop_warning_s is {warning_s}, but the whole job has {limit_s} s: raise cluster.time_limit_min, "
            "or set a shorter warning."
        )


def _container(config: RunConfig) -> Iterator[str]:
    container = config.cluster.container
    if container.engine is None:
        if container.image:
            yield "cluster.container.image is given, but no engine: set cluster.container.engine to pyxis or apptainer."
        return
    if not container.image:
        yield f"cluster.container.engine is {container.engine}, but there is no image: set cluster.container.image."
    if config.cluster.executor is Executor.local:
        yield "cluster.container needs Slurm, and the local executor has none: leave it out."
    for mount in container.mounts:
        if not mount.startswith("/") or "," in mount:
            yield f"cluster.container.mounts has {mount!r}: write /source or /source:/target, without commas."


def _has_a_home(folder: str) -> bool:
    """Whether a ``~`` in front of ``folder`` means something."""
    try:
        Path(folder).expanduser()
    except RuntimeError:
        return False
    return True
