"""What of a project only those can have written who can change its script as well; and what git tells of that.

Who can change the script can run code as the user who launches it. Nobody else shall: not by a file that the job would
import, and not by what git reads, whose settings name programs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISVTX, S_IWGRP, S_IWOTH

from hpcmm.errors import HpcmmError
from hpcmm.files import entries_of, is_folder_here, is_known_owner, read_followed, trusted_above
from hpcmm.runs.ownership import is_closed, others_can_write

_TIMEOUT_S = 60
_MOST_FOLDERS = 20_000
"""Among which those that others can write are looked for."""
_MOST_OPEN = 5000
"""Of these, each of which is named to git."""
_MARKS_OF_ENVIRONMENTS = frozenset({"pyvenv.cfg", "conda-meta"})
_MOST_NAMES = 1000
"""Of files, in one command line."""
_IN_REPOSITORY = (".git", ".gitignore", ".gitattributes", ".gitmodules")
_OF_REPOSITORY = {b"local", b"worktree"}
_NO_PROGRAMS = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


class _Counts(Enum):
    """What counts of a folder's content."""

    nothing = "others could have exchanged it"
    own = "what belongs to who launches, to root, or to who owns the script"
    by_members = "the same, and what users of the group made who can change the script"
    everything = "nobody else comes there"


class Vouched:
    """Which files of ``project`` only those can have written who can change one of ``scripts`` as well.

    Those are root, the user who launches, and who owns a script or its folder, or can write it. In a folder with the
    sticky bit nobody can change another's script, so who can write that folder is none of them.
    """

    def __init__(self, project: Path, scripts: Sequence[Path] = (), trusted: Collection[int] = ()) -> None:
        """``trusted``: other users whose files count, too."""
        self.project = project
        paths = dict.fromkeys(each for script in scripts for each in (script, script.parent)) or {project: None}
        facts = [(path, path.stat()) for path in paths if path.exists()]
        self._owners = {each.st_uid for _, each in facts if not is_known_owner(each.st_uid)}
        self._owners |= {*trusted_above(), *trusted}
        self._known = [(path, each) for path, each in facts if not (S_ISDIR(each.st_mode) and each.st_mode & S_ISVTX)]
        self._above = {folder for script in scripts for folder in script.parents}
        self._folders = {project: _Counts.everything} if is_closed(project) else {}

    def accepts(self, path: Path, *, closed: bool = False, gone: bool = True) -> bool:
        """Whether nobody else can have put ``path`` there or changed it; ``closed``: nor put anything into it.

        ``gone`` for what is not there, which others may put there at once; True for what is closed to us.
        """
        above = self._of_folder(path.parent)
        if above in {_Counts.everything, _Counts.nothing}:
            return above is _Counts.everything
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return gone
        except OSError:
            return True
        is_closed_enough = not closed or not S_ISDIR(facts.st_mode) or not self._others_can_write(path, facts)
        return is_closed_enough and self._content_of(path, facts, above) is not _Counts.nothing

    def is_open(self, folder: Path) -> bool:
        """Whether others can have put something into a folder."""
        return not self.accepts(folder, closed=True)

    def is_open_within(self, folder: Path) -> bool:
        """Whether others can have put something into a folder or one below it, as far as is looked."""
        queue = [] if self.all_of_it else [folder]
        for each in queue:
            if self.is_open(each):
                return True
            if len(queue) < _MOST_FOLDERS and each.lstat().st_nlink != 2:  # which has no folders in it
                queue += filter(is_folder_here, entries_of(each, _MOST_NAMES))
        return False

    @property
    def all_of_it(self) -> bool:
        """Whether other users cannot come to the project."""
        return self._folders.get(self.project) is _Counts.everything

    def _of_folder(self, folder: Path) -> _Counts:
        way = []
        while folder not in self._folders and (folder == self.project or not self.project.is_relative_to(folder)):
            way.append(folder)
            folder = folder.parent
        counts = self._folders.get(folder, _Counts.own)  # a folder above the project is not asked
        for each in reversed(way):
            try:
                counts = self._content_of(each, each.lstat(), counts)
            except OSError:
                counts = _Counts.nothing
            self._folders[each] = counts
        return counts

    def _content_of(self, path: Path, facts: os.stat_result, above: _Counts) -> _Counts:
        """What counts of a file, or of what lies in a folder; ``above``: of the folder that it lies in."""
        if above in {_Counts.everything, _Counts.nothing}:
            return above
        if above is _Counts.own and facts.st_uid not in self._owners:
            return _Counts.nothing
        if S_ISLNK(facts.st_mode):
            return above
        if self._others_can_write(path, facts):
            # Who could exchange another's file in a folder above a script could exchange the script itself.
            is_like_sticky = S_ISDIR(facts.st_mode) and (facts.st_mode & S_ISVTX or path in self._above)
            return _Counts.own if is_like_sticky else _Counts.nothing
        is_of_group = not facts.st_mode & S_IWOTH and others_can_write(path, facts, ())
        return _Counts.by_members if is_of_group else above

    def _others_can_write(self, path: Path, facts: os.stat_result) -> bool:
        return others_can_write(path, facts, self._known)


def not_vouched_for(root: Path, vouched: Vouched) -> Path | None:
    """The first of what git would read at ``root`` that others could have written; None if there is none."""
    for path in (root / name for name in _IN_REPOSITORY):
        if not vouched.accepts(path, closed=True):
            return path
    for folder in _repository_of(root):
        for path in (folder, *entries_of(folder, _MOST_NAMES)):
            if not vouched.accepts(path, closed=True):
                return path
    return None


def _repository_of(root: Path) -> Iterator[Path]:
    """The folders in which git keeps the repository of a work tree: two if it is one of several."""
    folder = Path(os.path.realpath(root / ".git"))
    if not is_folder_here(folder):
        folder = Path(os.path.realpath(root / _line_of(folder).removeprefix("gitdir:").strip()))
    yield folder
    if common := _line_of(folder / "commondir"):
        yield Path(os.path.realpath(folder / common))


def _line_of(file: Path) -> str:
    try:
        return os.fsdecode(read_followed(file, 5000)).strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Listed:
    """Names of files below a work tree. ``ignored`` may be folders as well."""

    tracked: set[str]
    new: set[str]
    changed: set[str]
    """Tracked ones that are not as in the last commit, or may not be."""
    ignored: set[str]


class Repository:
    """What git tells of a work tree. No program is run that the repository's own settings name.

    Raises HpcmmError if git cannot tell.
    """

    def __init__(self, root: Path, vouched: Vouched) -> None:
        self.root, self._vouched = root, vouched
        self.open_folders = _open_folders(root, vouched)
        """Folders that others can write. Git does not look into them: a pipe there would make it wait."""
        self._filters = sorted(_filters_of(root))
        index = (entry.partition("\t")[::2] for entry in _names(self._git("ls-files", "-z", "--cached", "-s", "-v")))
        self._index = {name: facts.split(" ") for facts, name in index}

    def commit(self) -> str | None:
        """None before the first one."""
        try:
            return self._git("rev-parse", "--verify", "--quiet", "HEAD").decode("ascii").strip()
        except HpcmmError:
            self._status("--untracked-files=no", "--ignore-submodules=all")  # only one without a commit passes
            return None

    def changed(self) -> set[str]:
        """Names of what is not as in the last commit, submodules included."""
        submodules = [self.root / name for name, (_, mode, *_) in self._index.items() if mode == "160000"]
        asked = [path for path in submodules if (path / ".git").exists() and not not_vouched_for(path, self._vouched)]
        # Git looks into submodules, with the settings that it is given here.
        inner = {name for path in asked for name in _filters_of(path)}
        self._filters = sorted({*self._filters, *inner})
        left_out = [path for path in submodules if path not in asked]
        return {entry[3:] for entry in self._status("--untracked-files=no", left_out=left_out)}

    def patch(self, names: Collection[str]) -> bytes:
        """What changed in these since the last commit, binary files included."""
        # Settings of the user's may show a submodule by its changes, or name files without a/ and b/.
        plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        given = [f":(top,literal){name}" for name in sorted(names)]
        parts = [given[start : start + _MOST_NAMES] for start in range(0, len(given), _MOST_NAMES)]
        return b"".join(self._git("diff", "--binary", *plain, *prefixes, "HEAD", "--", *part) for part in parts)

    def listed(self, left_out: Path) -> Listed:
        """All files but those below ``left_out``; in :attr:`open_folders` the tracked ones alone."""
        # Of files that are marked so, git does not look whether they are changed.
        changed = {name for name, (flag, *_) in self._index.items() if flag == "S" or flag.islower()}
        changed |= {name for name in self._index if self.open_folders and self._is_in_open_folder(name)}
        new, ignored = set[str](), set[str]()
        how = ("--ignored=matching", "--untracked-files=all", "--ignore-submodules=all")
        for entry in self._status(*how, left_out=[left_out]):
            state, name = entry[:2], entry[3:]
            {"??": new, "!!": ignored}.get(state, changed).add(name)
        return Listed(set(self._index), new, changed, ignored)

    def _is_in_open_folder(self, name: str) -> bool:
        return any((self.root / name).is_relative_to(folder) for folder in self.open_folders)

    def _status(self, *how: str, left_out: Collection[Path] = ()) -> Iterator[str]:
        below = (
            path.relative_to(self.root) for path in left_out if path != self.root and path.is_relative_to(self.root)
        )
        where = [*self._where(), *(f":(top,exclude,literal){name}" for name in below)]
        yield from _names(self._git("status", "--porcelain=v1", "-z", "--no-renames", *how, "--", *where))

    def _where(self) -> list[str]:
        """Where git looks. Into a folder that is only excluded it looks all the same, so the others are named."""
        if not self.open_folders:
            return ["."]
        above = {
            parent for folder in self.open_folders for parent in folder.parents if parent.is_relative_to(self.root)
        }
        beside = (entry for folder in above for entry in entries_of(folder))
        asked = [path for path in beside if path not in above and path not in self.open_folders and path.name != ".git"]
        return [f":(top,literal){path.relative_to(self.root)}" for path in asked] or [":(exclude,top)*"]

    def _git(self, *arguments: str) -> bytes:
        return _git(self.root, *(word for name in self._filters for word in _without_filter(name)), *arguments)


def _open_folders(root: Path, vouched: Vouched) -> set[Path]:
    """The folders below a work tree that others can write, without those in them.

    Others cannot use up what is looked at: their own folders are not looked into, and files do not count.
    """
    found, queue, own = set[Path](), [(str(root), False)], {0, os.geteuid()}
    for folder, is_closed_to_others in () if vouched.all_of_it else queue:
        try:
            with os.scandir(folder) as entries:
                there = list(entries)
                folders = [each for each in there if each.name != ".git" and each.is_dir(follow_symlinks=False)]
                inner = [(each.path, each.stat(follow_symlinks=False)) for each in folders]
        except OSError:  # closed to us, and so to git
            continue
        if folder != str(root) and not _MARKS_OF_ENVIRONMENTS.isdisjoint(each.name for each in there):
            continue  # of its thousands of folders none is others', or its Python could not be trusted
        for path, facts in inner:
            is_closed_too = facts.st_uid in own and not facts.st_mode & (S_IWGRP | S_IWOTH)
            if not (is_closed_to_others and is_closed_too) and vouched.is_open(Path(path)):
                found.add(Path(path))
            elif len(queue) < _MOST_FOLDERS:
                queue.append((path, is_closed_too))
    if len(found) > _MOST_OPEN:
        raise HpcmmError(_cannot(root, f"other users can write more than {_MOST_OPEN} folders in it"))
    return found


def _filters_of(root: Path) -> set[str]:
    """Names of the filters that a repository's own settings define: programs that git would run to compare files.

    Those of the user's own settings, such as git-lfs, stay.
    """
    words = _git(root, "config", "--list", "--show-scope", "--name-only", "-z").split(b"\0")
    keys = {os.fsdecode(key) for scope, key in zip(words[::2], words[1::2], strict=False) if scope in _OF_REPOSITORY}
    names = {key.removeprefix("filter.").rpartition(".")[0] for key in keys if key.startswith("filter.")}
    if odd := [name for name in names if "=" in name]:
        raise HpcmmError(_cannot(root, f"a filter in its settings is named {odd[0]!a}"))
    return names


def _without_filter(name: str) -> Iterator[str]:
    for key, value in (("clean", ""), ("smudge", ""), ("process", ""), ("required", "false")):
        yield from ("-c", f"filter.{name}.{key}={value}")


def _names(listed: bytes) -> set[str]:
    return {os.fsdecode(name) for name in listed.split(b"\0") if name}


def _git(root: Path, *arguments: str) -> bytes:
    # Variables such as GIT_DIR, which git sets for its hooks, would name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # What is missing in a partial clone is not fetched: a repository's settings name the program for that.
    environment |= {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1"}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "--no-pager", "-C", str(root), *_NO_PROGRAMS, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=environment,
        )
    except FileNotFoundError as error:
        raise HpcmmError(_cannot(root, "git is not installed")) from error
    except subprocess.TimeoutExpired as error:
        raise HpcmmError(_cannot(root, f"no answer within {_TIMEOUT_S} s")) from error
    except OSError as error:  # more words than a command may have
        raise HpcmmError(_cannot(root, error.strerror or str(error))) from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        raise HpcmmError(_cannot(root, reason[0]))
    return done.stdout


def _cannot(root: Path, reason: str) -> str:
    return f"git cannot read {root} ({reason}): put that right, or launch with launch.snapshot=false."
