"""Annotation of programs that know nothing of hpcmm, as soon as they have imported what is to be annotated."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hpcmm.annotate.ranges import profiler_attached

Then = Callable[[ModuleType], None]


def after_import(name: str, then: Then) -> None:
    """Call ``then`` with the module ``name`` once its own code has run; now where that has been.

    What ``then`` puts into the module is what a package sees that goes on to import from it.
    """
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Stands in front of the other finders until its module is asked for."""

    def __init__(self, name: str, then: Then) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(Loader):
    """The module's own loader, and what is to follow."""

    def __init__(self, loader: Loader, then: Then) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module's users, inspect and pickle among them, are to see its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)


_MODULE = "torch.distributed.distributed_c10d"


def annotate_collectives_at_init() -> None:
    """Have collectives annotated from the end of the first ``init_process_group`` on, whoever calls it.

    PyTorch is not imported for it. Does nothing when no profiler is attached.
    """
    if profiler_attached():
        after_import(_MODULE, _wrap_init)


def _wrap_init(module: ModuleType) -> None:
    init: Any = module.init_process_group  # a name that PyTorch documents

    @functools.wraps(init)
    def init_and_annotate(*arguments: Any, **keywords: Any) -> None:
        init(*arguments, **keywords)
        from hpcmm.annotate import collectives  # noqa: PLC0415 -- imports torch, which is there by now

        collectives.install()

    module.init_process_group = init_and_annotate  # type: ignore[attr-defined]
