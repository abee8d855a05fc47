"""Whose a folder is: what another user owns, or could exchange, is shown as theirs and decides nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from stat import S_ISLNK, S_ISVTX, S_IWGRP, S_IWOTH

from hpcmm.errors import HpcmmError
from hpcmm.files import other_writer
from hpcmm.text import visible

_WHOLE_RANGE = ["0", "0", str(2**32 - 1)]


def is_mine(folder: Path) -> bool:
    """Whether a folder is there, and this user's, and so is the link, if it is one."""
    return _uid_of(folder) == os.geteuid()


def is_trusted(folder: Path) -> bool:
    """As :func:`is_mine`, but what root owns counts too."""
    return _uid_of(folder) in {0, os.geteuid()}


def other_user(folder: Path) -> str | None:
    """The name of the other user whose folder, or link to one, this is; None if it is this user's, or not there."""
    uid = _uid_of(folder)
    return None if uid in {None, os.geteuid()} else name_of(uid)


def _uid_of(folder: Path) -> int | None:
    """Of a link, or one to the folder above (a sweep's), its own unless it is root's or this user's.

    Whoever owns a link chooses the folder.
    """
    try:
        above, own, there = folder.parent.lstat(), folder.lstat(), folder.stat()
    except (OSError, ValueError):
        return None
    links = [each.st_uid for each in (above, own) if S_ISLNK(each.st_mode)]
    return next((uid for uid in links if uid not in {0, os.geteuid()}), there.st_uid)


def name_of(uid: int) -> str:
    """A user's name; the number if there is none."""
    import pwd  # noqa: PLC0415 -- seldom needed, and may ask a server

    try:
        return visible(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return str(uid)


def require_mine(folder: Path, refused: str) -> None:
    """Raises HpcmmError, whose sentence ends in ``refused``, if another user owns a run's folder or could write it."""
    user = other_user(folder)
    if user is not None:
        raise HpcmmError(f"{visible(str(folder))} is another user's ({user}): {refused}.")
    if other_writer(folder) is not None:
        raise HpcmmError(
            f"{visible(str(folder))} can be written by other users, so it is not acted upon: take it for yourself "
            f"alone (chmod go-w) if you trust what is in it."
        )


def is_link(path: Path) -> bool:
    """Whether ``path`` is a link; False also if that cannot be seen."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


class Reach(IntEnum):
    """Who could exchange a folder for another."""

    owner = 1
    """Another user, who owns a folder above it."""
    group = 2
    """The members of a group, who can write a folder above it."""
    everybody = 3


@dataclass(frozen=True, slots=True)
class Exchangeable:
    """That a folder can be exchanged."""

    reach: Reach
    above: Path
    """The folder above that allows it."""
    uid: int
    """Who owns that."""

    @property
    def why(self) -> str:
        """As the middle of a sentence."""
        above = visible(str(self.above))
        if self.reach is Reach.owner:
            return f"{above} belongs to user {name_of(self.uid)}"
        return f"{above} can be written by {'everybody' if self.reach is Reach.everybody else 'its group'}"


def exchangeable(folder: Path) -> Exchangeable | None:
    """The worst way in which another user than root could put a folder of their own in the place of ``folder``.

    Whoever can write the folder above can rename what lies in it, unless the sticky bit (as of /tmp) forbids it; its
    owner always can. Folders that are not there yet are passed over. None if nobody can.
    """
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 -- links stay, for who can exchange one counts too
    above = dict.fromkeys([*absolute.parents, *Path(os.path.realpath(folder)).parents])
    found = [each for parent in above if (each := _allowed_by(parent)) is not None]
    return max(found, key=lambda each: each.reach, default=None)


def _allowed_by(parent: Path) -> Exchangeable | None:
    try:
        facts = parent.stat()
    except OSError:
        return None
    sticky = facts.st_mode & S_ISVTX
    reach = None
    if facts.st_mode & S_IWOTH and not sticky:
        reach = Reach.everybody
    elif facts.st_mode & S_IWGRP and not sticky:
        reach = Reach.group
    elif facts.st_uid not in {0, os.geteuid()} and not _has_no_name_here(facts.st_uid):
        reach = Reach.owner
    return None if reach is None else Exchangeable(reach, parent, facts.st_uid)


def _has_no_name_here(uid: int) -> bool:
    """Whether this stands for the users that a container's user namespace does not know, root among them."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
        mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False
    return uid == overflow and mapped != _WHOLE_RANGE
