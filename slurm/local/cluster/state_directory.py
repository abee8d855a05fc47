"""The one folder that holds everything of a cluster: which one it is, the lock on it, and the record in it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path

from .errors import ClusterError
from .layout import Layout

VARIABLE = "HPCMM_CLUSTER_DIR"
DEFAULT = "/var/lib/hpcmm-cluster"
DEFAULT_PREFIX = "node"
LONGEST = 60
"""Characters; a Unix socket's path may have 107, and Slurm puts folder, node, job and step behind."""

RECORD = "cluster.json"
LOCK = "lock"


def chosen() -> Path:
    """The state directory that the environment names, or the default one.

    Raises ClusterError when Slurm or MariaDB could not work in a folder of that name.
    """
    path = Path(os.environ.get(VARIABLE) or DEFAULT)
    if not re.fullmatch(r"/[A-Za-z0-9_./+-]+", str(path)) or len(str(path)) > LONGEST or ".." in path.parts:
        raise ClusterError(
            f"{VARIABLE} is {str(path)!r}, but must be an absolute path of at most {LONGEST} letters, digits and "
            "_ . / + - only: slurm.conf cannot quote a path, and a socket's path is short."
        )
    return path


def create(root: Path) -> None:
    """Make the directory. Raises ClusterError where that is impossible."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"{root} cannot be made ({error.strerror}); set {VARIABLE} to another path.") from None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the state directory's lock, waiting for whoever has it.

    Raises ClusterError when the directory is not there or is not a cluster's.
    """
    while True:
        _require_ours(root)
        with (root / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_still_at(lock.fileno(), root / LOCK):
                yield
                return


def recorded(root: Path) -> Layout | None:
    """The layout that `up` recorded, or None when no cluster was ever started there."""
    try:
        record = json.loads((root / RECORD).read_text())
        return Layout(root, record["prefix"], IPv4Network(record["subnet"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{root / RECORD} is damaged ({error}); remove the folder and start again.") from None


def is_abandoned(root: Path) -> bool:
    """Whether no cluster of this folder is up, nor is just being started or stopped."""
    try:
        with (root / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            layout = recorded(root)
    except FileNotFoundError:
        return True
    except (OSError, ClusterError):  # somebody holds the lock, or nobody can tell
        return False
    return layout is None or not any(host.is_there() for host in layout.hosts)


def record(layout: Layout) -> None:
    """Write down what `down` must know, before anything is made."""
    text = json.dumps({"prefix": layout.prefix, "subnet": str(layout.subnet)})
    unfinished = layout.root / f"{RECORD}.unfinished"
    unfinished.write_text(text + "\n")
    unfinished.rename(layout.root / RECORD)


def purge(root: Path) -> None:
    """Remove the state directory with its job history and logs."""
    shutil.rmtree(root)


def _require_ours(root: Path) -> None:
    if not root.is_dir():
        raise ClusterError(f"There is no cluster in {root}; start one with slurm/local/up.")
    names = {entry.name for entry in root.iterdir()}
    if names - {LOCK} and RECORD not in names:
        raise ClusterError(f"{root} holds other files than a cluster's; set {VARIABLE} to an empty or new folder.")


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
