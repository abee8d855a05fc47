"""Where hpcmm's own files lie: ``conf/``, ``slurm/`` and ``profiles/``.

In a checkout they stand beside the package, in an installed wheel within it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of hpcmm's package."""
_INSTALLED = PACKAGE / "_resources"


def own_module(name: str) -> list[str]:
    """Words that run a module of hpcmm in a process of its own, with :func:`environment_of_modules`.

    Without ``-P`` Python would look into the current folder first, which may be one that other users write.
    """
    return [sys.executable, "-P", "-m", name]


def environment_of_modules(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``environ``, in which Python finds this hpcmm."""
    paths = [str(PACKAGE.parent), *filter(None, [environ.get("PYTHONPATH")])]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


def resource(name: str) -> Path:
    """The file or folder ``name``, relative to the top of the project (``conf``, ``slurm/train.sbatch.j2``)."""
    return (_INSTALLED if _INSTALLED.is_dir() else PACKAGE.parent) / name
