"""A run's ``config.yaml`` as plain values, for those who read the runs of others and of other versions of hpcmm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpcmm.files import MOST_BYTES, read_text

VERSION = 2
"""Of the files that are written today; a file that names none is of version 1."""
VERSION_KEY = "version"
MAX_BYTES = MOST_BYTES


class _PlainLoader(yaml.SafeLoader):
    """Of YAML without aliases, which hpcmm never writes: with them a small file can stand for one without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has YAML aliases")
        return super().compose_node(parent, index)


def plain_values(text: str) -> dict[str, Any]:
    """What the text of a configuration holds. Raises ValueError, RecursionError or YAMLError where it is none."""
    values = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
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


def read_untyped_config(path: Path) -> dict[str, Any]:
    """The configuration in ``path``; empty if there is none that can be read, or one beyond :data:`MAX_BYTES`.

    One of a later version comes as it is: most keys stay what they are.
    """
    try:
        values = plain_values(read_text(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    try:
        return values_of_today(values)
    except ValueError:
        return values
