"""What outlives a run: compiled ops and generated data sets, in one folder that all nodes share."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import platformdirs

from hpcmm.config.schema import ClusterConfig


def cache_dir(cluster: ClusterConfig) -> Path:
    """``cluster.cache_dir``, or the user's own cache folder."""
    return Path(cluster.cache_dir or platformdirs.user_cache_dir("hpcmm", appauthor=False)).expanduser().absolute()


def data_dir(cluster: ClusterConfig) -> Path:
    return cache_dir(cluster) / "data"


def extensions_dir(cluster: ClusterConfig) -> Path:
    """Where compiled ops lie: a folder for each installation that an op is compiled against and linked to."""
    installation = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    built_for = f"torch{version('torch')}-deepspeed{version('deepspeed')}-{python}-{platform.machine()}-{installation}"
    return cache_dir(cluster) / "torch_extensions" / built_for
