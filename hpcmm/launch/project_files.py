"""Which files of a project a run's copy holds, and which it does not.

Copied: what git tracks and what it would track, Python code though git ignores it, and what ``launch.include`` names.
Never copied: what looks like credentials. All else that git ignores lies in the copy as a link to the original.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpcmm.config.class_source import holds_python, syntax_tree
from hpcmm.errors import HpcmmError
from hpcmm.files import (
    CODE,
    MOST_NAMES,
    SETTINGS,
    entries_of,
    has_secret_name,
    is_file_here,
    is_folder_here,
    is_secret,
)
from hpcmm.launch.vouched import Repository, Vouched, not_vouched_for
from hpcmm.runs.ownership import Reach, is_open_to_all, is_trusted, reach_beyond

_LARGEST_BYTES = 10**7
"""Of a file that git does not vouch for: a larger one is data."""
_MOST_LINKS = 1000
_MOST_ENTRIES = 20_000
"""Files and folders that are looked at in a project without git."""
_MARKERS = ("pyproject.toml", "setup.py", "setup.cfg")
_PRIVATE_WORDS = r"(^|[._-])(secrets?|credentials?|passwords?|tokens?|api_?keys?)([._-]|$)"
_PLACEHOLDERS = frozenset(
    (".gitkeep", ".keep", ".gitignore", ".placeholder", ".empty", "README", "README.md", "README.rst", "README.txt")
)
"""Files for whose sake git keeps a folder that a program fills."""
_TEXTS = frozenset({".txt", ".json", ".md"})
"""Of settings, those that may as well be data."""
_MOST_SETTINGS = 500
"""Files and folders in a folder of settings."""
_NO_CODE = frozenset({"__pycache__", "node_modules", "site-packages"})

# Where a project begins, and its state.


def project_root(folder: Path) -> Path | None:
    """The work tree that ``folder`` lies in, or None. A home is no project, though its settings may be in git."""
    found = next(_marked(folder, ".git"), None)
    return None if found is None or _is_shared_ground(found) else found


def _marked(folder: Path, *markers: str) -> Iterator[Path]:
    """``folder`` and those above it that hold a marker, up to one where a user could plant it who cannot here."""
    for parent in (folder, *folder.parents):
        there = [parent / name for name in markers if (parent / name).exists()]
        reach = reach_beyond(parent, folder)
        if reach is not None:
            there = [marker for marker in there if is_trusted(marker)] if reach is Reach.group else []
            if not there:
                return
        if there:
            yield parent


def passed_over(project: Path) -> Path | None:
    """The folder that a marker would make the project of ``project``, if no other user could have planted it there."""
    if project_root(project) or marked_root(project):
        return None
    for parent in (project, *project.parents):
        if _is_by_name_shared_ground(parent):
            return None
        if any(is_file_here(parent / name) or is_folder_here(parent / name) for name in (".git", *_MARKERS)):
            return parent
    return None


@dataclass(frozen=True)
class Revision:
    """The state of a project. ``commit`` is None before its first commit."""

    commit: str | None
    changes: bytes
    """A patch against the commit, binary files included; without new files that were never added, and credentials."""


def revision(root: Path, scripts: Sequence[Path] = ()) -> Revision:
    """Commit and changes. Raises HpcmmError when git cannot tell, or others could have written what it reads."""
    vouched = Vouched(root, scripts)
    if (path := not_vouched_for(root, vouched)) is not None:
        raise HpcmmError(f"git is not asked, for others can write {path}")
    repository = Repository(root, vouched)
    commit = repository.commit()
    changed = repository.changed() if commit else set()
    return Revision(commit, repository.patch({name for name in changed if not is_secret(root, name)}))


# What the copy holds.


@dataclass
class ProjectFiles:
    """What becomes of the files of a project, all by their paths."""

    copied: set[Path]
    linked: set[Path]
    """Files and folders that are not copied; the copy holds links to them."""
    secret: set[Path]
    """Files that look like credentials: neither copied nor linked."""
    foreign: set[Path] = field(default_factory=set)
    """What users could have written who cannot change the script: neither copied nor linked."""
    not_for_git: Path | None = None
    """What such users could have written of the settings that git reads, so that git was not asked."""

    def add_ignored(self, path: Path) -> None:
        """Copy code, link data, and leave out credentials and what no program reads."""
        is_folder, name = is_folder_here(path), path.name
        is_no_code = name in _NO_CODE or name.endswith((".egg-info", ".pyc", ".pyo", "~", ".swp"))
        if is_no_code or (is_folder and _is_environment(path)):
            return
        is_file = is_file_here(path)
        if is_file and has_secret_name(name):
            self.secret.add(path)
        elif name.startswith(".") and (is_folder or path.suffix not in SETTINGS):
            return
        elif is_file and _is_code(path) and not re.search(_PRIVATE_WORDS, path.stem.lower()):
            self.copied.add(path)
        elif is_folder or is_file:
            self.linked.add(path)

    def look_into_links(self, above: set[Path], vouched: Vouched) -> set[Path]:
        """Replace links to folders by what lies in them: to those ``above`` what is asked for, and to those in or below
        which others can put something, such as a package beside a module, once the job is queued. Returns these."""
        queue, looked_into = [*self.linked], set[Path]()
        for path in queue:
            is_open = path not in above and is_folder_here(path) and vouched.is_open_within(path)
            if not is_open and path not in above:
                continue
            self.linked.discard(path)
            looked_into.add(path)
            entries = entries_of(path, _MOST_LINKS)
            if is_open and not 0 < len(entries) < _MOST_LINKS:
                self.foreign.add(path)
            for entry in entries:
                self.add_ignored(entry)
                queue += [entry] if entry in self.linked else []
        return looked_into

    def link_folders_to_fill(self, root: Path, new: set[Path]) -> None:
        """Link folders that are empty or kept by placeholders: what a program writes there shall stay, and be seen.

        ``new``: files that git does not track. Data among them, and links out of the project, keep no folder.
        """
        folders = {file.parent for file in self.copied if file.name in _PLACEHOLDERS} - {root}
        below = {file for file in self.copied if not folders.isdisjoint(file.parents)}
        data = {file for file in below if file in new and file.suffix not in (CODE | SETTINGS) - _TEXTS}
        data |= {file for file in below if file.name in _PLACEHOLDERS or leads_out(file, root)}
        held = {parent for file in (self.copied - data) | self.secret | self.foreign for parent in file.parents}
        empty = {path for path in entries_of(root, _MOST_LINKS) if is_folder_here(path) and _holds_no_file(path)}
        filled = {
            folder
            for folder in (folders | empty) - held
            if not any(part.startswith(".") for part in folder.relative_to(root).parts)
        }
        self.linked |= filled
        self.copied -= {file for file in data if not filled.isdisjoint(file.parents)}


def files_of(
    project: Path, scripts: Sequence[Path], include: Sequence[str], working_directory: Path, runs_root: Path
) -> ProjectFiles:
    """What of ``project`` is copied for a run of ``scripts``; nothing below ``runs_root`` is.

    Raises HpcmmError when git cannot list the project, or ``include`` names what is not there.
    """
    vouched = Vouched(project, scripts)
    is_in_git = project_root(project) == project
    not_for_git = not_vouched_for(project, vouched) if is_in_git else None
    by_git = is_in_git and not_for_git is None
    files = _files_in_git(project, vouched, runs_root) if by_git else _files_without_git(vouched, scripts, runs_root)
    files.not_for_git = not_for_git
    asked, exact, kept_out = set(scripts), set(scripts), set[Path]()
    for pattern in include:
        for file, is_exact in _included(pattern, working_directory, vouched):
            if is_exact:
                exact.add(file)
            if is_exact or not is_secret(project, str(file.relative_to(project))):
                asked.add(file)
            else:
                kept_out.add(file)
    files.copied |= asked
    files.secret = (files.secret | kept_out) - asked
    above = {parent for file in asked | kept_out for parent in file.parents}
    looked_into = files.look_into_links(above, vouched)
    for folder in files.foreign & above:
        files.foreign.remove(folder)
        files.foreign |= {*_around(folder, above)}
    whole: dict[Path, bool] = {}
    files.foreign -= asked  # of these each is looked at now, also if its folder was not
    listed = (files.copied | files.linked) - exact
    files.foreign |= {path for path in listed if not vouched.accepts(path, gone=False)}
    files.foreign = {path for path in files.foreign - exact if not path.is_relative_to(runs_root)}
    kept = (file for file in files.copied - files.foreign if file in exact or not file.is_relative_to(runs_root))
    files.copied = {file for file in kept if _is_below_no_link(file, whole)}
    taken = files.copied | files.foreign | files.secret
    holders = {project} | looked_into | {parent for file in taken for parent in file.parents}
    linked = {path for path in files.linked - taken if not path.is_relative_to(runs_root)}
    files.linked = {_widest(path, holders, vouched) for path in linked}
    return files


def _widest(path: Path, holders: set[Path], vouched: Vouched) -> Path:
    """The widest folder that holds ``path`` and nothing that is copied, so that one link stands for many."""
    while path.parent not in holders and not vouched.is_open(path.parent):
        path = path.parent
    return path


def _files_in_git(root: Path, vouched: Vouched, runs_root: Path) -> ProjectFiles:
    repository = Repository(root, vouched)
    listed = repository.listed(runs_root)
    environments = tuple(name.removesuffix("pyvenv.cfg") for name in listed.new if name.endswith("/pyvenv.cfg"))
    new = {name for name in listed.new if not name.startswith(environments)}
    secret = {name for name in (new | (listed.changed & listed.tracked)) if is_secret(root, name)}
    files = ProjectFiles(set(), set(), {root / name for name in secret if is_file_here(root / name)})
    files.foreign |= {folder for folder in repository.open_folders if entries_of(folder, 1)}
    for path in (root / name for name in (listed.tracked | new) - secret):
        if is_file_here(path, unknown=True) or path.is_symlink():
            files.copied.add(path)
        elif is_folder_here(path) and (path / ".git").exists():  # a submodule, or another repository
            if not_vouched_for(path, vouched):
                files.foreign.add(path)
                continue
            inner = _files_in_git(path, vouched, runs_root)
            files.copied |= inner.copied
            files.linked |= inner.linked
            files.secret |= inner.secret
            files.foreign |= inner.foreign
    for name in listed.ignored:
        parents = Path(name).parts[:-1]
        if not any(part.startswith(".") or part in _NO_CODE for part in parents) and not any(
            _is_environment(root.joinpath(*parents[:depth])) for depth in range(1, len(parents) + 1)
        ):
            files.add_ignored(root / name)
    files.link_folders_to_fill(root, {root / name for name in new})
    return files


def leads_out(file: Path, root: Path) -> bool:
    """Whether it is a link to what does not lie in ``root``."""
    return file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(root)


def _holds_no_file(folder: Path) -> bool:
    queue = [folder]
    for each in queue:
        inside = entries_of(each, _MOST_LINKS)
        if len(queue) > _MOST_LINKS or not all(map(is_folder_here, inside)):
            return False
        queue += inside
    return True


def _is_code(path: Path) -> bool:
    return path.suffix in CODE and _is_small(path)


def _is_small(path: Path) -> bool:
    with suppress(FileNotFoundError):  # deleted since it was listed
        return path.stat().st_size <= _LARGEST_BYTES
    return False


def _is_environment(folder: Path) -> bool:
    """Whether it is a virtual environment, or one of conda."""
    return is_file_here(folder / "pyvenv.cfg") or is_folder_here(folder / "conda-meta")


def _is_below_no_link(file: Path, known: dict[Path, bool]) -> bool:
    """Whether no folder of the path is a link by now: the copy of that link would lead a copied file astray."""
    if file.parent not in known:
        known[file.parent] = os.path.realpath(file.parent) == str(file.parent)
    return known[file.parent]


def _around(folder: Path, above: set[Path]) -> Iterator[Path]:
    """What lies in ``folder``; of the folders in ``above`` what lies in them."""
    queue = [folder]
    for each in queue:
        for entry in entries_of(each, _MOST_LINKS):
            if entry in above and not entry.is_symlink():
                queue.append(entry)
            else:
                yield entry


def _included(pattern: str, working_directory: Path, vouched: Vouched) -> Iterator[tuple[Path, bool]]:
    """The files that an entry of ``launch.include`` means, each with whether the entry is its very path.

    A folder that is not vouched for stands for what is in it.
    """
    outside, project = False, vouched.project
    for base in (bases := dict.fromkeys((working_directory, project))):
        found = False
        exact = base / Path(pattern).expanduser()
        is_there = os.path.lexists(exact) and (not set("*?[") & set(pattern) or vouched.accepts(exact))
        for match in [exact] if is_there else _matches(base, pattern):
            path = Path(os.path.realpath(match.parent)) / match.name if match.name != ".." else match.resolve()
            if not path.is_relative_to(project):
                outside = True
                continue
            found = True
            if is_folder_here(path):
                yield from ((file, False) for file in _files_below(path, vouched))
            elif is_file_here(path) or path.is_dir():
                yield path, is_there
            elif is_there:
                raise HpcmmError(f"launch.include names {pattern}, but {path} is {_kind_of(path)}: leave it out.")
        if found:
            return
    if outside:
        raise HpcmmError(f"launch.include names {pattern}, which is not in {project}: the job reads it where it lies.")
    raise HpcmmError(f"launch.include names {pattern}, which is not there in {' or '.join(map(str, bases))}.")


def _kind_of(path: Path) -> str:
    return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "no file or folder"


def _matches(base: Path, pattern: str) -> list[Path]:
    try:
        relative = Path(pattern).relative_to(base) if Path(pattern).is_absolute() else Path(pattern)
        found = sorted(base.glob(str(relative)))
    except (ValueError, NotImplementedError, OSError):  # another folder's, or nothing that a file can be named
        return []
    except RecursionError as error:
        reason = f"{base} has folders that lie too deep to be searched"
        raise HpcmmError(f"launch.include names {pattern}, but {reason}: name a folder.") from error
    return [path for path in found if ".git" not in path.parts and not (_NO_CODE & set(path.parts))]


def _files_below(folder: Path, vouched: Vouched) -> Iterator[Path]:
    queue = [folder]
    for each in queue:
        for path in entries_of(each):
            if not is_folder_here(path):
                if is_file_here(path) or path.is_symlink():
                    yield path
            elif path.name not in _NO_CODE and path.name != ".git":
                if vouched.accepts(path):
                    queue.append(path)
                else:
                    yield path


# Projects without git.


def marked_root(folder: Path) -> Path | None:
    """The nearest folder upwards that is a Python project by its files, or None."""
    found = next(_marked(folder, *_MARKERS), None)
    between = () if found is None else (each for each in (folder, *folder.parents) if each.is_relative_to(found))
    return None if any(map(_is_shared_ground, between)) else found


def _is_shared_ground(folder: Path) -> bool:
    """Whether all kinds of things lie there that have nothing to do with each other: a home, a folder for all users."""
    return _is_by_name_shared_ground(folder) or is_open_to_all(folder)


def _is_by_name_shared_ground(folder: Path) -> bool:
    homes = {Path(os.path.expanduser("~")), Path(os.environ.get("TMPDIR", "/tmp"))}  # noqa: PTH111, S108 -- no user raises
    return folder in homes | {Path("/"), Path("/tmp"), Path("/var/tmp")} or folder.parent == Path("/home")  # noqa: S108


def _files_without_git(vouched: Vouched, scripts: Sequence[Path], runs_root: Path) -> ProjectFiles:
    """Code and small settings of the folder and of the packages in it. All else beside them is linked."""
    files, left, project = ProjectFiles(set(), set(), set()), _MOST_ENTRIES, vouched.project
    if _is_shared_ground(project):
        queue = list(_used_by(scripts, vouched))
    else:  # others cannot use up what is looked at
        there = entries_of(project, MOST_NAMES)
        files.foreign |= {path for path in there if path.name[0] != "." and not vouched.accepts(path)}
        queue = [path for path in there if path not in files.foreign][:_MOST_ENTRIES]
    for path in queue:
        if path == runs_root or (path.name.startswith(".") and not has_secret_name(path.name)):
            continue
        if not vouched.accepts(path):
            files.foreign.add(path)
        elif is_folder_here(path):
            inside = entries_of(path, left + 1)
            if path.name in _NO_CODE or path.suffix == ".egg-info" or _is_environment(path):
                continue
            is_copied = holds_python(path) or _is_of_settings(path, is_in_package=path.parent != project)
            if len(inside) <= left and is_copied:
                queue += sorted(inside)
                left -= len(inside)
            else:
                files.linked.add(path)
        elif is_file_here(path):
            name = str(path.relative_to(project))
            is_small = path.suffix in CODE | SETTINGS and _is_small(path)
            (files.secret if is_secret(project, name) else files.copied if is_small else files.linked).add(path)
    return files


def _is_of_settings(folder: Path, *, is_in_package: bool) -> bool:
    """Whether all files in and below it are small settings. Texts and JSON alone are data, unless a package's."""
    queue, size, found = [folder], 0, is_in_package
    for path in queue:
        if is_folder_here(path):
            queue += [each for each in entries_of(path, _MOST_SETTINGS) if not each.name.startswith(".")]
        elif not is_file_here(path) or not (path.suffix in CODE | SETTINGS or has_secret_name(path.name)):
            return False
        else:
            size += path.lstat().st_size if os.path.lexists(path) else 0
            found = found or path.suffix not in _TEXTS
        if len(queue) > _MOST_SETTINGS or size > _LARGEST_BYTES:
            return False
    return found and len(queue) > 1


def _used_by(scripts: Sequence[Path], vouched: Vouched) -> Iterator[Path]:
    """The scripts and their packages, and what lies beside them that they import or name, and that in turn."""
    queue, seen, folder = list(scripts), set(scripts), vouched.project
    while queue:
        file = queue.pop()
        yield folder / file.relative_to(folder).parts[0]
        names: set[str] = set()
        is_read = file.suffix == ".py" and (file in scripts or vouched.accepts(file))
        for node in ast.walk(syntax_tree(file)) if is_read else ():
            match node:
                case ast.Import(names=imported):
                    names |= {alias.name.partition(".")[0] for alias in imported}
                case ast.ImportFrom(module=str(module), level=0):
                    names.add(module.partition(".")[0])
                case ast.Constant(value=str(text)) if 0 < len(text) < 200 and "\0" not in text:
                    names.add(text.partition("/")[0])
        for path in (folder / each for name in names for each in (name, f"{name}.py")):
            if path not in seen and path.parent == folder and path.name != ".." and path.exists():
                seen.add(path)
                queue.append(path)
