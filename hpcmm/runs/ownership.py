"""Whose a folder is: what another user owns, or could exchange, is shown as theirs and decides nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISVTX, S_IWGRP, S_IWOTH

from hpcmm.errors import HpcmmError
from hpcmm.files import access_list, group_can_write, is_known_owner, name_of, other_writer, others_write, trusted_above
from hpcmm.text import visible

_NOT_THERE = "{} is not there, or closed to you."


def is_mine(folder: Path) -> bool:
    """Whether a folder is there, and this user's, and so is the link, if it is one."""
    place = settle(folder)
    return place is not None and place.uid == os.geteuid()


def is_trusted(folder: Path) -> bool:
    """As :func:`is_mine`, but what root owns counts too."""
    place = settle(folder)
    return place is not None and place.uid in {0, os.geteuid()}


def other_user(folder: Path) -> str | None:
    """The name of the other user whose folder, or link to one, this is; None if it is this user's, or not there.

    If it is closed to us, or a link that leads nowhere, its own owner tells.
    """
    place = settle(folder)
    try:
        uid = folder.lstat().st_uid if place is None else place.uid
    except (OSError, ValueError):
        return None
    return None if uid == os.geteuid() else name_of(uid)


def require_mine(folder: Path, refused: str) -> Path:
    """The real path of a run's folder, for all that is done with it: the name given may lead elsewhere by then.

    Raises HpcmmError, whose sentence ends in ``refused``, if another user owns it or could write it, or everybody could
    exchange it.
    """
    shown, place = visible(str(folder)), settle(folder)
    if place is None:
        raise HpcmmError(_NOT_THERE.format(shown))
    if place.uid != os.geteuid():
        raise HpcmmError(f"{shown} is another user's ({name_of(place.uid)}): {refused}.")
    if others_write(place.facts):
        raise HpcmmError(
            f"{shown} can be written by other users, so it is not acted upon: take it for yourself "
            f"alone (chmod go-w) if you trust what is in it."
        )
    found = place.exchangeable
    if found is not None and found.reach >= Reach.everybody:
        raise HpcmmError(
            f"{found.why}, so another user could put a folder in the place of {shown}, and it is not acted upon: "
            f"chmod +t {visible(str(found.above))} prevents it."
        )
    return place.real


def refuse_folder_of_others(folder: Path) -> None:
    """Raises HpcmmError if the folder that ``--out`` names is another user's, or named by another user's link."""
    if not is_trusted(folder) and (user := other_user(folder)) is not None:
        raise HpcmmError(f"{visible(str(folder))} is another user's ({user}): name a folder of your own with --out.")


def own_output_folder(folder: Path) -> Path:
    """Make the folder that ``--out`` names, unless it is there; returns its real path.

    Raises HpcmmError as :func:`refuse_folder_of_others`; OSError.
    """
    refuse_folder_of_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_folder_of_others(folder)
    return Path(os.path.realpath(folder)) if (place := settle(folder)) is None else place.real


def real_and_trusted(folder: Path, *inside: str) -> tuple[Path, str]:
    """The real path of a folder whose files run as code, and why they must not, else an empty text.

    That another user could write it or what lies ``inside`` of it, if that is there, or that everybody could exchange
    it. Raises HpcmmError if it is not there, or that cannot be seen.
    """
    shown, place = visible(str(folder)), settle(folder)
    if place is None:
        raise HpcmmError(_NOT_THERE.format(shown))
    if place.uid not in {0, os.geteuid()}:
        return folder, f"{shown} can be written by another user"
    found = place.exchangeable
    if found is not None and found.reach >= Reach.everybody:
        return place.real, found.why
    try:
        writer = other_writer(place.real, *(each for name in inside if (each := place.real / name).exists()))
    except OSError as error:
        raise HpcmmError(f"{shown} cannot be looked into ({error.strerror}).") from error
    return place.real, "" if writer is None else f"{visible(str(writer))} can be written by another user"


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
    link = 4
    """Another user, who owns a link on the way to it."""


@dataclass(frozen=True)
class Exchangeable:
    """That a folder can be exchanged."""

    reach: Reach
    above: Path
    """The folder above, or the link, that allows it."""
    uid: int
    """Who owns that."""

    @property
    def why(self) -> str:
        """As the middle of a sentence."""
        above = visible(str(self.above))
        if self.reach is Reach.link:
            return f"{above} is a link of user {name_of(self.uid)}"
        if self.reach is Reach.owner:
            return f"{above} belongs to user {name_of(self.uid)}"
        if self.reach is Reach.everybody:
            return f"{above} can be written by everybody"
        by_list = ", or by those that its access control list names" if access_list(self.above) else ""
        return f"{above} can be written by its group{by_list}"


def _lets_nobody_in(facts: os.stat_result) -> bool:
    return facts.st_uid == os.geteuid() and facts.st_mode & 0o077 == 0


@dataclass(frozen=True)
class _Step:
    """A name that is looked up on the way to a folder."""

    path: Path
    uid: int | None
    """Who owns the link of that name; None if it is no link, or not there."""
    above: os.stat_result
    """The facts of the folder that holds it."""
    is_closed: bool
    """Whether other users cannot come to that folder."""
    is_named: bool
    """Whether it is the folder's own name as it was given, or that of the one above it (a sweep's)."""


@dataclass(frozen=True)
class Place:
    """Where a path led, as one walk found it."""

    real: Path
    """Without links: it stays the same folder, but for those that :attr:`exchangeable` names."""
    facts: os.stat_result
    steps: Sequence[_Step]

    @property
    def uid(self) -> int:
        """Whose it is: of a link, its owner's unless that is root or this user, for they choose the folder.

        So does who owns one further above, if they could exchange it.
        """
        named = (step.uid for step in self.steps if step.is_named and step.uid is not None)
        foreign = next((uid for uid in named if uid not in {0, os.geteuid()}), None)
        if foreign is None and (found := next(filter(None, map(_chosen_by, self.steps)), None)) is not None:
            foreign = found.uid
        return self.facts.st_uid if foreign is None else foreign

    @property
    def exchangeable(self) -> Exchangeable | None:
        """As :func:`exchangeable`."""
        return _worst_of(self.steps)


def settle(folder: Path) -> Place | None:
    """Where a path leads now. Whoever acts on it uses the real path; None if nothing is there, or it is closed."""
    steps, found = _walk(folder)
    return None if found is None else Place(Path(found[0]), found[1], steps)


def exchangeable(folder: Path) -> Exchangeable | None:
    """The worst way in which another user than root could put a folder of their own in the place of ``folder``.

    Whoever can write the folder above can rename what lies in it, unless the sticky bit (as of /tmp) forbids it; its
    owner always can. Folders that are not there yet are passed over. None if nobody can.
    """
    return _worst_of(_walk(folder)[0])


def _worst_of(steps: Sequence[_Step]) -> Exchangeable | None:
    found = [each for step in steps for each in (_allowed_by(step), _chosen_by(step)) if each is not None]
    return max(found, key=lambda each: each.reach, default=None)


_MOST_LINKS = 40
"""On one path, as for Linux."""
_TO_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def _walk(folder: Path) -> tuple[list[_Step], tuple[str, os.stat_result] | None]:
    """The way of a path, link by link, up to what is not there; and what it leads to, without links.

    Each folder is looked up in the one that was opened before: a path would be followed anew for each question, and
    lead elsewhere if another user exchanged a part of it meanwhile.
    """
    given = [name for name in str(folder.absolute()).split("/") if name not in {"", "."}]
    names = [(name, place >= len(given) - 2) for place, name in enumerate(given)][::-1]
    steps: list[_Step] = []
    links = 0
    here = os.open("/", _TO_WALK)  # one folder is open at a time: another user's link may name any number of them
    way = [("/", os.fstat(here), False)]
    try:
        while names:
            name, is_named = names.pop()
            above, above_facts, closed = way[-1]
            path = f"{above.rstrip('/')}/{name}"
            try:
                found = _look_up(name, here)
            except (OSError, ValueError):
                steps.append(_Step(Path(path), None, above_facts, closed, is_named))
                return steps, None
            facts = os.fstat(found)
            text = os.readlink("", dir_fd=found) if S_ISLNK(facts.st_mode) else None
            if text is None:
                os.close(here)
                here = found
                if name == "..":
                    way = way[:-1] or way
                    if not os.path.samestat(facts, way[-1][1]):  # it was moved meanwhile
                        return steps, None
                    continue
            else:
                os.close(found)
            steps.append(_Step(Path(path), None if text is None else facts.st_uid, above_facts, closed, is_named))
            if text is None:
                way.append((path, facts, closed or _lets_nobody_in(facts)))
                continue
            links += 1
            if links > _MOST_LINKS:
                return steps, None
            names += [(part, False) for part in text.split("/")[::-1] if part not in {"", "."}]
            if text.startswith("/"):
                os.close(here)
                here = os.open("/", _TO_WALK)
                way = way[:1]
    finally:
        os.close(here)
    return steps, (way[-1][0], way[-1][1])


def _look_up(name: str, above: int) -> int:
    try:
        return os.open(name, _TO_WALK | os.O_DIRECTORY, dir_fd=above)  # which mounts it, if it is to be
    except NotADirectoryError:
        return os.open(name, _TO_WALK, dir_fd=above)


def owner_above(folder: Path) -> str | None:
    """The name of the user who owns ``folder`` and could exchange what is in it; None if that is not to be feared."""
    try:
        uid = folder.stat().st_uid
    except OSError:
        return None
    return None if is_known_owner(uid) else name_of(uid)


def check_runs_root(run: Path, *, again: bool = False, known: Exchangeable | None = None) -> Exchangeable | None:
    """Say who could exchange the directory of a new run before its job starts, and return that.

    ``again``: once the folders above are made, in which another user may have come first; ``known``: what was said.
    Raises HpcmmError if everybody could, or the owner of the folder that it is made in or of a link on the way there,
    or, when asked again, anybody who was not known.
    """
    found, runs_root = exchangeable(run), run.parent
    owner = owner_above(runs_root)
    changed = found is not None and again and found != known
    if owner is not None or changed or (found is not None and found.reach >= Reach.everybody):
        why = f"it belongs to user {owner}" if found is None or owner is not None else found.why
        is_open = found is not None and owner is None and found.reach is Reach.everybody
        sticky = f", or chmod +t {visible(str(found.above))}" if found is not None and is_open else ""
        raise HpcmmError(
            f"runs_root is {visible(str(runs_root))}, but {why}: another user could put a run in the place of yours, "
            f"and its script would run as you. Set runs_root to a folder of your own{sticky}."
        )
    if found is not None and not again:
        remedy = f": chmod +t {visible(str(found.above))} prevents it" if found.reach is Reach.group else ""
        said = f"{found.why}, so another user could put a run in the place of this one before its job starts{remedy}."
        print(f"hpcmm: {said}", file=sys.stderr)
    return found


def is_closed(folder: Path) -> bool:
    """Whether other users cannot come to ``folder``: it, or a folder above, is this user's and lets nobody else in."""
    try:
        real = Path(os.path.realpath(folder))
        return any(_lets_nobody_in(each.stat()) for each in (real, *real.parents) if each.exists())
    except OSError:
        return False


def _chosen_by(step: _Step) -> Exchangeable | None:
    """That a link is another user's, in a folder where they could make it anew."""
    if step.uid is None or step.is_closed or step.uid in trusted_above():
        return None
    facts = step.above
    by_owner = not is_known_owner(step.uid) and facts.st_uid not in trusted_above()
    is_so = by_owner or facts.st_mode & S_IWOTH or group_can_write(step.path.parent, facts)
    return Exchangeable(Reach.link, step.path, step.uid) if is_so else None


def _allowed_by(step: _Step) -> Exchangeable | None:
    facts, parent = step.above, step.path.parent
    sticky = facts.st_mode & S_ISVTX
    reach = None
    if step.is_closed or not S_ISDIR(facts.st_mode):
        return None
    if facts.st_mode & S_IWOTH and not sticky:
        reach = Reach.everybody
    elif not sticky and group_can_write(parent, facts):
        reach = Reach.group
    elif not is_known_owner(facts.st_uid):
        reach = Reach.owner
    return None if reach is None else Exchangeable(reach, parent, facts.st_uid)


def is_open_to_all(folder: Path) -> bool:
    """Whether every user can write a folder, as /tmp, and come to it."""
    try:
        return folder.stat().st_mode & S_IWOTH != 0 and not is_closed(folder)
    except OSError:
        return False


def reach_beyond(above: Path, folder: Path) -> Reach | None:
    """Which users that cannot write ``folder`` can write one above it; of the folder itself only whether all can."""
    try:
        facts, below = above.stat(), folder.stat()
    except OSError:
        return Reach.everybody
    reach = None
    if facts.st_mode & S_IWOTH:
        reach = Reach.everybody
    elif facts.st_uid != below.st_uid and owner_above(above) is not None:
        reach = Reach.owner
    elif not _is_same_group(above, facts, folder, below):
        reach = Reach.group if group_can_write(above, facts) else None
    return None if reach is None or is_closed(above) else reach


def _is_same_group(above: Path, facts: os.stat_result, folder: Path, below: os.stat_result) -> bool:
    """Whether those who can write ``above`` by the rights of its group can write ``folder`` by the same."""
    by_group = below.st_mode & S_IWGRP and below.st_gid == facts.st_gid
    return bool(by_group) and access_list(above) == access_list(folder)


def others_can_write(path: Path, facts: os.stat_result, known: Sequence[tuple[Path, os.stat_result]]) -> bool:
    """Whether users can write ``path`` by the rights of its group or of all, who can write none of ``known`` so."""
    if facts.st_mode & S_IWOTH:
        return not any(each.st_mode & S_IWOTH for _, each in known)
    return group_can_write(path, facts) and not any(_is_same_group(path, facts, *each) for each in known)
