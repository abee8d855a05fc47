"""Where hpcmm's own files lie: ``conf/``, ``slurm/`` and ``profiles/``.

In a checkout they stand beside the package, in an installed wheel within it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of hpcmm's package."""
_INSTALLED = PACKAGE / "_resources"


def resource(name: str) -> Path:
    """The file or folder ``name``, relative to the top of the project (``conf``, ``slurm/train.sbatch.j2``)."""
    return (_INSTALLED if _INSTALLED.is_dir() else PACKAGE.parent) / name
