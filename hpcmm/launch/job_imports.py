"""What the job's Python imports from elsewhere than its own folders, and from where in the copy it does instead.

Editable installs are read from the files that make them, of the Python that runs the job. None of it is run.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from hpcmm.config.class_source import holds_python, syntax_tree
from hpcmm.config.schema import FUNCTION, ClusterConfig, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.files import CODE, SETTINGS, entries_of, is_file_here, is_folder_here, read_followed
from hpcmm.launch.project_files import project_root
from hpcmm.launch.vouched import Vouched
from hpcmm.resources import INSTALLED, PACKAGE, searched_at_last
from hpcmm.runs.ownership import Reach, exchangeable

_NEVER_IMPORTED = frozenset(
    ("hpcmm", "setup", "conftest", "noxfile", "test", "tests", "docs", "examples", "benchmarks", "scripts", "tools")
)
"""Names at the top of a project or of an installation that no program imports from there."""
_MOST_BESIDE = 5000
_SITE_KINDS = ("lib*/python3*/site-packages", "lib/python3*/dist-packages", "local/lib/python3*/dist-packages")
_ADDED_SITE = re.compile(r"addsitedir\(\s*r?[\"']([^\"']+)")
_IMPORTED = re.compile(r"(?:^|;)\s*import\s+([\w.]+)")


@dataclass(frozen=True)
class Editable:
    """What a Python reads from elsewhere than its own folders, as files in those say. None of it is run."""

    sites: tuple[Path, ...] = ()
    """Its own folders; empty if they are not known."""
    roots: tuple[Path, ...] = ()
    """Folders that it searches after its own."""
    packages: Mapping[str, Path] = field(default_factory=dict)
    """Packages and modules that a finder maps, after all folders were searched."""
    names: frozenset[str] = frozenset()
    """Of packages and modules in its own folders."""


def read_editable(sites: Sequence[Path]) -> Editable:
    """What was installed with ``pip install -e`` and the like for the Python whose packages lie in ``sites``."""
    roots: list[Path] = []
    packages: dict[str, Path] = {}
    names: set[str] = set()
    queue = list(sites)
    for folder in queue:
        entries = sorted(entry.name for entry in entries_of(folder))
        names |= _names_in(entries)
        for file in (folder / name for name in entries if name.endswith(".pth")):
            for line in _lines(file):
                if not line.startswith(("import ", "import\t")):
                    roots.append(Path(os.path.realpath(folder / line)))
                    continue
                queue += [each for each in map(Path, _ADDED_SITE.findall(line)) if each not in queue]
                for module in _IMPORTED.findall(line):
                    packages |= _mapping(folder / f"{module}.py")
    there = [root for root in roots if is_folder_here(root)]
    elsewhere = [root for root in there if not INSTALLED & set(root.parts)]
    for other in set(there) - set(elsewhere):  # another Python's packages
        names |= _names_in(entry.name for entry in entries_of(other))
    return Editable(tuple(queue), tuple(dict.fromkeys(elsewhere)), packages, frozenset(names))


def _names_in(entries: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in entries if not name.endswith((".pth", ".dist-info"))}


def _unknown_finders(installed: Editable) -> dict[Path, list[str]]:
    """Distributions that were installed editable in a way that is not known here, by their projects.

    Their finders may come before all folders.
    """
    found: dict[Path, list[str]] = {}
    known = [*installed.roots, *installed.packages.values()]
    for record in (record for folder in installed.sites for record in folder.glob("*.dist-info/direct_url.json")):
        project = _editable_project(record)
        if project is not None and not any(each.is_relative_to(project) for each in known):
            found.setdefault(project, []).append(record.parent.name.partition("-")[0])
    return found


def _mapping(finder: Path) -> dict[str, Path]:
    """What a finder maps that setuptools wrote (``MAPPING``), or the package editables (calls of ``map_module``)."""
    found: dict[str, Path] = {}
    for node in ast.walk(syntax_tree(finder)):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="MAPPING")], value=ast.Dict() as mapping)
                | ast.AnnAssign(target=ast.Name(id="MAPPING"), value=ast.Dict() as mapping)
            ):
                pairs = list(zip(mapping.keys, mapping.values, strict=True))
            case ast.Call(func=ast.Attribute(attr="map_module"), args=[name, path]):
                pairs = [(name, path)]
            case _:
                continue
        for key, value in pairs:
            match key, value:
                case ast.Constant(value=str(package)), ast.Constant(value=str(where)):
                    file = Path(where)
                    found[package] = file.parent if file.name == "__init__.py" else file
    there = {
        name: path if is_folder_here(path) or is_file_here(path) else path.with_suffix(".py")
        for name, path in found.items()
    }
    return {name: Path(os.path.realpath(path)) for name, path in there.items()}


def _editable_project(direct_url: Path) -> Path | None:
    """The project of a distribution that was installed editable, from PEP 610's record; None for other ones."""
    import json  # noqa: PLC0415 -- a dry run needs neither
    from urllib.parse import unquote, urlsplit  # noqa: PLC0415

    try:
        record = json.loads(read_followed(direct_url))
        if record["dir_info"]["editable"]:
            return Path(unquote(urlsplit(record["url"]).path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no such record
        pass
    return None


def _lines(file: Path) -> list[str]:
    try:
        text = read_followed(file).decode("utf-8-sig")
    except (OSError, ValueError):  # Python itself skips it with a warning
        return []
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def site_folders(cluster: ClusterConfig, working_directory: Path) -> list[Path]:
    """Where the packages of the job's Python lie, from how it is laid out; empty if that cannot be told from here."""
    python = cluster.python or sys.executable
    if cluster.container.engine is not None:
        return []
    if os.sep not in python:
        # Modules and lines of shell may put another one first.
        found = None if cluster.setup or cluster.modules else shutil.which(python)
        if found is None:
            return []
        python = found
    given = working_directory / os.path.expanduser(python)  # noqa: PTH111 -- pathlib's raises for an unknown user
    folders, sees_users = [given.parent.parent], False
    lines = "\n".join(_lines(folders[0] / "pyvenv.cfg"))
    settings = dict(re.findall(r"(?m)^([\w-]+)\s*=\s*(.*)$", lines))
    if settings.get("include-system-site-packages", "true").lower() == "true":
        real = Path(os.path.realpath(given))
        folders = [
            *(folders if settings else ()),
            Path(settings["home"]).parent if "home" in settings else real.parent.parent,
        ]
        sees_users = "PYTHONNOUSERSITE" not in os.environ
    sites = [site for folder in dict.fromkeys(folders) for kind in _SITE_KINDS for site in sorted(folder.glob(kind))]
    if sees_users:
        home = Path(os.path.expanduser("~"), ".local", "lib")  # noqa: PTH111
        users = (home / version / "site-packages" for version in sorted({site.parent.name for site in sites}))
        sites += [site for site in users if is_folder_here(site)]
    # By the first of its names each: lib64 is often a link to lib.
    return [*{os.path.realpath(site): site for site in reversed(sites)}.values()][::-1]


def importable(root: Path, *, spaces: bool = True) -> dict[str, Path]:
    """Modules and packages that Python finds in a folder by their names; ``spaces``: those without an ``__init__.py``.

    These are looked for in their folders, of which there may be many.
    """
    found: dict[str, Path] = {}
    for entry in entries_of(root, _MOST_BESIDE):
        name, _, suffix = entry.name.partition(".")
        if not name.isidentifier() or name in _NEVER_IMPORTED:
            continue
        is_package = not suffix and (_is_regular(entry) or (spaces and holds_python(entry)))
        if is_package or entry.suffix in (".py", ".so"):
            found[name] = entry
    return found


def _is_regular(path: Path) -> bool:
    """Whether it stands for its name alone: packages without an ``__init__.py`` hide none of the same name."""
    return bool(path.suffix) or is_file_here(path / "__init__.py")


@dataclass
class ImportRoots:
    """Where in a project the job imports from, which comes before all that is installed."""

    folders: list[Path] = field(default_factory=list)
    packages: dict[str, Path] = field(default_factory=dict)
    """Those that are importable by themselves, by their names as paths: their folder would hide others."""

    def add(self, root: Path, taken: frozenset[str]) -> None:
        """Let the job import from ``root`` what is not ``taken`` by an installed module."""
        if taken.intersection(importable(root, spaces=False)):
            found = importable(root)
            for name in found.keys() - taken:
                self.packages.setdefault(found[name].name, found[name])
        elif root not in self.folders:
            self.folders.append(root)


def import_roots(
    config: RunConfig, project: Path, working_directory: Path, installed: Editable, first: Sequence[Path]
) -> ImportRoots:
    """The folders of ``project`` that the job imports from: ``first``, those of PYTHONPATH, then those of the project.

    It is the same from whichever folder a script is launched. The project's own folders hide nothing that is installed.
    """
    roots = ImportRoots(
        [
            *dict.fromkeys(
                path for path in (*first, *_searched(config, working_directory)) if path.is_relative_to(project)
            )
        ]
    )
    names = installed.names if installed.sites else read_editable([Path(each) for each in sys.path]).names
    taken = (names | sys.stdlib_module_names) - _NEVER_IMPORTED
    for root in installed.roots:
        if root.is_relative_to(project):
            roots.add(root, taken)
    for name, path in installed.packages.items():
        if not path.is_relative_to(project) or name.partition(".")[0] in taken:
            continue
        parts = name.split(".")
        if path.with_suffix("").parts[-len(parts) :] == tuple(parts):
            roots.add(path.parents[len(parts) - 1], taken)
        else:
            roots.packages.setdefault(name.replace(".", "/") + path.suffix, path)
    roots.add(project, taken)
    if is_folder_here(project / "src"):
        roots.add(project / "src", taken)
    return roots


def require_module(module: str, holders: Sequence[Path], roots: ImportRoots, installed: Editable) -> None:
    """Raises HpcmmError if no folder that the job imports from, and no package of its Python, has the module."""
    top, *_ = parts = module.split(".")
    folders = [*holders, *roots.folders, *(path.parent for path in roots.packages.values())]
    holder = next((each for each in folders if is_folder_here(each / top) or is_file_here(each / f"{top}.py")), None)
    if holder is None:
        if installed.sites and top not in {*installed.names, *installed.packages, *sys.stdlib_module_names}:
            raise HpcmmError(f"There is no module {module}: neither the project nor the job's Python has {top}.")
        return
    path = holder.joinpath(*parts)
    found = [entry.name for entry in entries_of(path.parent) if entry.name.partition(".")[0] == path.name]
    if not is_folder_here(path) and not any(Path(name).suffix in CODE for name in found):
        raise HpcmmError(f"There is no module {module}: {holder} has {top}, but not that module.")
    if is_folder_here(path) and not is_file_here(path / "__main__.py") and f"{path.name}.py" not in found:
        raise HpcmmError(f"{module} is a package without a __main__.py: name the module in it that is to run.")


def _searched(config: RunConfig, working_directory: Path) -> Iterator[Path]:
    """The folders from which Python imports here, and would in the job, but for installed packages."""
    asked, here = list(folders_of_pythonpath(config, working_directory)), working_directory.resolve()
    yield from asked
    library = Path(os.__file__).parent.resolve()
    for folder in (Path(entry).resolve() for entry in (*sys.path, *searched_at_last()) if entry):
        # `python -m` puts the folder of the launch first, which a script is not run with.
        is_of_the_launch = folder == here and config.task.name != FUNCTION and config.task.module is None
        is_installed = bool(INSTALLED & set(folder.parts)) or folder.is_relative_to(library)
        if is_folder_here(folder) and not is_of_the_launch and not is_installed:
            yield folder


def folders_of_pythonpath(config: RunConfig, working_directory: Path) -> Iterator[Path]:
    """The folders of PYTHONPATH, here and in the job. An empty entry of it is the folder that the job runs in."""
    for path in (os.environ.get("PYTHONPATH"), config.cluster.environment.get("PYTHONPATH")):
        for entry in path.split(os.pathsep) if path else ():
            folder = (working_directory / entry).resolve()
            if is_folder_here(folder) and not INSTALLED & set(folder.parts):
                yield folder


def live_packages(
    config: RunConfig, project: Path | None, working_directory: Path, installed: Editable
) -> dict[Path, list[str]]:
    """Packages outside of ``project`` that the job reads where they lie, by the folder or file that holds them."""
    live = {path: [name] for name, path in installed.packages.items()}
    checkouts = (folder for folder in folders_of_pythonpath(config, working_directory) if project_root(folder))
    for root in (*installed.roots, *checkouts):
        names = sorted(importable(root, spaces=False)) or sorted(importable(root))
        if names and not is_file_here(root / PACKAGE.name / "__init__.py"):
            live[root] = names
    outside = {path: names for path, names in live.items() if project is None or not path.is_relative_to(project)}
    return {path: names for path, names in (outside | _unknown_finders(installed)).items() if names != [PACKAGE.name]}


def open_links(copied: Collection[Path], project: Path, scripts: Sequence[Path]) -> tuple[set[Path], set[Path]]:
    """Of the links among the files that are copied, those that others may make a package of once the job is queued, by
    an ``__init__.py`` in the folder to which they lead; and the ones by whose name the job may import something else.
    """
    named = [path for path in copied if path.name.isidentifier() and path.is_symlink()]
    opened = {link for link in named if not link.is_file() and _may_become_a_package(link, scripts)}
    if not opened:
        return set(), set()
    bases = {project, *(script.parent for script in scripts)}
    elsewhere = [entry for entry in sys.path if entry and not Path(entry).resolve().is_relative_to(project)]
    installed = {link: PathFinder.find_spec(link.name, elsewhere) for link in opened if link.parent in bases}
    found = {link for link, spec in installed.items() if spec is not None and spec.origin}  # no mere folder
    looked_for = {path for file in copied if file.suffix == ".py" for path in _looked_for(file, bases)}
    found |= (opened & looked_for) | {link for link in opened if link.with_suffix(".py") in copied}
    return opened, found


def _may_become_a_package(link: Path, scripts: Sequence[Path]) -> bool:
    """Whether others can change where a link leads, or put something into the folder that is there or one below it.

    Not who owns that folder: the link's owner has chosen it.
    """
    end, found = Path(os.path.realpath(link)), exchangeable(link)
    if found is not None and found.reach >= Reach.group:
        return True
    there = next(each for each in (end, *end.parents) if is_folder_here(each))
    return Vouched(there, scripts, trusted=[there.stat().st_uid]).is_open_within(there)


def data_in(link: Path) -> set[Path]:
    """What lies in the folder to which a link leads now, by the link, without code: to be linked one by one."""
    there = entries_of(Path(os.path.realpath(link)), _MOST_BESIDE)
    return {link / each.name for each in there if each.suffix not in CODE and each.name != "__pycache__"}


def _looked_for(file: Path, bases: Collection[Path]) -> Iterator[Path]:
    """Where the imports of a file may find what they name, without the suffix."""
    for node in ast.walk(syntax_tree(file)):
        starts, names = {*bases, file.parent}, list[str]()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            starts = {file.parents[min(node.level, len(file.parents)) - 1]} if node.level else starts
            names = [".".join(filter(None, [node.module, alias.name])) for alias in node.names]
        for start in starts:
            for parts in (name.split(".") for name in names):
                yield from (start.joinpath(*parts[:length]) for length in range(1, len(parts) + 1))


def read_in_working_directory(scripts: Sequence[Path], words: Sequence[str], working_directory: Path) -> list[str]:
    """Code and settings that scripts or command lines name by a relative path, in the order of their names.

    The job runs in the folder that it was launched from, so such a path leads to the original and not to the copy.
    """
    named, searched, here = {word.rpartition("=")[2] for word in words}, set[str](), working_directory
    lines = [word for word in words if " " in word]  # of a shell, behind its -c
    for script in scripts:
        if script.suffix != ".py":
            lines += _lines(script)
        tree = syntax_tree(script)
        named |= set(_plain_texts(tree))
        searched |= set(_search_path_entries(tree))
    named |= {word for line in lines for word in _SHELL_WORD.findall(line)}
    files = {name for name in named if Path(name).suffix in CODE | SETTINGS and _is_there(name, here)}
    files -= {name for name in files if (here / name).resolve() in scripts}
    return sorted(files | {f"{name}/" for name in searched if _is_there(name, here, is_folder=True)})


_SHELL_WORD = re.compile(r"[^\s'\"`();|&<>=]+")


def _is_there(name: str, working_directory: Path, *, is_folder: bool = False) -> bool:
    if not 0 < len(name) < 500 or "\0" in name or Path(name).is_absolute():
        return False
    path = working_directory / name
    return is_folder_here(path) if is_folder else is_file_here(path)


def _search_path_entries(tree: ast.AST) -> Iterator[str]:
    """What a script puts on ``sys.path`` that does not depend on where the script lies."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="append" | "insert", value=holder), args=[*_, entry]):
                text = ast.unparse(entry)
                if ast.unparse(holder) == "sys.path" and "__file__" not in text:
                    yield from _plain_texts(entry)
                    if "cwd()" in text:
                        texts = [each.value for each in ast.walk(entry) if isinstance(each, ast.Constant)]
                        yield from [each for each in texts if isinstance(each, str)] or ["."]


def _plain_texts(tree: ast.AST) -> Iterator[str]:
    """Each text of a script that is not joined to a folder, as in ``folder / "name"`` or ``join(folder, "name")``."""
    joined: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Div() | ast.Add(), right=right):
                joined.add(right)
            case ast.Call(func=ast.Attribute(attr="join" | "joinpath" | "with_name"), args=arguments):
                joined.update(arguments)
            case ast.Constant(value=str(text)) if node not in joined:
                yield text


_MOST_READ = 2000
"""Files of a project that are followed from import to import."""
_DEEPSPEED = "deepspeed"


def used_packages(scripts: Sequence[Path], bases: Collection[Path], words: Collection[str] = ()) -> frozenset[str]:
    """Packages that ``scripts``, and the files of ``bases`` that they import in turn, import by name.

    ``deepspeed`` also if a framework is to import it: something there, or one of ``words``, is called after it.
    """
    found: set[str] = {_DEEPSPEED} if any(_DEEPSPEED in word.lower() for word in words) else set()
    queue = list(scripts)
    known = set(queue)
    for file in queue:
        tree = syntax_tree(file)
        for node in ast.walk(tree):
            match node:
                case ast.Import():
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                case ast.ImportFrom(module=str(module), level=0):
                    found.add(module.partition(".")[0])
            found |= {_DEEPSPEED} if _DEEPSPEED in _word_of(node).lower() else set()
        for path in _looked_for(file, bases):
            for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                if candidate not in known and len(queue) < _MOST_READ and is_file_here(candidate):
                    known.add(candidate)
                    queue.append(candidate)
    return frozenset(found)


_PATH = re.compile(r"[\w./~+-]+\.py\b")


def scripts_named(words: Collection[str], folder: Path) -> list[Path]:
    """Python files in ``folder`` that a command line names, also within a line of a shell."""
    names = dict.fromkeys(name for word in words for name in _PATH.findall(word))
    return [path.resolve() for name in names if is_file_here(path := folder / name)]


def _word_of(node: ast.AST) -> str:
    """A name, a keyword, or a text that is one word; empty for all else, such as prose."""
    match node:
        case ast.Name(id=str(word)) | ast.Attribute(attr=str(word)) | ast.keyword(arg=str(word)) | ast.alias(name=word):
            return word
        case ast.Constant(value=str(text)) if not any(map(str.isspace, text)):
            return text
    return ""
