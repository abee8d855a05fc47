"""A run's ``config.yaml`` as plain values, for those who read the runs of others and of other versions of hpcmm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """Of YAML without aliases, which hpcmm never writes: with them a small file can stand for one without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases")
        return super().compose_node(parent, index)


def read_frozen_config(path: Path) -> dict[str, Any]:
    """The configuration in ``path``; empty where there is none that can be read, or one beyond :data:`MAX_BYTES`."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:  # to open a pipe would wait for who writes to it
            return {}
        config = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}
