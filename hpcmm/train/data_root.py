"""Where a run's images lie."""

from __future__ import annotations

from pathlib import Path

from hpcmm.bootstrap.cache import data_dir
from hpcmm.config import RunConfig
from hpcmm.data.standins import default_root, generate


def data_root(config: RunConfig) -> Path:
    """``data.root``, or the stand-ins' folder in the cache."""
    if config.data.root is not None:
        return Path(config.data.root).expanduser()
    return default_root(config.data, config.train.seed, data_dir(config.cluster))


def ensure_data(config: RunConfig) -> None:
    """Make the stand-ins where the configuration asks for them and they are not there."""
    if not config.data.generate:
        return
    root = data_root(config)
    if not root.exists():
        print(f"Making the stand-in images in {root}.", flush=True)
    generate(root, config.data, config.train.seed)
