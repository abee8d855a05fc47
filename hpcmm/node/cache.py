"""What outlives a run: compiled ops and generated data sets, in one folder that all nodes share."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import platformdirs

from hpcmm.config.schema import ClusterConfig
from hpcmm.errors import HpcmmError


def cache_dir(cluster: ClusterConfig) -> Path:
    """``cluster.cache_dir``, or the user's own cache folder."""
    return Path(cluster.cache_dir or platformdirs.user_cache_dir("hpcmm", appauthor=False)).expanduser().absolute()


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock file in the cache folder, or in a folder of it, which is made where it is missing.

    Raises HpcmmError if that cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
    except OSError as error:
        raise HpcmmError(
            f"The cache folder {lock.parent} cannot be written ({error.strerror}): "
            "set cluster.cache_dir to a folder that all nodes share and can write."
        ) from error
    with held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def data_dir(cluster: ClusterConfig) -> Path:
    return cache_dir(cluster) / "data"


def extensions_dir(cluster: ClusterConfig) -> Path:
    """Where compiled ops lie: a folder for each installation that an op is compiled against and linked to."""
    installation = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    built_for = f"torch{version('torch')}-deepspeed{version('deepspeed')}-{python}-{platform.machine()}-{installation}"
    return cache_dir(cluster) / "torch_extensions" / built_for
