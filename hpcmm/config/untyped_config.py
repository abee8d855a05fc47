"""A run's ``config.yaml`` as plain values, for those who read the runs of others and of other versions of hpcmm."""

from __future__ import annotations

from errno import EINVAL
from pathlib import Path
from stat import S_ISREG
from typing import Any

import yaml

MAX_BYTES = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """Of YAML without aliases, which hpcmm never writes: with them a small file can stand for one without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has YAML aliases")
        return super().compose_node(parent, index)


def frozen_text(path: Path) -> str:
    """The text of the configuration in ``path``. Raises OSError or ValueError where there is none to read."""
    there = path.stat()
    if not S_ISREG(there.st_mode):  # to open a pipe would wait for who writes to it
        raise OSError(EINVAL, "it is no file")
    if there.st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def plain_values(text: str) -> dict[str, Any]:
    """What the text of a configuration holds. Raises ValueError, RecursionError or YAMLError where it is none."""
    values = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    if not isinstance(values, dict):
        raise ValueError("it holds no keys")
    return values


def read_frozen_config(path: Path) -> dict[str, Any]:
    """The configuration in ``path``; empty where there is none that can be read, or one beyond :data:`MAX_BYTES`."""
    try:
        return plain_values(frozen_text(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
