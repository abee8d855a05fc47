"""Launch multi-node training on Slurm, and see where its time goes.

>>> import hpcmm
>>> hpcmm.launch_run(["experiment=anomaly_demo"])           # hpcmm.api documents these three
>>> hpcmm.analyze_reports("runs/latest").bottlenecks()
>>> hpcmm.compare_runs("runs/before", "runs/after")
>>> with hpcmm.annotate.step(0): ...                        # ranges for a script of your own

Nothing is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
