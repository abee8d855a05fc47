"""What overrides are read in: the folders with config groups, and the keys that the chosen task has."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

from hpcmm.config.keys import parts_of, type_hints
from hpcmm.config.parts import TARGET, folders_of, options_of, read_config_yaml
from hpcmm.config.schema import SCRIPT, RunConfig
from hpcmm.config.workload import Workload, load_workload
from hpcmm.errors import HpcmmError

CONFIG_DIR = "launch.config_dir"
MOST_ENTRIES = 10_000
DEEPEST = 3
"""Levels of config groups below a group, such as the one of ``model/decoder``."""


@dataclass(frozen=True)
class ConfigSpace:
    """The groups and keys that a run can have."""

    folders: tuple[Path, ...]
    """Folders with config groups: hpcmm's own, then the user's."""
    schema: type[RunConfig]

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """The groups, such as ``model`` and ``model/decoder``, with their options, both sorted."""
        found: dict[str, set[str]] = {}
        for root in self.folders:
            for group, options in _groups_in(root):
                found.setdefault(group, set()).update(options)
        return {group: sorted(found[group]) for group in sorted(found)}

    def type_of(self, key: str) -> Any:
        """The type of a key, that of the whole dictionary for a key in one, None for an unknown key."""
        node: Any = self.schema
        for part in key.split("."):
            if get_origin(node) is dict:
                break
            node = type_hints(node).get(part) if isinstance(node, type) and is_dataclass(node) else None
        return node

    def field_of(self, key: str) -> tuple[str, ...]:
        """The field that ``key`` lies in: itself, or the dictionary or the part that it is a key of."""
        node: Any = self.schema
        path: list[str] = []
        for part in key.split("."):
            if not (isinstance(node, type) and is_dataclass(node)):
                break
            node = type_hints(node)[part]
            path.append(part)
        return tuple(path)

    def is_part(self, key: str) -> bool:
        """Whether ``key``, or the key that it lies in, holds a part."""
        return any(key == part or key.startswith(f"{part}.") for part, _ in parts_of(self.schema))

    def check_key(self, key: str) -> None:
        """Raises HpcmmError, naming the valid keys, if there is no such key."""
        node: Any = self.schema
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not is_dataclass(node):
                break
            assert isinstance(node, type)
            if part not in type_hints(node):
                raise HpcmmError(self.unknown(".".join(parts[:depth]), part))
            node = type_hints(node)[part]

    def unknown(self, parent: str, part: str) -> str:
        """A sentence on the key ``part`` of the section ``parent``, which has no such key."""
        node: Any = self.schema
        for each in filter(None, parent.split(".")):
            node = type_hints(node)[each]
        valid = [field.name for field in fields(node) if field.name[0] != "_"] if is_dataclass(node) else []
        valid += [] if parent else list(self.groups)
        prefix = f"{parent}." if parent else ""
        names = sorted({prefix + name for name in valid})
        close = [name for name in difflib.get_close_matches(prefix + part, names, n=2) if name != prefix + part][:1]
        if not parent and part in self.groups:
            return (
                f"{part} is a config group, but the chosen task has no such key: choose a task that has it, or leave "
                f"{part} out."
            )
        hint = f"did you mean {close[0]}? " if close else ""
        where = f"Keys of {parent}" if parent else "Keys"
        return f"{prefix}{part} is not a configuration key: {hint}{where}: {', '.join(names)}."


def space_of(overrides: Sequence[str]) -> ConfigSpace:
    """The space of a run, from ``launch.config_dir=`` and ``task=`` among its overrides and in its experiment.

    Raises HpcmmError if the folder or the task's class is not there.
    """
    given = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    config_dir = given.get(CONFIG_DIR) or None
    folders = folders_of(config_dir)
    if config_dir and not folders[-1].is_dir():
        raise HpcmmError(f"{CONFIG_DIR} is {config_dir}, but there is no such folder.")
    _refuse_same_names(folders)
    task = given.get("task") or _task_of(folders, given.get("experiment")) or _task_of(folders, None) or SCRIPT
    if re.search(r"[,(]", task):
        raise HpcmmError(
            f"task={task} cannot be swept, since each task has keys of its own: launch one after the other."
        )
    return ConfigSpace(folders, _schema_of(folders, task))


def shipped_workloads() -> list[Workload]:
    """Every workload that a task of hpcmm's own ``conf/task`` names."""
    folders = folders_of(None)
    targets = [_target_of(folders, task) for task in options_of("task", folders)]
    return [load_workload(target) for target in targets if target is not None]


def _task_of(folders: Sequence[Path], experiment: str | None) -> str | None:
    """The task that ``conf/config.yaml`` chooses, or that an experiment chooses instead."""
    name = "config.yaml" if experiment is None else f"experiment/{experiment}.yaml"
    for entry in _yaml_of(folders, name).get("defaults") or []:
        if isinstance(entry, dict):
            for group, option in entry.items():
                if str(group).removeprefix("override ").lstrip("/") == "task":
                    return str(option)
    return None


def _schema_of(folders: Sequence[Path], task: str) -> type[RunConfig]:
    target = _target_of(folders, task)
    return RunConfig if target is None else load_workload(target).schema


def _target_of(folders: Sequence[Path], task: str) -> str | None:
    """The class of the workload that ``conf/task/<task>.yaml`` names; None for a script or a function."""
    values = _yaml_of(folders, f"task/{task}.yaml")
    section = values.get("task") if isinstance(values.get("task"), dict) else values
    target = section.get(TARGET) if isinstance(section, dict) else None
    return None if target is None else str(target)


def _yaml_of(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """The values of a file of the config folders; empty if there is none, which Hydra says better."""
    for folder in folders:
        if ".." not in name and (file := folder / name).is_file():
            return read_config_yaml(file)
    return {}


def _refuse_same_names(folders: Sequence[Path]) -> None:
    """A user's file that has the name of one of hpcmm's own would silently not be read."""
    own, *others = folders
    for folder in others:
        names = [f"{group}/{option}.yaml" for group, options in _groups_in(folder) for option in options]
        for name in ("config.yaml", *names):
            if (folder / name).is_file() and (own / name).is_file():
                raise HpcmmError(f"{folder / name}: hpcmm has a {name} of its own, so give yours another name.")


def _groups_in(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each config group below ``root`` with its options. Raises HpcmmError for a folder that holds far more."""
    seen = 0
    for folder, folders, files in os.walk(root):
        seen += len(folders) + len(files)
        if seen > MOST_ENTRIES:
            raise HpcmmError(
                f"{CONFIG_DIR} is {root}, which holds more than {MOST_ENTRIES} files: name a folder with config groups."
            )
        group = Path(folder).relative_to(root).as_posix()
        folders[:] = [each for each in folders if not each.startswith(".")] if group.count("/") < DEEPEST else []
        if group != ".":
            yield group, [file.removesuffix(".yaml") for file in files if file.endswith(".yaml")]


def groups_help(space: ConfigSpace) -> str:
    """A line for each config group with its options."""
    return "\n".join(f"  {name + '=':<12} {', '.join(options)}" for name, options in space.groups.items())
