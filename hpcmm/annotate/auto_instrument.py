"""Annotation of programs that know nothing of hpcmm, as soon as they have imported what is to be annotated."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hpcmm.annotate.auto_steps import AutomaticRanges
from hpcmm.annotate.groups import name_group
from hpcmm.annotate.in_children.sitecustomize import LISTENS_AT
from hpcmm.annotate.ranges import give_way, profiler_attached
from hpcmm.annotate.schema import axis_of
from hpcmm.annotate.watched_modules import WatchedModules, imported_torch

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


def annotate_program() -> None:
    """Annotate what this process will do: collectives, steps and phases. Does nothing if no profiler is attached.

    PyTorch is not imported for it.
    """
    if not profiler_attached():
        return
    _ranges()  # the program's own ranges are known from now on
    annotate_collectives_at_init()
    after_import("torch.distributed.device_mesh", _watch_meshes)
    after_import("torch.optim.optimizer", _watch_optimizers)
    after_import("torch.autograd", _watch_backward)
    after_import("torch.utils.data.dataloader", _watch_loaders)
    after_import("torch.amp.grad_scaler", _watch_scaler)
    after_import("torch.jit", _watch_scripting)
    after_import("deepspeed.runtime.engine", _watch_deepspeed)


_CHILDREN = Path(__file__).with_name("in_children")
"""A folder with a ``sitecustomize``, which Python imports when it starts."""


def annotate_children(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have Pythons that this process starts annotate themselves, too, and tell where they stand when they are asked.

    Does nothing if nobody asks, and no profiler is attached.
    """
    if profiler_attached() or LISTENS_AT in environ:
        others = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != str(_CHILDREN)]
        environ["PYTHONPATH"] = os.pathsep.join([str(_CHILDREN), *others])


_C10D = "torch.distributed.distributed_c10d"


def annotate_collectives_at_init() -> None:
    """Have collectives annotated from the end of the first ``init_process_group`` on, whoever calls it.

    PyTorch is not imported for it. Does nothing when no profiler is attached.
    """
    if profiler_attached():
        after_import(_C10D, _wrap_init)


def _wrap_init(module: ModuleType) -> None:
    init: Any = module.init_process_group  # a name that PyTorch documents

    @functools.wraps(init)
    def init_and_annotate(*arguments: Any, **keywords: Any) -> None:
        init(*arguments, **keywords)
        from hpcmm.annotate import collectives  # noqa: PLC0415 -- imports torch, which is there by now

        collectives.install()

    module.init_process_group = init_and_annotate  # type: ignore[attr-defined]


def _watch_meshes(module: ModuleType) -> None:
    """A dimension of a mesh that holds all ranks has no group of its own that would describe itself."""
    init: Any = module.init_device_mesh  # a name that PyTorch documents

    @functools.wraps(init)
    def init_and_name(*arguments: Any, **keywords: Any) -> Any:
        mesh = init(*arguments, **keywords)
        for name in mesh.mesh_dim_names or ():
            if axis := axis_of(name):
                name_group(mesh.get_group(name), axis)
        return mesh

    module.init_device_mesh = init_and_name  # type: ignore[attr-defined]


# Steps and phases. What PyTorch does not document is asked for by name, and a name that is missing costs its phase.


@functools.cache
def _ranges() -> AutomaticRanges:
    """Those of this process."""
    automatic = AutomaticRanges(lambda: len(_optimizers), _modules())
    give_way(automatic)
    return automatic


_optimizers: dict[int, weakref.ref[Any]] = {}
"""By id, for an optimizer of the program's may have no hash."""


@functools.cache
def _modules() -> WatchedModules:
    return WatchedModules(_ranges)


def _missing(what: str, error: Exception) -> None:
    print(f"hpcmm: {what} cannot be seen in this version of PyTorch or DeepSpeed ({error}).", file=sys.stderr)


def _forget(optimizer: int, _: object) -> None:
    _optimizers.pop(optimizer, None)


def _watch_optimizers(module: ModuleType) -> None:
    optimizer: Any = module.Optimizer
    made = optimizer.__init__

    @functools.wraps(made)
    def note(self: Any, *arguments: Any, **keywords: Any) -> None:
        made(self, *arguments, **keywords)
        with contextlib.suppress(TypeError):  # of a class that takes no weak references
            _optimizers[id(self)] = weakref.ref(self, functools.partial(_forget, id(self)))

    optimizer.__init__ = note
    try:
        module.register_optimizer_step_pre_hook(_update_begins)
        module.register_optimizer_step_post_hook(_update_ends)
    except AttributeError as error:
        _missing("steps", error)


def _update_begins(optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Returns None, or the arguments with a closure that tells its end."""
    if imported_torch().compiler.is_compiling():
        return None
    has_closure = _has_closure(arguments, keywords)
    _ranges().update_begins(id(optimizer), closure=has_closure)
    if not has_closure:
        return None
    told = [_telling_its_end(each) if at == 1 else each for at, each in enumerate(arguments)]
    return tuple(told), {name: _telling_its_end(each) if name == _CLOSURE else each for name, each in keywords.items()}


def _update_ends(optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if not imported_torch().compiler.is_compiling():
        _ranges().update_ends(id(optimizer), closure=_has_closure(arguments, keywords))


_CLOSURE = "closure"


def _telling_its_end(closure: Any) -> Any:
    if not _is_closure(closure):
        return closure

    @functools.wraps(closure)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return closure(*arguments, **keywords)
        finally:
            _ranges().closure_ends()

    return call


def _has_closure(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """``arguments``: of ``step``, with the optimizer itself."""
    return any(map(_is_closure, arguments[1:2])) or _is_closure(keywords.get(_CLOSURE))


def _is_closure(given: Any) -> bool:
    """A function, and neither a class nor a module, which some optimizers take as well."""
    return callable(given) and not isinstance(given, (type, imported_torch().nn.Module))


def _watch_backward(module: ModuleType) -> None:
    """``backward`` and ``torch.autograd.grad`` both end in this function, also if a library calls them."""
    try:
        run: Any = module._engine_run_backward
    except AttributeError as error:
        _missing("phase backward", error)
        return

    @functools.wraps(run)
    def run_and_annotate(*arguments: Any, **keywords: Any) -> Any:
        accumulates = keywords.get("accumulate_grad", True) is not False
        if imported_torch().compiler.is_compiling() or not _ranges().backward_begins(accumulates=accumulates):
            return run(*arguments, **keywords)
        try:
            return run(*arguments, **keywords)
        finally:
            _ranges().backward_ends()

    module._engine_run_backward = run_and_annotate  # type: ignore[attr-defined]


def _watch_loaders(module: ModuleType) -> None:
    try:
        iterator: Any = module._BaseDataLoaderIter
        fetch = iterator.__next__
    except AttributeError as error:
        _missing("phase data", error)
        return

    @functools.wraps(fetch)
    def fetch_and_annotate(self: Any) -> Any:
        ranges, torch = _ranges(), imported_torch()
        loader = id(getattr(self, "_dataset", self))  # a loader may be made anew for each epoch
        is_phase, exhausted = ranges.fetch_begins(loader, grad=torch.is_grad_enabled()), False
        try:
            return fetch(self)
        except StopIteration:
            exhausted = True
            raise
        finally:
            ranges.fetch_ends(loader, is_phase=is_phase, exhausted=exhausted)

    iterator.__next__ = fetch_and_annotate


def _watch_scaler(module: ModuleType) -> None:
    """GradScaler calls no optimizer after an overflow, but the iteration is over all the same."""
    step: Any = module.GradScaler.step

    @functools.wraps(step)
    def step_and_annotate(self: Any, optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
        with _update(lambda: id(optimizer)):
            return step(self, optimizer, *arguments, **keywords)

    module.GradScaler.step = step_and_annotate


def _watch_deepspeed(module: ModuleType) -> None:
    """An engine's step is more than its optimizer's, which it does not call after an overflow."""
    step: Any = module.DeepSpeedEngine.step
    stepped_before: dict[int, int] = {}

    @functools.wraps(step)
    def step_and_annotate(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not self.is_gradient_accumulation_boundary():
            return step(self, *arguments, **keywords)
        with _update(lambda: stepped_before.get(id(self), id(self))):
            result = step(self, *arguments, **keywords)
        stepped_before[id(self)] = _ranges().stepped()[-1]
        return result

    module.DeepSpeedEngine.step = step_and_annotate
    try:
        exchange: Any = module.DeepSpeedEngine.allreduce_gradients
    except AttributeError as error:
        _missing("the exchange of gradients", error)
        return

    @functools.wraps(exchange)
    def exchange_and_annotate(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not _ranges().exchange_begins():
            return exchange(self, *arguments, **keywords)
        try:
            return exchange(self, *arguments, **keywords)
        finally:
            _ranges().backward_ends()

    module.DeepSpeedEngine.allreduce_gradients = exchange_and_annotate


def _watch_scripting(module: ModuleType) -> None:
    """The scripting of a model compiles its hooks, which are to be functions with a source."""
    script: Any = module.script

    @functools.wraps(script)
    def script_without_hooks(obj: Any, *arguments: Any, **keywords: Any) -> Any:
        if not isinstance(obj, imported_torch().nn.Module):
            return script(obj, *arguments, **keywords)
        with _modules().unwatched(obj):
            return script(obj, *arguments, **keywords)

    module.script = script_without_hooks  # type: ignore[attr-defined]


@contextlib.contextmanager
def _update(skipped: Callable[[], int]) -> Iterator[None]:
    """Phase ``optimizer`` around what may call an optimizer; ``skipped`` names the one that would have stepped."""
    ranges = _ranges()
    ranges.update_begins(skipped())
    try:
        yield
        if not ranges.stepped():
            ranges.skipped(skipped())
    finally:
        ranges.update_ends(None)
