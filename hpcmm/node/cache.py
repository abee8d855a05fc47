"""What outlives a run: compiled ops and generated data sets, in one folder that all nodes share.

And temporary folders, which are for one user alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from stat import S_IWGRP, S_IWOTH

from hpcmm.config.schema import ClusterConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.ownership import Reach, exchangeable, is_closed, other_user, owner_above
from hpcmm.text import visible


def given_cache_dir(cluster: ClusterConfig) -> Path:
    """``cluster.cache_dir``, or the user's own cache folder."""
    return Path(cluster.cache_dir or Path(_users_caches(), "hpcmm")).expanduser().absolute()


def _users_caches() -> str:
    """As https://specifications.freedesktop.org/basedir-spec lays it down: a relative path counts for nothing."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return named if named.startswith("/") else os.path.expanduser("~/.cache")  # noqa: PTH111 -- raises nothing


def cache_dir(cluster: ClusterConfig) -> Path:
    """The given folder, or, if other users can write that, a folder of this user alone in it.

    What is compiled there is loaded into every rank, so that users of one group need a folder each.
    """
    given = given_cache_dir(cluster)
    return given if _is_private(given) else given / _own_name()


def _own_name() -> str:
    return f"hpcmm-{os.geteuid()}"


def _is_private(folder: Path) -> bool:
    try:
        facts = folder.stat()
    except OSError:
        return True  # it is to be made, or will be said to be missing
    return facts.st_uid == os.geteuid() and (not facts.st_mode & (S_IWGRP | S_IWOTH) or is_closed(folder))


def check_cache_dir(cluster: ClusterConfig) -> None:
    """Raises HpcmmError if another user could put a folder of their own in the place of the one that is used."""
    given, used = given_cache_dir(cluster), cache_dir(cluster)
    found, owner, user = exchangeable(used), owner_above(given), other_user(used)
    remedy = "set cluster.cache_dir to a folder of your own"
    if found is not None and found.reach is Reach.everybody:
        problem, remedy = found.why, f"{remedy}, or chmod +t {found.above}"
    elif found is not None and found.reach is Reach.link:
        problem = found.why
    elif owner is not None:
        problem = f"that belongs to user {owner}"
    elif user is not None:
        problem = f"{used} is another user's ({user})"
    else:
        return
    raise HpcmmError(f"The cache folder is {given}, but {problem}, and what lies there would run as you: {remedy}.")


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock file in the cache folder, or in a folder of it, which is made where it is missing.

    Raises HpcmmError if that cannot be written, or is another user's.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        make_folder(lock.parent)
        descriptor = os.open(lock, flags, 0o600)
    except OSError as error:
        raise HpcmmError(
            f"The cache folder {lock.parent} cannot be written ({error.strerror}): "
            "set cluster.cache_dir to a folder that all nodes share and can write."
        ) from error
    with os.fdopen(descriptor, "w") as held:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise HpcmmError(f"{lock} is another user's: set cluster.cache_dir to a folder of your own.")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another job prepares in {lock.parent}; this one waits for it.", flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, which other users cannot write."""
    for above in reversed([each for each in (folder, *folder.parents) if not each.is_dir()]):
        above.mkdir(mode=0o700 if above.name == _own_name() else 0o755, exist_ok=True)


def data_dir(cluster: ClusterConfig) -> Path:
    return cache_dir(cluster) / "data"


def extensions_dir(cluster: ClusterConfig) -> Path:
    """Where compiled ops lie: a folder for each installation that an op is compiled against and linked to."""
    installation = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    built_for = f"torch{version('torch')}-deepspeed{version('deepspeed')}-{python}-{platform.machine()}-{installation}"
    return cache_dir(cluster) / "torch_extensions" / built_for


def make_private_folder(prefix: str, place: Path | None = None, setting: str = "TMPDIR") -> Path:
    """A new folder in ``place``, which ``setting`` named, that nobody else can look into, or exchange for another.

    Raises HpcmmError if others could, for what is written there may be secret, or run; OSError if none can be made.
    """
    place = Path(os.path.realpath(place or tempfile.gettempdir()))
    found = exchangeable(place / prefix)
    if found is not None:
        without = " without the sticky bit" if found.reach is Reach.everybody else ""
        raise HpcmmError(
            f"{setting} is {visible(str(place))}, but {found.why}{without}, so another user could exchange the folders "
            "that are made there: set it to a folder of your own."
        )
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place))


@contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """As :func:`make_private_folder`; it is removed at the end."""
    folder = make_private_folder(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
