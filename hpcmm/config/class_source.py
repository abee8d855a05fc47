"""What the source text of a class tells: its bases and parameters, read with ``ast``. Nothing is imported or run."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from itertools import islice
from pathlib import Path
from typing import Any

from hpcmm.files import entries_of, is_folder_here, read_followed
from hpcmm.resources import ask_for_module

_CHOICE = "Literal"
_PLAIN_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}
_DEEPEST = 20
"""Base classes and re-exports that are followed."""
_LARGEST_BYTES = 10**7
"""Of a source."""
_MOST_LOOKED_AT = 1000
"""Of what lies in a folder, to know whether it is a package."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a class, as its source says."""

    annotation: ast.expr | None
    required: bool
    nullable: bool = False
    """Whether its default is None, whatever its type says."""


@dataclass(frozen=True, slots=True)
class ClassSource:
    """What the source of a class tells without being run."""

    parameters: Mapping[str, Parameter]
    """Of ``__init__``, the class's own or that of its nearest base which has one."""
    takes_any: bool
    """Whether it also takes other keyword arguments, or its ``__init__`` could not be found."""
    bases: frozenset[str]
    """All base classes that were found, as ``package.module.Class``, itself included."""
    attributes: Mapping[str, Any]
    """Class attributes that are plain constants or tuples of them, its own before those of its bases."""
    is_whole: bool
    """Whether every base class was found, so that what is not in ``bases`` is no base."""


def class_source(target: str) -> ClassSource | None:
    """What is known of the class ``package.module.Class``; None if no module or no such class is there."""
    module, _, name = target.rpartition(".")
    ask_for_module(module)
    return _read_class(module, name, _DEEPEST)


def fits(annotation: ast.expr | None, value: Any) -> bool:
    """Whether ``value`` may be of the annotated type. True for types that this does not know."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return fits(annotation.left, value) or fits(annotation.right, value)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return fits(ast.parse(annotation.value, mode="eval").body, value)
        except SyntaxError:  # free text
            return True
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        return _fits_special(annotation.value, annotation.slice, value)
    name = annotation.id if isinstance(annotation, ast.Name) else None
    types = (type(None),) if isinstance(annotation, ast.Constant) else _PLAIN_TYPES.get(name or "", (object,))
    return isinstance(value, types) and not (isinstance(value, bool) and types in ((int,), (int, float)))


def _fits_special(form: ast.Name, content: ast.expr, value: Any) -> bool:
    """As :func:`fits`, of ``form[content]``."""
    if form.id == "Optional":
        return value is None or fits(content, value)
    if form.id == _CHOICE:
        return any(isinstance(each, ast.Constant) and each.value == value for each in _choices(content))
    inner = content if form.id == "list" and isinstance(value, list) else None
    return fits(form, value) and all(fits(inner, each) for each in (value if inner else ()))


def _choices(content: ast.expr) -> list[ast.expr]:
    """The elements of ``Literal[content]``."""
    return content.elts if isinstance(content, ast.Tuple) else [content]


def described(annotation: ast.expr) -> str:
    """An annotation as a message says it: its source, or the values of a ``Literal``."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == _CHOICE:
        return " or ".join(ast.unparse(each) for each in _choices(annotation.slice))
    return ast.unparse(annotation)


def syntax_problem(module: str) -> str | None:
    """What keeps a module's source from being parsed; None if nothing does, or there is none."""
    file = source_file(module)
    if file is None or file.suffix != ".py":
        return None
    try:
        ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"{file} has a syntax error in line {error.lineno}: {error.msg}"
    except (OSError, ValueError) as error:
        return f"{file} cannot be read: {error}"
    return None


def holder_of(package: str) -> Path | None:
    """The folder that a top-level package or module is imported from; None if it is not there as a file or folder."""
    ask_for_module(package)
    spec = _spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:  # also of a package without an __init__.py
        folders = [Path(each) for each in spec.submodule_search_locations]
        return folders[0].resolve().parent if folders and folders[0].is_dir() else None
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


def source_file(module: str) -> Path | None:
    """The file of a module, which is not imported; of a package its ``__init__.py``. None if there is none."""
    ask_for_module(module)
    spec = _spec(module)
    return Path(spec.origin).resolve() if spec is not None and spec.origin and spec.has_location else None


def syntax_tree(script: Path) -> ast.AST:
    """The script's syntax tree; an empty one if it cannot be parsed, which Python itself will say, or is no file."""
    try:
        return ast.parse(read_followed(script, _LARGEST_BYTES))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def holds_python(folder: Path) -> bool:
    """Whether Python files lie in it, or in a folder in it."""
    inside = entries_of(folder, _MOST_LOOKED_AT)
    folders = (entry for entry in inside if is_folder_here(entry))
    return any(entry.suffix == ".py" for entry in inside) or any(
        each.suffix == ".py" for entry in islice(folders, 20) for each in entries_of(entry, _MOST_LOOKED_AT)
    )


@dataclass(frozen=True)
class _ModuleSource:
    """What the source of a module tells: read once, and again if the file changes."""

    tree: ast.Module
    classes: Mapping[str, ast.ClassDef]
    """The module's own; the first of each name."""
    names: Mapping[str, str]
    """What each name stands for that the module imports or gives to a class, as a dotted path."""


def _read_class(module: str, name: str, deepest: int) -> ClassSource | None:
    source = _module_source(module)
    if source is None and is_read_of_torch(module):
        return ClassSource({}, True, frozenset(), {}, is_whole=False)  # there is no PyTorch here
    if source is None or deepest == 0:
        return None
    if name in source.classes:
        return _of_definition(module, source, name, deepest)
    if name in source.names:  # re-exported
        return _read_class(*_halves(source.names[name]), deepest - 1)
    return ClassSource({}, True, frozenset(), {}, is_whole=False) if _may_define(source.tree, name) else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that run when it is imported, those within ``if`` and ``try`` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _may_define(tree: ast.Module, name: str) -> bool:
    """Whether a module gives a name in a way that its source alone does not tell: then a rank will see."""
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return True
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return True
    return False


def _of_definition(module: str, read: _ModuleSource, name: str, deepest: int) -> ClassSource:
    """The class ``name`` of a module, and all that can be found of its bases."""
    node = read.classes[name]
    found: list[ClassSource] = []
    bases, whole = {f"{module}.{name}"}, True
    for base in node.bases:
        target = _dotted(base, read.names)
        source = _read_class(*_halves(target), deepest - 1) if target else None
        bases |= {target} if target else set()
        if source is not None:
            found.append(source)
            bases |= source.bases
        whole &= source.is_whole if source is not None else _is_no_part(target, base)
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if own is not None:
        parameters, takes_any = _parameters(own), own.args.kwarg is not None
    elif any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        inherited = {name: each for source in reversed(found) for name, each in source.parameters.items()}
        parameters, takes_any = inherited | _fields(node), any(source.takes_any for source in found)
    elif found:
        parameters, takes_any = dict(found[0].parameters), found[0].takes_any
    else:
        parameters, takes_any = {}, True
    attributes = {name: value for source in reversed(found) for name, value in source.attributes.items()}
    return ClassSource(parameters, takes_any, frozenset(bases), attributes | _constants(node), whole)


def _is_no_part(target: str | None, base: ast.expr) -> bool:
    """Whether a base class whose source is not read can have no group's base among its own: Python's and torch's."""
    if target is None:
        return isinstance(base, ast.Name) and base.id in vars(builtins)
    if is_read_of_torch(target.rpartition(".")[0]):
        return False
    return target.partition(".")[0] in {"torch", "abc", "typing", "typing_extensions"}


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in node.body:
        if isinstance(each, ast.AnnAssign | ast.Assign) and each.value is not None and _is_constant(each.value):
            target = each.target if isinstance(each, ast.AnnAssign) else each.targets[0]
            if isinstance(target, ast.Name):
                found[target.id] = ast.literal_eval(each.value)
    return found


def _is_constant(value: ast.expr) -> bool:
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return all(isinstance(element, ast.Constant) for element in elements)


def _parameters(function: ast.FunctionDef) -> dict[str, Parameter]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [*[None] * (len(positional) - len(spec.defaults)), *spec.defaults]
    pairs = [*list(zip(positional, defaults, strict=True))[1:], *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    return {argument.arg: _parameter(argument.annotation, default) for argument, default in pairs}


def _parameter(annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    return Parameter(annotation, default is None, isinstance(default, ast.Constant) and default.value is None)


def _fields(node: ast.ClassDef) -> dict[str, Parameter]:
    """Of a dataclass."""
    return {
        each.target.id: _parameter(each.annotation, each.value)
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }


def _imports(module: str, tree: ast.Module) -> dict[str, str]:
    """What each name that a module imports stands for, as a dotted path."""
    package = module if _is_package(module) else module.rpartition(".")[0]
    found: dict[str, str] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {each.asname or each.name: f"{source}.{each.name}" for each in node.names if each.name != "*"}
        elif isinstance(node, ast.Import):
            found |= {each.asname or each.name.split(".")[0]: _bound(each) for each in node.names}
    return found


def _bound(alias: ast.alias) -> str:
    """What ``import a.b`` or ``import a.b as c`` binds its name to."""
    return alias.name if alias.asname else alias.name.partition(".")[0]


def _dotted(base: ast.expr, names: Mapping[str, str]) -> str | None:
    """The dotted path of a base class as it is written."""
    if isinstance(base, ast.Subscript):  # Generic[T]
        return _dotted(base.value, names)
    if isinstance(base, ast.Attribute):
        before = _dotted(base.value, names)
        return f"{before}.{base.attr}" if before else None
    return names.get(base.id) if isinstance(base, ast.Name) else None


def _halves(target: str) -> tuple[str, str]:
    module, _, name = target.rpartition(".")
    return module, name


def _module_source(module: str) -> _ModuleSource | None:
    spec = _spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return _source_in(spec.origin, _changed_ns(spec.origin), module)


def _changed_ns(file: str) -> int:
    """When a file was changed; 0 for one that is not there as such, such as in a zip file."""
    try:
        return Path(file).stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=1000)
def _source_in(file: str, _changed_ns: int, module: str) -> _ModuleSource | None:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    classes: dict[str, ast.ClassDef] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, node)
    return _ModuleSource(tree, classes, _imports(module, tree) | {name: f"{module}.{name}" for name in classes})


def _is_package(module: str) -> bool:
    spec = _spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies. Its packages are not imported, as ``importlib.util.find_spec`` would."""
    top = module.partition(".")[0]
    is_read = top and (top != "torch" or is_read_of_torch(module))
    return _spec_on(module, tuple(sys.path)) if is_read else None


def is_read_of_torch(module: str) -> bool:
    """Whether this is a module of PyTorch whose classes a file may name; others take long, and tell nothing."""
    return f"{module}.".startswith("torch.optim.")


@functools.lru_cache(maxsize=1000)
def _spec_on(module: str, _search_path: tuple[str, ...]) -> ModuleSpec | None:
    top, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(top, None) or importlib.util.find_spec(top)
        name = top
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{name}.{part}"
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    return spec
