"""What ``python -m hpcmm.launch --help`` says: the groups, and each key with the words of its own documentation."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any

from hpcmm.config import schema as run_config
from hpcmm.config.compose import config_groups

SHOWN = {
    "RunConfig": "",
    "TaskConfig": "task.",
    "ClusterConfig": "cluster.",
    "TrainConfig": "train.",
    "ParallelConfig": "parallel.",
    "ProfileConfig": "profile.",
    "LaunchConfig": "launch.",
}
"""The classes whose keys are listed, with the keys' prefix."""
_WIDTH = 34


def groups_help() -> str:
    """A line for each config group with its options."""
    return "\n".join(f"  {name + '=':<12} {', '.join(options)}" for name, options in config_groups().items())


def keys_help() -> str:
    """A line for each key: its name, its default and, where it is documented, what it means."""
    tree = ast.parse(inspect.getsource(run_config))
    said = {node.name: dict(_documented(node)) for node in tree.body if isinstance(node, ast.ClassDef)}
    lines: list[str] = []
    for name, prefix in SHOWN.items():
        lines += [
            f"  {prefix + key.name + _default(key):<{_WIDTH}} {said[name].get(key.name, '')}".rstrip()
            for key in fields(getattr(run_config, name))
            if not is_dataclass(key.default_factory)
        ]
    return "\n".join(lines)


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Fields that a string follows, with its words."""
    for statement, after in itertools.pairwise(node.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            yield statement.target.id, " ".join(str(after.value.value).replace("``", "").split())


def _default(field: Field[Any]) -> str:
    default = field.default
    if default is NO_DEFAULT or default == run_config.MISSING:
        return ""
    return f"={'null' if default is None else str(default).lower() if isinstance(default, bool) else default}"
