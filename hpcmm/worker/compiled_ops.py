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
from pathlib import Path

from hpcmm.errors import HpcmmError

_OP = "deepspeed_shm_comm"
"""Shared-memory communication, which DeepSpeed loads with every process group on CPUs."""

_STAMP = "hpcmm-ops-built"


def ops_are_built(folder: Path) -> bool:
    return (folder / _STAMP).exists()


def build_ops(folder: Path) -> None:
    """Compile into ``folder`` what this machine's accelerator needs. The caller sees to it that it does so alone.

    Raises HpcmmError if there is no C++ compiler.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an earlier build was cut short
    folder.mkdir(parents=True)
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415 -- imports torch, for a build alone

    if select_accelerator() == "cpu":
        if shutil.which("c++") is None and "CXX" not in os.environ:
            raise HpcmmError("No C++ compiler here, which DeepSpeed needs on CPU: install g++, or load its module.")
        print(f"Compiling DeepSpeed's ops into {folder}; later runs find them there.", flush=True)
        began = time.monotonic()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        _compile(folder)
        print(f"Compiled DeepSpeed's ops in {time.monotonic() - began:.0f} s.", flush=True)
    (folder / _STAMP).touch()


def _compile(folder: Path) -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # noqa: PLC0415 -- after the accelerator's choice
    from torch.utils import cpp_extension  # noqa: PLC0415

    # PyTorch puts it unquoted into a command line, which a blank in the environment's path breaks.
    library_path, cpp_extension.TORCH_LIB_PATH = cpp_extension.TORCH_LIB_PATH, shlex.quote(cpp_extension.TORCH_LIB_PATH)
    try:
        ShareMemCommBuilder().load(verbose=False)
    except (RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        log = folder / "build.log"
        log.write_text(str(error), encoding="utf-8")
        raise HpcmmError(f"DeepSpeed's ops do not compile on {os.uname().nodename}: see {log}.") from error
    finally:
        cpp_extension.TORCH_LIB_PATH = library_path


def load_ops(folder: Path) -> None:
    """Give DeepSpeed the ops in ``folder``, so that it builds none. Raises HpcmmError if one cannot be loaded."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    library = folder / _OP / f"{_OP}.so"
    if not library.is_file():
        return  # built for a GPU, if none is needed
    from deepspeed.ops.op_builder.builder import OpBuilder  # noqa: PLC0415 -- after the accelerator's choice
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # noqa: PLC0415

    spec = importlib.util.spec_from_file_location(_OP, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise HpcmmError(
            f"{library} does not load here ({error}): remove {folder}, and the next run builds it anew."
        ) from error
    OpBuilder._loaded_ops[ShareMemCommBuilder.NAME] = module
