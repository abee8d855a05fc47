"""Where hpcmm's own files lie: ``conf/``, ``slurm/`` and ``profiles/``; and when Python looks for the user's modules.

In a checkout they stand beside the package, in an installed wheel within it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
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


_WITHOUT_CLASSES = frozenset({"jobs", "analyze"})
"""Commands that import no class of the user's."""
_left_out: list[str] = []


def find_modules_in(folder: str, command: str) -> None:
    """Let ``command`` find the user's modules in the current ``folder``, by putting it on ``sys.path``.

    If another user than this one and root could have put a module there, it may hide none of those that Python finds
    elsewhere, nor stand for one that a package of ours would use if it were there. So the folder comes last, and not
    before :func:`find_modules_at_last`; not at all for a command that needs no class of the user's.
    """
    try:
        facts = Path(folder).stat()
    except OSError:
        return
    if facts.st_uid in {0, os.geteuid()} and not facts.st_mode & 0o022:
        sys.path.insert(0, folder)
    elif command not in _WITHOUT_CLASSES:
        _left_out.append(folder)


def find_modules_at_last(needed: Sequence[str]) -> None:
    """Import ``needed``, then search the folder that :func:`find_modules_in` left out. Nothing if there is none."""
    if _left_out:
        for name in needed:
            import_module(name)
        sys.path.append(_left_out.pop())


def resource(name: str) -> Path:
    """The file or folder ``name``, relative to the top of the project (``conf``, ``slurm/train.sbatch.j2``)."""
    return (_INSTALLED if _INSTALLED.is_dir() else PACKAGE.parent) / name
