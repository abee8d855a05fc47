"""Launch multi-node training on Slurm, and see where its time goes.

>>> import hpcmm
>>> hpcmm.launch_run(["experiment=anomaly_demo"])           # hpcmm.api documents these three
>>> hpcmm.analyze_reports("runs/latest").bottlenecks()
>>> hpcmm.compare_runs("runs/before", "runs/after")
>>> with hpcmm.annotate.step(0): ...                        # ranges for a script of your own

Nothing is imported before it is used.
"""

import sys


def _command_of_start() -> "str | None":  # quoted, for the import of __future__ would look into the current folder
    """The command of hpcmm that ``python -m`` is about to run; None if it runs something else."""
    if sys.argv[:1] != ["-m"] or getattr(sys.flags, "safe_path", False):
        return None
    words = [word.removeprefix("-m") for word in getattr(sys, "orig_argv", [])[1:]]
    started = next((word for word in words if word == __name__ or word.startswith(f"{__name__}.")), None)
    # The words after the module's name begin with the command's in: python -m hpcmm jobs.
    return " ".join(sys.argv[1:2]) if started == __name__ else started and started.split(".")[1]


if (_command := _command_of_start()) is not None:
    _here = sys.path.pop(0)
    from hpcmm.resources import find_modules_in

    find_modules_in(_here, _command)

from importlib import import_module  # noqa: E402 -- from here on modules may be looked for
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
