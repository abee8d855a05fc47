#!/usr/bin/env python3
"""Measures of the toolkit's layout, workloads aside. Prints a line a measure, and fails for each one above its limit.

scripts/measure_layout.py [PACKAGE_DIR]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LIMITS = {
    "modules": 226,
    "modules with one importer, percent": 25,
    "longest import chain": 18,
    "lines of the longest module": 450,
    "functions of more than 60 lines": 0,
}
"""The most that each may be. An empty ``__init__.py`` is no module; imports within functions count as imports, and
those for types alone do not."""
LEFT_OUT = "workloads"


def modules_of(package: Path) -> dict[str, ast.Module]:
    """The syntax tree of each module, by its dotted name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        text = file.read_text(encoding="utf-8")
        if LEFT_OUT not in parts and text:
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(text)
    return found


def imported_by(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> set[str]:
    """The modules of the package that a module imports."""
    found: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                found.add(member if member in modules else node.module)
    return {each for each in found if each in modules and each != name}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All of a syntax tree but what stands behind ``if TYPE_CHECKING``, which is never imported."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _statements(child)


def long_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
            yield node


def measure(package: Path) -> dict[str, int]:
    """The measures, by the names in LIMITS."""
    modules = modules_of(package)
    imports = {name: imported_by(name, tree, modules) for name, tree in modules.items()}
    importers = [sum(name in each for each in imports.values()) for name in modules]

    depths: dict[str, int] = {}
    longest = max(_chain(name, imports, depths, frozenset()) for name in modules)
    return {
        "modules": len(modules),
        "modules with one importer, percent": round(100 * importers.count(1) / len(modules)),
        "longest import chain": longest,
        "lines of the longest module": max(_lines(tree) for tree in modules.values()),
        "functions of more than 60 lines": sum(1 for tree in modules.values() for _ in long_functions(tree)),
    }


def _chain(name: str, imports: dict[str, set[str]], depths: dict[str, int], before: frozenset[str]) -> int:
    """Modules in the longest chain of imports that begins with ``name``; a cycle is followed once."""
    if name not in depths:
        within = before | {name}
        # Sorted, for the way around a cycle depends on the order.
        ways = sorted(imports[name] - within)
        depths[name] = 1 + max((_chain(each, imports, depths, within) for each in ways), default=0)
    return depths[name]


def _lines(tree: ast.Module) -> int:
    return max((node.end_lineno or 0 for node in tree.body), default=0)


def main(arguments: list[str]) -> int:
    package = Path(arguments[0] if arguments else Path(__file__).parents[1] / "hpcmm").resolve()
    too_large = False
    for name, value in measure(package).items():
        above = value > LIMITS[name]
        too_large |= above
        print(f"layout: {name}: {value} (at most {LIMITS[name]})" + (", which is too many" if above else ""))
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
