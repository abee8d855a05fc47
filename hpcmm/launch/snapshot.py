"""The code of a run, copied when it is submitted: a job that queues for a day runs what was submitted.

Copied are hpcmm itself, and the project of a script, a function or classes of the user's, as it lies on disk; which
files that are, :mod:`hpcmm.launch.project_files` says. The copy comes first where the job's Python looks for packages.
What is read where it lies all the same, is named when it is launched.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from stat import S_IMODE
from typing import NoReturn

from hpcmm.config.class_source import holder_of
from hpcmm.config.command import (
    existing_script,
    module_files,
    place_of_script,
    require_program,
    script_of_program,
)
from hpcmm.config.schema import SCRIPT, RunConfig, TaskConfig
from hpcmm.errors import HpcmmError
from hpcmm.files import CODE, entries_of, has_secret_name, is_file_here, is_folder_here, open_followed
from hpcmm.launch.job_imports import (
    Editable,
    data_in,
    folders_of_pythonpath,
    import_roots,
    importable,
    live_packages,
    open_links,
    read_editable,
    read_in_working_directory,
    require_module,
    site_folders,
)
from hpcmm.launch.project_files import (
    ProjectFiles,
    files_of,
    leads_out,
    marked_root,
    passed_over,
    project_root,
)
from hpcmm.launch.vouched import Vouched
from hpcmm.resources import INSTALLED, PACKAGE, require_own_module, require_own_path, resource
from hpcmm.runs.ownership import is_open_to_all
from hpcmm.runs.run_dir import RunDir

_MB, _CHUNK_BYTES = 10**6, 1 << 20
_MOST_FILES, _MOST_LINKS, _MOST_NAMED = 50_000, 1000, 5
_RESOURCES = ("conf", "slurm", "profiles/nsys")


@dataclass(frozen=True)
class CodePlan:
    """Where the job's code comes from. Planning it reads no more than where things lie."""

    project: Path | None
    """The user's project; None if the task is hpcmm's own, or if nothing is copied."""
    python_path: tuple[str, ...]
    """Folders that the job's Python searches first."""
    script: str | None
    """The script that the ranks run, by themselves or by a launcher, where the job finds it."""
    scripts: tuple[Path, ...] = ()
    """The script, or the module of the function or class, as it lies in the project; of a sweep those of all points."""
    words: tuple[str, ...] = ()
    """The command line of the script, or what the function is given; of a sweep those of all points."""
    working_directory: Path = field(default_factory=Path.cwd)
    packages: dict[str, Path] = field(default_factory=dict)
    """Packages and modules of the project that are importable by themselves, by their names as paths."""
    installed: Editable | None = None
    """What the job's Python reads from elsewhere than its own folders; None if that was not looked up."""
    searched: tuple[Path, ...] = ()
    """Folders of the project that the job imports from."""

    def joined(self, codes: Iterable[CodePlan], tasks: Iterable[TaskConfig]) -> CodePlan:
        """With what the tasks of all points of a sweep read, whose plans are ``codes``."""
        scripts = dict.fromkeys(script for code in codes for script in code.scripts)
        words = dict.fromkeys(
            word for task in tasks for word in (*task.args, *module_files(task), *map(str, task.kwargs.values()))
        )
        return replace(self, scripts=tuple(scripts), words=tuple(words))

    def frozen(self, task: TaskConfig) -> TaskConfig:
        """``task`` with the script of the copy in place of the user's own."""
        if self.script is None:
            return task
        if task.path is not None:
            return replace(task, path=self.script)
        place = place_of_script(task, self.working_directory)
        if place is None:
            return replace(task, program=self.script)
        return replace(task, args=[*task.args[:place], self.script, *task.args[place + 1 :]])


def plan_code(config: RunConfig, run: RunDir, working_directory: Path, targets: Collection[str] = ()) -> CodePlan:
    """What a job of ``config`` runs, whose points name the classes ``targets``.

    Raises HpcmmError if the script is not there, classes lie in several projects, or others can write a folder that the
    job would import from.
    """
    task = config.task
    for folder in filter(is_open_to_all, folders_of_pythonpath(config, working_directory)):
        _refuse_searched(folder, "take it out of PYTHONPATH, in which an empty entry is the current folder")
    script = _script_of(config, working_directory)
    target = task.target or (f"{task.module}:" if task.module else "")
    holders = _holders_of(targets)
    if not config.launch.snapshot:
        here = [working_directory] if target else holders
        modules = [script] if script else [*_modules({*targets, target}, here)]
        for folder in [*here, *([script.parent] if script else [])]:  # Python searches that of a script as well
            if is_open_to_all(folder) or Vouched(folder, modules).is_open(folder):
                _refuse_searched(
                    folder, "leave out launch.snapshot=false, for of such a folder your own files are copied"
                )
        named = str(script) if script else None
        return CodePlan(None, (str(PACKAGE.parent), *map(str, here)), named, tuple(modules))
    own = str(_hpcmm_copy(run))
    if (task._target_ is not None and not holders) or target.startswith("hpcmm."):
        if config.launch.include:
            raise HpcmmError("launch.include names files of a project, but this task runs none of yours: leave it out.")
        return CodePlan(None, (own,), None)
    installed = read_editable(site_folders(config.cluster, working_directory))
    if target and not holders:
        holders = [_holder_of_function(target, working_directory, installed)]
    modules = [script] if script else [*_modules({*targets, target}, holders)]
    start = holders[0] if holders else script.parent if script else working_directory
    project = project_root(start) or marked_root(start) or start
    for holder in holders:
        if not holder.is_relative_to(project):
            raise HpcmmError(
                f"Classes of this run lie in {holder} and in {project}, and one project is copied: put them together, "
                "install one of them, or set launch.snapshot=false."
            )
    first = [working_directory.resolve(), *holders] if target else holders
    roots = import_roots(config, project, working_directory, installed, first)
    if task.module is not None:
        require_module(task.module, holders, roots, installed)
        modules = modules or [*islice(_modules({target}, roots.folders), 1)]  # of the project's src/
    imports = [_imports_copy(run)] if roots.packages else []
    copies = (_project_copy(run) / folder.relative_to(project) for folder in roots.folders)
    return CodePlan(
        project,
        (own, *map(str, (*imports, *copies))),
        str(_project_copy(run) / script.relative_to(project)) if script else None,
        scripts=tuple(modules),
        working_directory=working_directory.resolve(),
        packages=roots.packages,
        installed=installed,
        searched=(*roots.folders, project),
    )


def _script_of(config: RunConfig, working_directory: Path) -> Path | None:
    """The script that the ranks run, also by a launcher or as a program; None for what is no script of the user's.

    Raises HpcmmError if the script or program is not there.
    """
    task = config.task
    if task.program is not None:
        require_program(config, working_directory)
    if (place := place_of_script(task, working_directory)) is not None:
        return existing_script(task.args[place], working_directory)
    if task.program is not None:
        script = script_of_program(task, working_directory)
        project = project_root(working_directory) or marked_root(working_directory) or working_directory
        return script if script is not None and script.is_relative_to(project.resolve()) else None
    return existing_script(task.path, working_directory) if task.name == SCRIPT and task.module is None else None


def _refuse_searched(folder: Path, remedy: str) -> NoReturn:
    raise HpcmmError(
        f"The job would import from {_shown(folder)}, which other users can write, so a module of theirs would run as "
        f"you: close it to them (chmod go-w), or {remedy}."
    )


def _holders_of(targets: Iterable[str]) -> list[Path]:
    """The folders from which the user's own classes are imported: those of the workload, and those of parts.

    None of an installed package, which the nodes have as well. Raises HpcmmError for a package that is not there.
    """
    found: list[Path] = []
    for top in sorted({target.partition(".")[0] for target in targets} - {"hpcmm", "torch"}):
        holder = holder_of(top)
        if holder is None:
            raise HpcmmError(f"The package {top} of this run's classes is not a folder or file here: set PYTHONPATH.")
        if not INSTALLED & set(holder.parts):
            found.append(holder)
    return list(dict.fromkeys(found))


def _holder_of_function(target: str, working_directory: Path, installed: Editable) -> Path:
    """The folder that the module of a function is imported from: the folder of the launch before all others."""
    here, top = working_directory.resolve(), target.partition(":")[0].partition(".")[0]
    if is_folder_here(here / top) or is_file_here(here / f"{top}.py"):
        return here
    if top in installed.packages:
        return installed.packages[top].parent
    roots = [root for root in installed.roots if is_folder_here(root / top) or is_file_here(root / f"{top}.py")]
    holder = roots[0] if roots else holder_of(top)
    return here if holder is None or INSTALLED & set(holder.parts) else holder


def _modules(targets: Iterable[str], holders: Iterable[Path]) -> Iterator[Path]:
    """The files of the user's own modules that hold functions or classes.

    Raises HpcmmError if another user can have put one there, for who owns such a file vouches for others.
    """
    for target in sorted(targets):
        module = target.partition(":")[0] if ":" in target else target.rpartition(".")[0]
        for holder in holders if module else ():
            require_own_module(module, holder)
            path = holder.joinpath(*module.split("."))
            files = (path / "__init__.py", path.with_name(f"{path.name}.py"))  # in the order in which Python looks
            for file in islice(filter(is_file_here, files), 1):
                require_own_path(file, holder)
                yield file


def take_snapshot(config: RunConfig, run: RunDir, code: CodePlan | None) -> str:
    """Copy the code to ``run.code``. Returns the SHA-256 of all names and contents.

    What is not copied is named on stderr. Raises HpcmmError when git cannot list the project, ``launch.include`` names
    what is not there, or the code is above ``launch.snapshot_limit_mb``.
    """
    files = {_hpcmm_copy(run) / name: source for source, name in _own_files()}
    found = ProjectFiles(set(), set(), set())
    if code is not None and (project := code.project) is not None:
        runs_root = Path(config.runs_root).expanduser().absolute()
        found = files_of(project, code.scripts, config.launch.include, code.working_directory, runs_root.resolve())
        opened, in_the_way = open_links(found.copied, project, code.scripts)
        found.copied -= opened
        found.foreign |= in_the_way
        for link in opened - in_the_way:
            found.linked |= data_in(link)
        _check_size(project, found.copied, config.launch.snapshot_limit_mb)
        files |= {_project_copy(run) / file.relative_to(project): file for file in found.copied}
    digest, closed = hashlib.sha256(), []
    run.code.mkdir(parents=True, exist_ok=True)
    for folder in sorted(_folders_above(files, run.code)):
        folder.mkdir(exist_ok=True)
    for target, source in sorted(files.items()):
        try:
            what = _copy(source, target, run, code.project if code else None)
        except OSError as error:  # closed to us, or exchanged or deleted since it was listed
            if Path(os.fsdecode(error.filename or "")) != source:
                raise
            closed.append(source)
            continue
        digest.update(f"{target.relative_to(run.code)}\0{what}\0".encode(errors="surrogateescape"))
    found.copied.difference_update(closed)
    if code is not None:
        _link(code, found, run)
        _say_what_is_not_copied(config, code, found, closed)
    return digest.hexdigest()


def _folders_above(files: Iterable[Path], top: Path) -> set[Path]:
    """The folders below ``top`` that hold these; ``mkdir`` itself makes no very deep ones, for it calls itself."""
    holders = {file.parent for file in files}
    return {each for folder in holders for each in (folder, *folder.parents)[: len(folder.parts) - len(top.parts)]}


def _link(code: CodePlan, found: ProjectFiles, run: RunDir) -> None:
    """Link what is not copied to where it lies, and single packages to their copies."""
    project = code.project
    if project is None:
        return
    for path in sorted(found.linked, key=lambda each: (len(each.parts), each))[:_MOST_LINKS]:
        target = _project_copy(run) / path.relative_to(project)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    for name, path in code.packages.items():
        target = _imports_copy(run) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(_project_copy(run) / path.relative_to(project))


def _say_what_is_not_copied(config: RunConfig, code: CodePlan, found: ProjectFiles, closed: list[Path]) -> None:
    project = code.project or Path()
    said: list[str] = []
    if found.secret:
        names = _named(found.secret, project, most=len(found.secret))
        said.append(
            f"not copied, for they look like credentials: {names}. Name one that the job needs in launch.include."
        )
    if found.foreign:
        said.append(
            "neither copied nor linked, because users who cannot change the script could have written them: "
            f"{_named(found.foreign, project)}. Take over what the job needs (chown, chmod go-w)."
        )
    if found.not_for_git:
        said.append(f"git is not asked about {_shown(project)}, for other users can write {_shown(found.not_for_git)}.")
    if code.project and (above := passed_over(project)) is not None:
        said.append(
            f"{_shown(above)} is not taken as the project, for other users can write there: of {_shown(project)} alone "
            "is copied what the job uses. Take it over (chown, chmod go-w) if the job needs the rest."
        )
    if closed:
        said.append(f"not copied, for they cannot be read: {_named(closed, project)}.")
    if linked := found.linked | {file for file in found.copied if leads_out(file, project)}:
        said.append(
            f"not copied, but linked, so that the job reads them as they are when it runs: {_named(linked, project)}. "
            "launch.include=[...] copies what the job needs as it is now."
        )
    if (lost := len(found.linked) - _MOST_LINKS) > 0:
        said.append(
            f"{lost} more files that are not copied are not linked either: the job finds none where its code lies."
        )
    opened = read_in_working_directory(code.scripts, code.words, code.working_directory) if code.project else []
    if opened:
        said.append(
            f"the job runs in {_shown(code.working_directory)}, so a relative path leads to what lies there "
            f"when it runs, and not to the copy: {', '.join(map(ascii, opened[:_MOST_NAMED]))}{_and_more(opened)}."
        )
    installed = code.installed or read_editable(site_folders(config.cluster, code.working_directory))
    live = live_packages(config, code.project, code.working_directory, installed)
    if code.project:
        live |= _not_in_the_copy(code.project, found, installed)
    for folder, packages in live.items():
        names = ", ".join(packages[:_MOST_NAMED]) + _and_more(packages)
        are = f"package {names} is" if len(packages) == 1 else f"packages {names} are"
        said.append(f"{are} read live from {_shown(folder)} when the job runs.")
    for sentence in said:
        print(f"hpcmm: {sentence}", file=sys.stderr)


def _not_in_the_copy(project: Path, found: ProjectFiles, installed: Editable) -> dict[Path, list[str]]:
    """Packages of the project itself, such as one that git ignores, that the job imports from where they lie."""
    copied = {parent for file in found.copied for parent in (file, *file.parents)}
    there = {path: [name] for name, path in installed.packages.items()}
    there |= {root: names for root in installed.roots if (names := sorted(importable(root)))}
    return {path: names for path, names in there.items() if path.is_relative_to(project) and path not in copied}


def _named(paths: Collection[Path], project: Path, most: int = _MOST_NAMED) -> str:
    """The first of them, as they are named in the project; a folder that holds one file by that."""
    names = []
    for path in sorted(paths, key=lambda each: (len(each.parts), each))[:most]:
        inside = entries_of(path, 2)
        shown = inside[0] if len(inside) == 1 and is_file_here(inside[0]) else path
        name = shown.relative_to(project) if shown.is_relative_to(project) else shown
        names.append(ascii(f"{name}/" if entries_of(shown, 1) else str(name)))
    return ", ".join(names) + _and_more(paths, most)


def _shown(path: Path) -> str:
    return ascii(str(path))[1:-1]


def _and_more(names: Collection[object], most: int = _MOST_NAMED) -> str:
    return f" and {len(names) - most} more" if len(names) > most else ""


def _hpcmm_copy(run: RunDir) -> Path:
    return run.code / "hpcmm"


def _project_copy(run: RunDir) -> Path:
    return run.code / "project"


def _imports_copy(run: RunDir) -> Path:
    return run.code / "imports"


def _own_files() -> Iterator[tuple[Path, Path]]:
    """hpcmm's package and the files that it reads, each with its name in the copy."""
    for file in _files_under(PACKAGE):
        yield file, Path("hpcmm") / file.relative_to(PACKAGE)
    if resource("conf").parent != PACKAGE.parent:
        return  # an installed package holds them itself
    for folder in _RESOURCES:
        for file in _files_under(resource(folder)):
            if "local" not in file.relative_to(resource(folder)).parts:
                yield file, file.relative_to(PACKAGE.parent)


def _files_under(folder: Path) -> Iterator[Path]:
    return (
        file
        for file in folder.rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        and (file.suffix in CODE or not has_secret_name(file.name))
    )


def _check_size(project: Path, files: Collection[Path], limit_mb: int) -> None:
    if len(files) > _MOST_FILES:
        counts = Counter(file.relative_to(project).parts[0] for file in files)
        (largest, count), *_ = counts.most_common(1)
        raise HpcmmError(
            f"The code under {project} has {len(files)} files, above {_MOST_FILES}; {largest} has {count} of them: "
            "list data in .gitignore, or set launch.snapshot=false to run the code as it is when the job starts."
        )
    sizes = {file: file.lstat().st_size for file in files if os.path.lexists(file)}
    total_mb = sum(sizes.values()) / _MB
    if total_mb > limit_mb:
        largest_file = max(sizes, key=lambda file: sizes[file])
        raise HpcmmError(
            f"The code under {project} has {total_mb:.0f} MB, above launch.snapshot_limit_mb of {limit_mb}; its "
            f"largest file is {largest_file.relative_to(project)} ({sizes[largest_file] / _MB:.0f} MB): list data in "
            ".gitignore, raise the limit, or set launch.snapshot=false to run the code as it is when the job starts."
        )


def _copy(source: Path, target: Path, run: RunDir, project: Path | None) -> str:
    """Copy a file or link. Returns a digest of what it holds."""
    if source.is_symlink():
        pointed = source.readlink()
        # os.path's, for pathlib's raises where links lead in a circle.
        end = Path(os.path.realpath(source))
        if project is not None and end.is_relative_to(project):  # to the copy, which may hold a link there in turn
            copy = _project_copy(run) / end.relative_to(project)
            target.symlink_to(pointed if end == source else os.path.relpath(copy, target.parent))
        else:
            target.symlink_to(pointed if pointed.is_absolute() else (source.parent / pointed).absolute())
        return str(pointed)
    digest = hashlib.sha256()
    with open_followed(source) as file, target.open("wb") as made:  # a pipe may be there by now
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            made.write(chunk)
        os.fchmod(made.fileno(), S_IMODE(os.fstat(file.fileno()).st_mode))
    return digest.hexdigest()
