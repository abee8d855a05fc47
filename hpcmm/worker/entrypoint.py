"""One rank, from its process' start to its end: of a workload, or of a script, program or function of the user's.

The user's code gets the environment that PyTorch's own launcher would give it, and annotation of its collectives where
a profiler listens. It needs to know nothing of hpcmm.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmm.annotate.auto_instrument import after_import, annotate_children, annotate_program
from hpcmm.config.schema import SCRIPT, RunConfig, TaskConfig
from hpcmm.errors import HpcmmError, ScriptExitError
from hpcmm.node.cache import extensions_dir
from hpcmm.node.recorder import words_of
from hpcmm.runs.attempts import current_attempt, parts_before
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.environment import RankEnvironment, bound_threads, tell_launchers, with_local_paths
from hpcmm.worker.task import RankSettings, read_settings, whole_config

if TYPE_CHECKING:
    from hpcmm.config.workload import Workload


def run_rank(run_dir: str) -> Any:
    """Run the task of ``config.yaml`` in the run directory. Returns a workload's final metrics, or what the user's
    function returned.

    Raises ScriptExitError if the user's code exits with another status than 0, HpcmmError if a function is not there.
    """
    began_s = time.time()
    run = RunDir(Path(run_dir))
    settings = read_settings(run)
    config = with_local_paths(whole_config(settings, run))
    if config.task._target_ is None:
        return _run_users_code(settings, run)
    from hpcmm.config.workload import load_workload  # noqa: PLC0415 -- PyYAML, which a script may not have

    return _train(load_workload(config.task._target_), config, run, began_s)


def _train(workload: Workload, config: RunConfig, run: RunDir, began_s: float) -> dict[str, float]:
    """``began_s``: when this process came to itself, in Unix time."""
    bound_threads(config)
    rank_env = RankEnvironment.read()
    _log_with_rank(rank_env)
    with MetricsWriter(run.rank_metrics(rank_env.rank), current_attempt(run)) as metrics:
        metrics.start(**rank_env.identity())
        for part, duration_s in parts_before(began_s):
            metrics.startup_part(part, duration_s)
        with metrics.startup("imports"):
            from hpcmm.annotate import collectives  # noqa: PLC0415 -- imports torch
            from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415 -- imports torch

            select_accelerator()
            from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415

            load_ops(extensions_dir(config.cluster))
            # These import deepspeed, which asks for the accelerator.
            from hpcmm.train.loop import train  # noqa: PLC0415
            from hpcmm.worker.distributed import process_group  # noqa: PLC0415

            workload.training_class()  # its imports belong to this part of the start
        with process_group(rank_env, config, metrics) as device:
            collectives.install()
            return train(workload, config, run, rank_env, device, metrics)


def _log_with_rank(rank_env: RankEnvironment) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {rank_env.rank} on {rank_env.node} %(levelname)s %(name)s: %(message)s",
        force=True,
    )


def _run_users_code(settings: RankSettings, run: RunDir) -> Any:
    config = settings.config
    rank_env = RankEnvironment.read()
    rank_env.export()
    _see_own_gpu()
    tell_launchers(config, rank_env)
    bound_threads(config)
    if settings.uses_deepspeed:
        _offer_compiled_ops(config)
    annotate_program()
    annotate_children()
    # The file is closed meanwhile: a program may close all that it has not opened, and open its own under the number.
    with MetricsWriter(run.rank_metrics(rank_env.rank), current_attempt(run)) as metrics:
        metrics.start(**rank_env.identity())
        for part, duration_s in parts_before(None):  # the reports tell when the first step began
            metrics.startup_part(part, duration_s)
    result, rank = None, os.getpid()
    if config.task.program is not None:
        _run_program(config.task, run, rank_env.rank)
    elif config.task.name == SCRIPT:
        _run_script(config.task)
    else:
        result = _call_function(config.task)
    # Else it is to go on, or this is a process that the program has forked.
    if not run.stopped.exists() and os.getpid() == rank:
        with MetricsWriter(run.rank_metrics(rank_env.rank), current_attempt(run)) as metrics:
            metrics.end()
    return result


def _run_program(task: TaskConfig, run: RunDir, rank: int) -> None:
    """As a shell does, with its signals passed on. The rank's Python and what lies beside it are on the PATH last."""
    from hpcmm.worker.signal_forwarding import run_watched  # noqa: PLC0415 -- few tasks are programs

    assert task.program is not None
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(task.program)
    if found is None:
        raise HpcmmError(f"{task.program} is not an executable on the PATH of {os.uname().nodename}.")
    with Path(found).open("rb") as opened:
        start = opened.read(80)
    # Without a first line that names its interpreter, a text is a script of the shell.
    shell = [] if start.startswith((b"#!", b"\x7fELF")) or b"\0" in start else ["/bin/sh"]
    if status := run_watched([*shell, found, *task.args], run, rank):
        status = status if status > 0 else 128 - status
        raise ScriptExitError(f"{task.program} exited with status {status}.", status, "")


def _run_script(task: TaskConfig) -> None:
    """As ``python path args...`` or ``python -m module args...`` does, in this process."""
    if task.module is not None:  # PYTHONPATH begins with the folder of the launch, as the copy has it
        sys.argv = [task.module, *task.args]
        with _exiting(task.module):
            runpy.run_module(task.module, run_name="__main__", alter_sys=True)
        return
    assert task.path is not None
    sys.argv = [task.path, *task.args]
    sys.path.insert(0, str(Path(task.path).parent))
    with _exiting(task.path):
        runpy.run_path(task.path, run_name="__main__")


@contextlib.contextmanager
def _exiting(name: str) -> Iterator[None]:
    """Let the user's code call ``sys.exit`` as in a Python of its own."""
    try:
        yield
    except SystemExit as ended:
        if status := _exit_status(ended.code):
            said = "" if isinstance(ended.code, int) else words_of(ended.code)
            raise ScriptExitError(f"{name} exited with status {status}.", status, said) from ended


def _exit_status(code: object) -> int:
    """What a shell sees of ``sys.exit(code)``, whose words are printed if it is no number."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 0xFF
    print(words_of(code), file=sys.stderr, flush=True)
    return 1


def _call_function(task: TaskConfig) -> Any:
    assert task.target is not None
    module_name, _, name = task.target.partition(":")
    function: Any = importlib.import_module(module_name)
    for part in name.split("."):
        try:
            function = getattr(function, part)
        except AttributeError as error:
            raise HpcmmError(f"task.target is {task.target}, but {module_name} has no {name}.") from error
    result = None
    with _exiting(task.target):
        result = function(**task.kwargs)
    return result


def _see_own_gpu() -> None:
    """Where the scheduler shows this rank one GPU alone, it is number 0, which scripts take from LOCAL_RANK."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and "," not in visible:
        os.environ["LOCAL_RANK"] = "0"


def _offer_compiled_ops(config: RunConfig) -> None:
    """Give DeepSpeed, if the script imports it, the ops that were built before the ranks started."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    folder = extensions_dir(config.cluster)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    after_import("deepspeed", lambda _: _load_ops(folder))


def _load_ops(folder: Path) -> None:
    from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415 -- imports torch and deepspeed

    load_ops(folder)
