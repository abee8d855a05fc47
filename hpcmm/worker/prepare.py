"""What has to be there before any rank starts: ``python -m hpcmm.worker prepare RUN_DIR``, once a job, on one node.

Compiled ops are built and the workload's data is made, unless an earlier run left them. A line says which. A file or
folder that the user named and that cannot be read ends the job here, and not half a minute later in each rank.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.config.schema import RunConfig
from hpcmm.errors import InputError
from hpcmm.node.cache import cache_dir, check_cache_dir, extensions_dir, one_at_a_time
from hpcmm.node.recorder import node_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.compiled_ops import ADAM, COMMUNICATION, build_ops, ops_are_built
from hpcmm.worker.task import read_settings, whole_config

if TYPE_CHECKING:
    from hpcmm.config.workload import Workload


def prepare_run(run: RunDir) -> None:
    """As :func:`prepare`, for the run in this directory."""
    settings = read_settings(run)
    prepare(whole_config(settings, run), uses_deepspeed=settings.uses_deepspeed)


def prepare(config: RunConfig, *, uses_deepspeed: bool = True) -> None:
    """Build and make what is missing, each by one process at a time. Cheap when nothing is.

    ``uses_deepspeed``: the task imports it; a workload of hpcmm's always does.
    Raises HpcmmError if that fails, InputError for files and folders of the user's that cannot be used.
    """
    workload = None
    if config.task._target_ is not None:
        from hpcmm.config.workload import load_workload  # noqa: PLC0415 -- PyYAML, which a script may not have

        workload = load_workload(config.task._target_)
        _check_given_paths(workload, config)
    elif not uses_deepspeed or importlib.util.find_spec("deepspeed") is None:
        return
    # hpcmm's own training has an optimizer of PyTorch's. What a script chooses is not known before it runs.
    ops = (COMMUNICATION,) if workload is not None else (COMMUNICATION, ADAM)
    are_there = ops_are_built(_ops(config), ops)
    check_cache_dir(config.cluster)  # after the look, so that it was into what is checked
    if not are_there:
        # Its own lock for each environment, so that none waits for what is compiled for another.
        with _alone(config, extensions_dir(config.cluster).name):
            if not ops_are_built(_ops(config), ops):
                build_ops(_ops(config), ops)
    if workload is not None:
        with _alone(config, "data"):
            workload.prepare(config)


def _ops(config: RunConfig) -> Path:
    return Path(os.path.realpath(extensions_dir(config.cluster)))


@contextmanager
def _alone(config: RunConfig, what: str) -> Iterator[None]:
    with one_at_a_time(cache_dir(config.cluster) / f"{what}.lock"):
        check_cache_dir(config.cluster)  # once more, now that folders that were missing are made
        yield


def _check_given_paths(workload: Workload, config: RunConfig) -> None:
    """Raises InputError that names, by its key, each file and folder that this node cannot read."""
    given = {key: path for key, path in workload.given_paths(config).items() if path is not None}
    problems = [f"{key} is {path}, but {problem}" for key, path in given.items() if (problem := _problem_of(path))]
    if problems:
        raise InputError(f"{'; '.join(problems)}. Name what every node of the job can read.")


def _problem_of(given: str) -> str | None:
    """Why this node cannot read a path; None if it can."""
    node = node_of(os.environ)
    try:
        path = Path(given).expanduser()
        path.stat()
    except OSError as error:
        return f"{node} cannot read it ({error.strerror})"
    except (RuntimeError, ValueError) as error:  # no such user's home; a character that no path can hold
        return f"that is not a path ({error})"
    is_readable = os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))
    return None if is_readable else f"{node} cannot read it (Permission denied)"
