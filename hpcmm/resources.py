"""Where hpcmm's own files lie: ``conf/``, ``slurm/`` and ``profiles/``; and where Python finds the user's modules.

In a checkout they stand beside the package, in an installed wheel within it. Of the user's modules none is found that
another user can have put there, to stand for one of the user's own.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, all_suffixes
from pathlib import Path
from stat import S_ISDIR, S_ISREG, S_ISVTX, S_IWGRP, S_IWOTH
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.files import is_known_owner, name_of, trusted_above
from hpcmm.text import visible

PACKAGE = Path(__file__).resolve().parent
"""The folder of hpcmm's package."""
_RESOURCES = PACKAGE / "_resources"
INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Names of the folders that packages are installed in."""


FOLDER_OF_NSYS = "/"
"""Where nsys and its tools are started: the Python within nsys 2022.4 runs what it finds in the current folder, such as
``sitecustomize.py``, and in ``lib/python3.8`` of every folder above."""


def own_module(name: str, python: str = sys.executable, package: Path = PACKAGE) -> list[str]:
    """Words that run a module of hpcmm in a process of its own, with :func:`environment_of_modules`.

    Not ``-m`` alone, for which Python would look into the current folder first, which other users may write; and not
    ``-P``, which only some of the Pythons have that ranks run on. ``package``: the copy of hpcmm's package to use.
    """
    return [python, str(package / "start.py"), name]


SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
"""What keeps this Python from looking for modules in the current folder first. An older one has no option for it."""


def environment_of_modules(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``environ``, in which Python finds this hpcmm."""
    paths = [str(PACKAGE.parent), *filter(None, [environ.get("PYTHONPATH")])]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


_MOST_NAMES = 4096
"""On the way of a path and its links."""
_OTHERS_WRITE = S_IWGRP | S_IWOTH
_COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "QUACK_CACHE_DIR": "quack"}
"""Variables that name folders of compiled code to torch, which runs it, each with its folder's own name."""
_WITHOUT_CLASSES = frozenset({"jobs", "analyze", "init"})
"""Commands that import no class of the user's."""
_left_out: list[str] = []


def find_modules_in(folder: str, command: str) -> None:
    """Let ``command`` find the user's modules in the current ``folder``, by putting it on ``sys.path``, as the last.

    A project may have a ``yaml.py`` or ``rich.py`` of its own, which hides no package of ours here, as in the job.
    If another user than this one and root could have put a module there, nor may it stand for one that a package of
    ours would use if it were there. So it is not searched before :func:`find_modules_at_last`; not at all for a command
    that needs no class of the user's. It is not on ``sys.path``, where packages look for entry points, which name code,
    as well.
    """
    try:
        facts = Path(folder).stat()
    except OSError:
        return
    if facts.st_uid in {0, os.geteuid()} and not facts.st_mode & 0o022:
        sys.path.append(folder)
    elif command not in _WITHOUT_CLASSES:
        _left_out.append(folder)


def find_modules_at_last(needed: Sequence[str]) -> None:
    """Import ``needed``, then search the folder that :func:`find_modules_in` left out. Nothing if there is none."""
    if _left_out:
        for name in needed:
            import_module(name)
        sys.meta_path.append(_AtLast(_left_out.pop()))


def searched_at_last() -> list[str]:
    """The folder that is searched for modules after all that is on ``sys.path``, if there is one."""
    return [each.folder for each in sys.meta_path if isinstance(each, _AtLast)]


def ask_for_module(module: str) -> None:
    """Let the module, which the user has named, be found in the folder that is searched at last."""
    for each in sys.meta_path:
        if isinstance(each, _AtLast):
            each.asked.add(module.partition(".")[0])


class _AtLast:
    """Finds the user's own modules in a folder that others own or can write too, if they are nowhere else.

    Packages look for many modules that they can do without, and none of these is to be its owner's. So what is found
    there first is a module that the user has named, and then also what that may import.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.asked: set[str] = set()
        self._is_used = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        if path is not None or name == PACKAGE.name or not (self._is_used or name in self.asked):
            return None
        found = _Guard.find_spec(name, [self.folder])
        self._is_used |= found is not None
        return found


def resource(name: str) -> Path:
    """The file or folder ``name``, relative to the top of the project (``conf``, ``slurm/train.sbatch.j2``)."""
    return (_RESOURCES if _RESOURCES.is_dir() else PACKAGE.parent) / name


def planted(path: Path, *, found: bool = False) -> tuple[Path, int | None] | None:
    """``path``, or what a link there leads to, and its owner, if that is another user who can have put it there.

    Its owner may be this user, root, or who owns the folder that it lies in. If others can write that folder, its owner
    is one of them: with the sticky bit they cannot exchange a file, but add one. Without it, members of a group can
    exchange the user's own module too, so who lets them trusts them. ``found``: it was there just now, or may be at
    once. If it is not, and others can write the folder, it is theirs: of an owner who is not known (None).
    """
    for each in dict.fromkeys((*_hops(path), Path(os.path.realpath(path)))):
        try:
            folder = each.parent.stat()
        except OSError:
            continue
        if folder.st_mode & (S_IWGRP | S_IWOTH | S_ISVTX) == S_IWGRP:
            continue
        is_shared = folder.st_mode & _OTHERS_WRITE
        try:
            facts = each.lstat()
        except OSError:
            if found and is_shared:
                return each, None
            continue
        uid = facts.st_uid
        if is_shared and S_ISREG(facts.st_mode) and facts.st_mode & _OTHERS_WRITE:  # it may be a hard link of theirs
            return each, uid
        if uid not in trusted_above() if is_shared else not is_known_owner(uid) and uid != folder.st_uid:
            return each, uid
    return None


def _hops(path: Path) -> Iterator[Path]:
    """``path``, and each link on the way to where it leads, those among its folders too."""
    yield path
    here, names = Path("/"), [*reversed(path.absolute().parts[1:])]
    for _ in range(_MOST_NAMES):
        if not names:
            return
        name = names.pop()
        here, above = (here.parent if name == ".." else here / name), here
        try:
            target = here.readlink()
        except OSError:  # no link, or not there
            continue
        yield here
        names += reversed([part for part in target.parts if part != "/"])
        here = Path("/") if target.is_absolute() else above


def require_own_module(module: str, holder: Path) -> None:
    """Raises HpcmmError if another user can have put what Python would import as ``module``, or could, from a folder.

    A package comes before a module of its name, and a compiled one before its source.
    """
    folder = holder
    for name in module.split("."):
        for file in (folder / name, *(folder / f"{name}{suffix}" for suffix in all_suffixes())):
            _require_own(file)
        folder /= name
        for suffix in all_suffixes():
            _require_own(folder / f"__init__{suffix}")


def require_own_path(path: Path, holder: Path) -> None:
    """Raises HpcmmError if another user can have put ``path`` below ``holder``, or a folder on its way."""
    for each in (path, *path.parents):
        if each == holder:
            return
        _require_own(each, found=True)


def _require_own(path: Path, *, found: bool = False) -> None:
    theirs = planted(path, found=found)
    if theirs is not None:
        file, uid = theirs
        why = "comes and goes in a folder that others can write" if uid is None else f"belongs to user {name_of(uid)}"
        why = "can be written by other users (chmod go-w)" if uid in trusted_above() else why
        raise HpcmmError(
            f"{visible(str(file))} {why}, so it is not imported as your code: have it "
            "removed, or start hpcmm in a folder of your own that holds your code."
        )


def guard_imports() -> None:
    """From now on, a module that another user can have put there is not found. Those that are installed are not asked.

    :func:`why_not_found` tells it then: packages look for many modules that they can do without.
    """
    keep_compiled_code_to_oneself()
    _folders_of_python()  # which imports a module, and so must not be asked for the first time by an import
    if PathFinder in sys.meta_path:
        sys.meta_path[sys.meta_path.index(PathFinder)] = _Guard
    elif _Guard not in sys.meta_path:
        sys.meta_path.insert(0, _Guard)


def keep_compiled_code_to_oneself(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have torch, which this process or its children may import, read compiled code of this user alone.

    By itself it takes folders in TMPDIR by the user's name, whoever made them, and runs what is written there. A
    variable of :data:`_COMPILED` that the user has set stays. Else its folder is on the node's own disk; if others took
    its name, or could, in the user's home. What a launch has set so is another disk's, and is set anew on a node.
    """
    above = Path(os.path.realpath(tempfile.gettempdir()))
    folder = above / f"hpcmm-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        is_mine = S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & _OTHERS_WRITE
        is_kept = is_mine and not any(_lets_others_exchange(each.stat()) for each in (above, *above.parents))
    except OSError:
        is_kept = False
    home = Path(os.path.expanduser("~/.cache/hpcmm"))  # noqa: PTH111 -- raises nothing
    for name, within in _COMPILED.items():
        if name not in environ or environ[name] == environ.get(f"HPCMM_{name}"):
            environ[name] = environ[f"HPCMM_{name}"] = str((folder if is_kept else home) / within)


def _lets_others_exchange(facts: os.stat_result) -> bool:
    """Whether another user can rename what lies in a folder."""
    return not is_known_owner(facts.st_uid) or (facts.st_mode & _OTHERS_WRITE != 0 and not facts.st_mode & S_ISVTX)


_not_found: dict[str, str] = {}
"""Why a module, by its name, was not taken."""


def why_not_found(module: str) -> str | None:
    """Why a module was not imported that is there, or a package above it; None if that is not why."""
    names = module.split(".")
    found = (_not_found.get(".".join(names[:length])) for length in range(1, len(names) + 1))
    return next((why for why in found if why is not None), None)


class _Guard(PathFinder):
    """Finds modules as Python does, but for another user's."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path)
        if spec is None or name.partition(".")[0] == "hpcmm":
            return spec
        packages = [Path(each) for each in spec.submodule_search_locations or ()]
        files = [*packages, *([Path(spec.origin)] if spec.has_location and spec.origin else [])]
        for file in (each for each in files if not _is_installed(each)):
            try:
                _require_own(file, found=True)
            except HpcmmError as error:
                _not_found[name] = str(error)
                return None
            compiled = [file.parent / "__pycache__", *([Path(spec.cached)] if spec.cached else [])]
            if isinstance(spec.loader, SourceFileLoader) and any(planted(each, found=True) for each in compiled):
                spec.loader = _FromSource(spec.loader.name, spec.loader.path)
        return spec


class _FromSource(SourceFileLoader):
    """Reads no compiled copy, which another user can have made of other code."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError(errno.EPERM, "its compiled copy is not used", str(path))


def _is_installed(file: Path) -> bool:
    return not INSTALLED.isdisjoint(file.parts) or any(map(file.is_relative_to, _folders_of_python()))


@functools.cache
def _folders_of_python() -> frozenset[Path]:
    return frozenset(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
