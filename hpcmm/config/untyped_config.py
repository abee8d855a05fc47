"""A run's ``config.yaml`` as plain values, for those who read the runs of others and of other versions of hpcmm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpcmm.files import MOST_BYTES, read_checked

VERSION = 2
"""Of the files that are written today; a file that names none is of version 1."""
VERSION_KEY = "version"
_MOST_DEPTH, _MOST_VALUES, _MOST_DIGITS, _MOST_SHOWN = 100, 100_000, 100, 60
MAX_BYTES = MOST_BYTES


class _PlainLoader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Of numbers as a configuration has them: those of many digits, or to the base 60, take long to compute."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(super().construct_yaml_int(_short(node)))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(super().construct_yaml_float(_short(node)))


def _short(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > _MOST_DIGITS:
        raise yaml.YAMLError("it has a number of too many digits")
    return node


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)


def _refuse_traps(text: str) -> None:
    """Raises YAMLError for what takes its reader much longer than its size says, none of which hpcmm writes.

    With aliases a small file can stand for one without end.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, _PlainLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has YAML aliases")
        if depth > _MOST_DEPTH or count > _MOST_VALUES:
            raise yaml.YAMLError("it has more values, or values within values, than expected")


_LONG = re.compile(rf"!|[0-9a-fA-F_:.]{{{_MOST_DIGITS},}}")
_NUMBER = re.compile(r"[-+]?(?:[0-9_:.]+(?:[eE][-+]?[0-9_]+)?|0[xX][0-9a-fA-F_]+)")


def refuse_traps_of_own(text: str) -> None:
    """Raises YAMLError for what a file of a user's own cannot mean, and its reader would work on without end."""
    refuse_endless_aliases(text)
    if not _LONG.search(text):
        return
    for event in yaml.parse(text, _PlainLoader):
        if not isinstance(event, yaml.ScalarEvent) or len(event.value) <= _MOST_DIGITS:
            continue
        is_number = event.implicit[0] and _NUMBER.fullmatch(event.value)
        mark = event.start_mark
        if mark is not None and (is_number or (event.tag or "").endswith((":int", ":float"))):
            key = text.split("\n", mark.line + 1)[mark.line][: mark.column].strip(" \t-:{[,")[-_MOST_SHOWN:]
            said = f"{key} is a number" if key else "there is a number"
            raise yaml.YAMLError(
                f"line {mark.line + 1}: {said} of {len(event.value)} characters: write {_MOST_DIGITS} at most"
            )


def refuse_endless_aliases(text: str) -> None:
    """Raises YAMLError if a file of a user's own stands, by its aliases, for far more values than it holds itself."""
    if "*" not in text:
        return
    sizes: dict[str, int] = {}
    above: list[tuple[str | None, int]] = []
    """Of each collection that is open its anchor, and the values in it so far."""
    for event in yaml.parse(text, _PlainLoader):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            if len(above) > _MOST_DEPTH:
                raise yaml.YAMLError("it has more values within values than expected")
            above.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = above.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in above):
                raise yaml.YAMLError(f"its alias *{anchor} stands for what it lies in")
            size, anchor = sizes.get(str(anchor), 1), None
        if size and anchor is not None:
            sizes[anchor] = size
        if size and above:
            above[-1] = (above[-1][0], above[-1][1] + size)
        if size > _MOST_VALUES or (above and above[-1][1] > _MOST_VALUES):
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")


def plain_values(text: str) -> dict[str, Any]:
    """What the text of a configuration holds. Raises ValueError or YAMLError where it is none."""
    _refuse_traps(text)
    try:
        values = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a tag on a value that it does not fit
        raise ValueError(f"it has a value that cannot be understood: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("it holds no keys")
    return values


def values_of_today(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration of this or an earlier version, under today's keys and without the version.

    Raises ValueError for a later version, and for what is no version.
    """
    version = values.get(VERSION_KEY, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"its version is {version!r:.40}, which is no version")
    if version > VERSION:
        raise ValueError(f"it is of version {version}, and this hpcmm reads up to version {VERSION}")
    values = {key: value for key, value in values.items() if key != VERSION_KEY}
    return _from_version_1(values) if version == 1 else values


_WORKLOADS_OF_1 = {"anomaly": "hpcmm.workloads.anomaly.workload.AnomalyWorkload"}
_OF_ANOMALY_ALONE = (
    "words_learning_rate", "focal_gamma", "focal_alpha", "focal_weight", "dice_weight", "text_weight",
)  # fmt: skip


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew one workload, and gave its keys to every run, scripts of the user's too."""
    task, train = values.get("task"), values.get("train")
    if not isinstance(task, dict):
        return values
    target = _WORKLOADS_OF_1.get(str(task.get("name")))
    if target is not None:
        return {**values, "task": {**task, "_target_": target}}
    kept = {key: value for key, value in values.items() if key not in ("model", "data")}
    if isinstance(train, dict):
        kept["train"] = {key: value for key, value in train.items() if key not in _OF_ANOMALY_ALONE}
    return kept


def trains_a_workload(values: Mapping[str, Any]) -> bool:
    """Whether the run is a workload's, whose ranks note their steps; not so a user's script or function."""
    task = values.get("task")
    return not isinstance(task, dict) or task.get("name") not in ("script", "function")


def read_untyped_config(path: Path, *, own: bool = False) -> dict[str, Any]:
    """The configuration in ``path``; empty if there is none that can be read, or one beyond :data:`MAX_BYTES`.

    One of a later version comes as it is: most keys stay what they are. ``own``: empty also if another user than this
    one and root owns the file or its folder, or could write to it.
    """
    try:
        text, writer = read_checked(path, MAX_BYTES)
        values = {} if own and writer is not None else plain_values(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    try:
        return values_of_today(values)
    except ValueError:
        return values
