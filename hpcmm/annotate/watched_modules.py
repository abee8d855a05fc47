"""The modules of a program that knows nothing of hpcmm, whose forward passes are phases."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

from hpcmm.annotate.auto_steps import AutomaticRanges


def imported_torch() -> Any:
    """PyTorch, in a program that has imported it."""
    return sys.modules["torch"]


_MOST_MODULES = 256
_LOOKED_AT = 8


class WatchedModules:
    """The modules whose forward passes are phases: each outermost one that is called as such."""

    def __init__(self, ranges: Callable[[], AutomaticRanges]) -> None:
        """``ranges``: what each call is told to."""
        self._ranges = ranges
        self._hooks: dict[int, tuple[weakref.ref[Any], list[Any]]] = {}
        self._weights: list[_Weight] = []
        self._has_said_so = False

    def find(self) -> list[Any]:
        """Watch modules that have parameters to train and are no part of another one."""
        self._hooks = {key: known for key, known in self._hooks.items() if known[0]() is not None}
        self._weights = [each for each in self._weights if each.module() is not None]
        module_type = imported_torch().nn.Module
        # The type is asked and not the object, for some objects load what they stand for if they are asked.
        modules = [each for each in gc.get_objects() if issubclass(type(each), module_type)]
        parts = {id(part) for module in modules for part in _parts(module)}
        return self._watch(_called(module for module in modules if id(module) not in parts))

    @contextlib.contextmanager
    def unwatched(self, module: Any) -> Iterator[None]:
        """``module`` and its parts have no hook meanwhile, for what reads the source of hooks."""
        whole = list(_whole(module))
        away = [(key, *self._hooks.pop(key)) for key in {*map(id, whole)} & self._hooks.keys()]
        for _, _, hooks in away:
            for hook in hooks:
                hook.remove()
        for each in whole:
            _remove_other_hooks(each)
        try:
            yield
        finally:
            for key, reference, _ in away:
                if (each := reference()) is not None:
                    self._hooks[key] = reference, _hooks_on(each, self._ranges)

    def descend(self) -> list[Any]:
        """Watch the parts of the watched modules in their place."""
        watched = [module for reference, _ in self._hooks.values() if (module := reference()) is not None]
        for _, hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()
        parts = [part for module in watched for part in _called(_parts(module))]
        if (watched and not parts) or len(parts) > _MOST_MODULES:
            if not self._has_said_so:
                print("hpcmm: no module's call encloses the forward pass, so it is no phase.", file=sys.stderr)
            self._has_said_so = True
            return []
        return self._watch(parts)

    def weights(self) -> int:
        """The sum of the versions of some parameters of each module: an update changes all of them."""
        return sum(each.version() for each in self._weights)

    def size_of(self, batch: Any) -> int | None:
        """Elements of the tensors, and characters of the texts, that a forward pass is given; None if there are none.

        Nothing of the program's own is called for it, for that may draw random numbers, or be there once.
        """
        with imported_torch()._C.DisableTorchFunction():
            size = _elements(batch)
        return size if size is not None and 0 < size < 1 << 63 else None  # as NVTX can carry it

    def _watch(self, modules: Iterable[Any]) -> list[Any]:
        new = []
        for module in modules:
            known = self._hooks.get(id(module))
            if not _is_plain(module):
                continue
            if (known is None or known[0]() is not module) and next(_trained(module), None) is not None:
                changing = (each for each in _trained(module) if _is_lazy(each[2]) or not each[2].is_inference())
                self._weights += (_Weight(*each) for each in islice(changing, _LOOKED_AT))
                self._hooks[id(module)] = weakref.ref(module), _hooks_on(module, self._ranges)
                new.append(module)
        return new


class _Weight:
    """A parameter, by its module and name: PyTorch converts none in its place that has weak references."""

    __slots__ = ("_id", "_name", "_version", "module")

    def __init__(self, module: Any, name: str, parameter: Any) -> None:
        self.module, self._name, self._id = weakref.ref(module), name, id(parameter)
        self._version = 0

    def version(self) -> int:
        """Its version, as it was last if another one is there: ``torch.func`` puts others into its place for a call."""
        parameter = getattr(self.module(), "_parameters", {}).get(self._name)
        if parameter is not None and id(parameter) == self._id:
            self._version = parameter._version
        return self._version


def _trained(module: Any) -> Iterator[tuple[Any, str, Any]]:
    """Each module, name and parameter, read where PyTorch keeps them: a program may have own methods of their names."""
    for part in _whole(module):
        for name, each in vars(part).get("_parameters", {}).items():
            if each is not None and each.requires_grad:
                yield part, name, each


def _is_lazy(parameter: Any) -> bool:
    """Whether it has no shape before the first forward pass, and answers nothing until then."""
    return bool(imported_torch().nn.parameter.is_lazy(parameter))


def _whole(module: Any) -> Iterator[Any]:
    """``module`` and its parts, each once."""
    seen, left = {id(module)}, [module]
    while left:
        each = left.pop()
        yield each
        new = {id(part): part for part in reversed(_parts(each)) if id(part) not in seen}
        seen |= new.keys()
        left += new.values()


_MOST_OF_BATCH = 1000


def _elements(batch: Any) -> int | None:
    """None if it holds more than :data:`_MOST_OF_BATCH` things. Subclasses are looked into as what they derive from."""
    tensor = imported_torch().Tensor
    size, left, looked_at = 0, [batch], 1
    while left:
        each = left.pop()
        kind = type(each)
        inside: Collection[Any] = ()
        if issubclass(kind, tensor):
            # Others stand for what has no elements of its own, such as the fake tensors of a compiler.
            size += tensor.numel(each) if kind.__torch_dispatch__ is tensor.__torch_dispatch__ else 0
        elif kind is str:
            size += len(each)
        elif issubclass(kind, dict):
            inside = dict.values(each)
        elif issubclass(kind, list):
            inside = list.__getitem__(each, slice(_MOST_OF_BATCH + 1))
        elif issubclass(kind, tuple):
            inside = tuple.__getitem__(each, slice(_MOST_OF_BATCH + 1))
        looked_at += len(inside)
        if looked_at > _MOST_OF_BATCH:
            return None
        left += inside
    return size


def _hooks_on(module: Any, ranges: Callable[[], AutomaticRanges]) -> list[Any]:
    if getattr(module, "_compiled_call_impl", None) is not None:
        return [_CompiledCall(module, ranges)]
    # Before the hooks of others: those of FSDP gather the parameters of this call.
    base = imported_torch().nn.Module
    begins = base.register_forward_pre_hook(module, _Hook(ranges, begins=True), prepend=True, with_kwargs=True)
    return [begins, base.register_forward_hook(module, _Hook(ranges))]


class _CompiledCall:
    """Stands around the call of a module that ``module.compile()`` has compiled with the hooks it had then.

    PyTorch copies and saves no compiled call.
    """

    def __init__(self, module: Any, ranges: Callable[[], AutomaticRanges]) -> None:
        self._module = weakref.ref(module)
        call, begin, end = module._compiled_call_impl, _Hook(ranges, begins=True), _Hook(ranges)

        @functools.wraps(call)
        def call_and_annotate(*arguments: Any, **keywords: Any) -> Any:
            begin(module, arguments, keywords)
            try:
                return call(*arguments, **keywords)
            finally:
                end(module)

        module._compiled_call_impl = call_and_annotate

    def remove(self) -> None:
        module = self._module()
        if module is not None:
            call = module._compiled_call_impl
            module._compiled_call_impl = getattr(call, "__wrapped__", call)


def _parts(module: Any) -> list[Any]:
    return [part for part in vars(module).get("_modules", {}).values() if part is not None]


def _is_plain(module: Any) -> bool:
    """Whether it answers as modules of PyTorch do: not without its base class' part, and not as a compiled script."""
    if isinstance(module, imported_torch().jit.ScriptModule) or not {"_parameters", "_modules"} <= vars(module).keys():
        return False
    try:
        return isinstance(module.training, bool)
    except Exception:  # of a property of the program's own
        return False


def _remove_other_hooks(module: Any) -> None:
    """Of a model that was copied while it was watched, or that took over the hooks of a watched one."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = vars(module).get(name, {})
        for key in [
            key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), (nullcontext, _Hook))
        ]:
            del hooks[key]


def _called(modules: Iterable[Any]) -> Iterator[Any]:
    """``modules``; in place of one that has no forward pass, such as a ``ModuleList``, its parts."""
    without = imported_torch().nn.Module.forward
    seen: set[int] = set()
    left = list(modules)[::-1]
    while left:
        module = left.pop()
        if id(module) in seen or not _is_plain(module):
            continue
        seen.add(id(module))
        if type(module).forward is without and "forward" not in vars(module):
            left += reversed(_parts(module))
        else:
            yield module


class _Hook:
    """A hook of one module's calls. Copies of the module, in memory or in a file, have one that does nothing."""

    __slots__ = ("_begins", "_ranges")

    def __init__(self, ranges: Callable[[], AutomaticRanges], *, begins: bool = False) -> None:
        self._ranges, self._begins = ranges, begins

    def __call__(self, module: Any, *given: Any) -> None:
        """``given``: before the call its arguments and keywords."""
        torch = imported_torch()
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if self._begins:
            self._ranges().forward_begins(module, grad=torch.is_grad_enabled(), batch=given)
        else:
            self._ranges().forward_ends(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
