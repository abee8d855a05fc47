"""DeepSpeed's compiled ops: built once into a folder that outlives runs, and only loaded by the ranks.

Left to themselves, all ranks would call the build tool at once, behind a lock file that a killed rank leaves for ever.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, open_checked
from hpcmm.runs.ownership import Reach, exchangeable, is_closed

COMMUNICATION = "deepspeed_shm_comm"
"""Shared-memory communication, which DeepSpeed loads with every process group on CPUs."""
ADAM = "fused_adam"
"""What an optimizer of type ``Adam`` or ``AdamW`` is in DeepSpeed's own settings."""

_BUILDERS = {COMMUNICATION: "ShareMemCommBuilder", ADAM: "FusedAdamBuilder"}
_STAMPS = {COMMUNICATION: "hpcmm-ops-built", ADAM: "hpcmm-adam-built"}


def ops_are_built(folder: Path, ops: Sequence[str] = (COMMUNICATION,)) -> bool:
    return all(is_regular(folder / _STAMPS[op]) for op in ops)


def build_ops(folder: Path, ops: Sequence[str] = (COMMUNICATION,)) -> None:
    """Compile into ``folder`` those of ``ops`` that are missing there and that this machine's accelerator needs.

    The caller sees to it that it does so alone.

    Raises HpcmmError if there is no C++ compiler, or another user could exchange ``folder`` for one of their own.
    """
    if not ops_are_built(folder):
        shutil.rmtree(folder, ignore_errors=True)  # an earlier build was cut short
    os.umask(os.umask(0o022) | 0o022)  # what others could write is not loaded
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder = Path(os.path.realpath(folder))  # what is checked is used, and no link is followed again
    found = exchangeable(folder)
    if found is not None and found.reach >= Reach.everybody:
        raise HpcmmError(
            f"{found.why}, so no ops are compiled in {folder}: set cluster.cache_dir to a folder of yours."
        )
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415 -- imports torch, for a build alone

    if select_accelerator() == "cpu":
        if shutil.which("c++") is None and "CXX" not in os.environ:
            raise HpcmmError("No C++ compiler here, which DeepSpeed needs on CPU: install g++, or load its module.")
        print(f"Compiling DeepSpeed's ops into {folder}; later runs find them there.", flush=True)
        began = time.monotonic()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        for op in ops:
            if not ops_are_built(folder, [op]):
                shutil.rmtree(folder / op, ignore_errors=True)  # with the lock of a build that was cut short
                _compile(folder, op)
                (folder / _STAMPS[op]).touch()
        print(f"Compiled DeepSpeed's ops in {time.monotonic() - began:.0f} s.", flush=True)
    for op in ops:
        (folder / _STAMPS[op]).touch()


def _compile(folder: Path, op: str) -> None:
    from deepspeed.ops.op_builder import cpu  # noqa: PLC0415 -- after the accelerator's choice
    from torch.utils import cpp_extension  # noqa: PLC0415

    # PyTorch puts it unquoted into a command line, which a blank in the environment's path breaks.
    library_path, cpp_extension.TORCH_LIB_PATH = cpp_extension.TORCH_LIB_PATH, shlex.quote(cpp_extension.TORCH_LIB_PATH)
    try:
        getattr(cpu, _BUILDERS[op])().load(verbose=False)
    except (RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        log = folder / "build.log"
        log.write_text(str(error), encoding="utf-8")
        raise HpcmmError(f"DeepSpeed's ops do not compile on {os.uname().nodename}: see {log}.") from error
    finally:
        cpp_extension.TORCH_LIB_PATH = library_path


def load_ops(folder: Path) -> None:
    """Give DeepSpeed the ops that are built in ``folder``, so that it builds none of these.

    Raises HpcmmError if one cannot be loaded, or another user could have written it, for to load it is to run it.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with ExitStack() as files:  # open together, for the dynamic linker takes one path for one library
        _load_checked(folder, COMMUNICATION, files)
        if ops_are_built(folder, [ADAM]):  # else what lies there is DeepSpeed's own business
            _load_checked(folder, ADAM, files)


def _load_checked(folder: Path, op: str, files: ExitStack) -> None:
    library = folder / op / f"{op}.so"
    try:
        opened = open_checked(library, within=folder)
    except FileNotFoundError:
        return  # built for a GPU, if none is needed
    except OSError as error:
        raise HpcmmError(_unfit(library, error.strerror or str(error), folder)) from error
    file = files.enter_context(opened.file)
    if opened.writer is not None and not is_closed(folder):
        raise HpcmmError(_unfit(library, f"another user could have written {opened.writer}", folder))
    _load_op(op, library, file.fileno(), folder)


def _unfit(library: Path, reason: str, folder: Path) -> str:
    return f"{library} does not load here ({reason}): remove {folder}, and the next run builds it anew."


def _load_op(op: str, library: Path, descriptor: int, folder: Path) -> None:
    """Load what is open, and not what lies at ``library`` by now."""
    from deepspeed.ops.op_builder.builder import OpBuilder  # noqa: PLC0415 -- after the accelerator's choice

    loader = ExtensionFileLoader(op, f"/proc/self/fd/{descriptor}")
    spec = importlib.util.spec_from_loader(op, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise HpcmmError(_unfit(library, str(error), folder)) from error
    OpBuilder._loaded_ops[op] = module
