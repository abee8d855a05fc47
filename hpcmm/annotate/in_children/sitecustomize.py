"""In Pythons that an annotated rank starts, such as those of ``torchrun`` or ``mp.spawn``: annotate them, too.

The folder of this file stands first on their ``PYTHONPATH``. Nothing of hpcmm is imported before PyTorch is, and
nothing happens at all without a profiler. The ``sitecustomize`` that this file hides is run as ever.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder


class _AtImportOfTorch:
    """Looks on at imports, and finds no module itself."""

    done = False

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG003
        if name == "torch" and not cls.done:
            cls.done = True
            _annotate()


def _annotate() -> None:
    try:
        from hpcmm.annotate.auto_instrument import annotate_program  # noqa: PLC0415 -- not before it is needed

        annotate_program()
    except Exception as error:  # the program itself needs none of this
        print(f"hpcmm: process {os.getpid()} is not annotated ({error}).", file=sys.stderr)


def _run_hidden() -> None:
    """Run the next ``sitecustomize`` on the path, in this one's place."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 -- pathlib would delay each start
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec  # noqa: PLC0415

        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if "NVTX_INJECTION64_PATH" in os.environ:
    sys.meta_path.insert(0, _AtImportOfTorch)
_run_hidden()
