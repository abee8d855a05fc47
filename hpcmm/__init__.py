"""Launch multi-node training on Slurm, and see where its time goes.

>>> import hpcmm
>>> hpcmm.launch_run(["experiment=anomaly_demo"])           # hpcmm.api documents these three
>>> hpcmm.analyze_reports("runs/latest").bottlenecks()
>>> hpcmm.compare_runs("runs/before", "runs/after")
>>> with hpcmm.annotate.step(0): ...                        # ranges for a script of your own

Nothing is imported before it is used.
"""

import os
import sys

_WITHOUT_CLASSES = frozenset({"jobs", "analyze"})
"""Commands that import no class of the user's."""
_left_out: list[str] = []


def find_modules_in(folder: str, command: str, place: int = 0) -> None:
    """Let ``command`` find the user's modules in the current ``folder``, which ``sys.path[place]`` is from now on.

    If another user than this one and root could have put a module there, it may hide none of those that Python finds
    elsewhere, nor stand for one that a package of ours would use if it were there. So the folder comes last, and not
    before :func:`find_modules_at_last`; not at all for a command that needs no class of the user's.
    """
    try:
        facts = os.stat(folder)  # noqa: PTH116 -- pathlib would be looked for in the folder
    except OSError:
        return
    if facts.st_uid in {0, os.geteuid()} and not facts.st_mode & 0o022:
        sys.path[place] = folder
        return
    del sys.path[place]
    if command not in _WITHOUT_CLASSES:
        _left_out.append(folder)


def find_modules_at_last(needed: tuple[str, ...]) -> None:
    """Import ``needed``, then search the folder that :func:`find_modules_in` left out. Nothing if there is none."""
    if _left_out:
        for name in needed:
            import_module(name)
        sys.path.append(_left_out.pop())


def _name_of_started_module() -> str | None:
    """The module of hpcmm that ``python -m`` is about to run; None if it is no such start."""
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path:
        return None
    words = [word.removeprefix("-m") for word in sys.orig_argv[1:]]
    return next((word for word in words if word == __name__ or word.startswith(f"{__name__}.")), None)


if (_started := _name_of_started_module()) is not None:
    # The words of the command begin after its name: python -m hpcmm jobs.
    _after = sys.orig_argv[-len(sys.argv) + 1 :] if len(sys.argv) > 1 else []
    _command = _started.partition(".")[2].partition(".")[0] or (_after[0] if _after else "")
    find_modules_in(sys.path[0], _command)

from importlib import import_module  # noqa: E402 -- from here on modules are looked for
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from hpcmm import annotate
    from hpcmm.api import analyze_reports, compare_runs, launch_run

__all__ = ["analyze_reports", "annotate", "compare_runs", "launch_run"]


def __getattr__(name: str) -> Any:
    if name == "annotate":
        return import_module("hpcmm.annotate")
    if name in __all__:
        return getattr(import_module("hpcmm.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
