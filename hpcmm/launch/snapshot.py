"""The code of a run, copied when it is submitted: a job that queues for a day runs what was submitted.

Copied are hpcmm itself, and the project of a script, a function or classes of the user's: what git tracks there and
what it would track (new files that are not ignored), as it lies on disk, uncommitted changes included.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmm.config.class_source import holder_of
from hpcmm.config.schema import FUNCTION, SCRIPT, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.resources import PACKAGE, resource
from hpcmm.runs.run_dir import RunDir

_TIMEOUT_S = 60
_CREDENTIALS = re.compile(
    r"\.env(\..+)?|\.netrc|\.pypirc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|.+\.(pem|key|p12|pfx)|credentials(\.json)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Revision:
    """The state of a project. ``commit`` is None before its first commit."""

    commit: str | None
    changes: bytes
    """A patch against the commit, binary files included; new files that were never added are not in it."""


def project_root(folder: Path) -> Path | None:
    """The work tree that ``folder`` lies in, or None."""
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)


def listed_files(root: Path) -> list[Path]:
    """The files that git tracks, and new ones that are not ignored; those of submodules too. Deleted ones are left out.

    So are new files that hold credentials by their names, and a line on stderr says which. Raises HpcmmError when git
    cannot tell.
    """
    tracked = _names(_git(root, "ls-files", "-z", "--cached"))
    new = _names(_git(root, "ls-files", "-z", "--others", "--exclude-standard")) - tracked
    secret = sorted(name for name in new if _CREDENTIALS.fullmatch(Path(name).name))
    if secret:
        print(
            f"hpcmm: not copied, for they look like credentials: {', '.join(map(ascii, secret))}. `git add` one that "
            "the job needs, or name it in .gitignore.",
            file=sys.stderr,
        )
    names = sorted((tracked | new).difference(secret))
    files: list[Path] = []
    for path in (root / name for name in names):
        if path.is_symlink() or path.is_file():
            files.append(path)
        elif (path / ".git").exists():
            files += listed_files(path)
    return files


def _names(listed: bytes) -> set[str]:
    return {os.fsdecode(name) for name in listed.split(b"\0") if name}


def revision(root: Path) -> Revision:
    """Commit and changes. Raises HpcmmError when git cannot tell."""
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode("ascii").strip()
    except HpcmmError:
        _git(root, "status", "--porcelain")  # so that only a repository without a commit passes
        return Revision(None, b"")
    return Revision(commit, _git(root, "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD"))


def _git(root: Path, *arguments: str) -> bytes:
    # Variables such as GIT_DIR, which git sets for its hooks, would name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=environment,
        )
    except FileNotFoundError as error:
        raise HpcmmError(_cannot(root, "git is not installed")) from error
    except subprocess.TimeoutExpired as error:
        raise HpcmmError(_cannot(root, f"no answer within {_TIMEOUT_S} s")) from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        raise HpcmmError(_cannot(root, reason[0]))
    return done.stdout


def _cannot(root: Path, reason: str) -> str:
    return f"git cannot read {root} ({reason}): put that right, or launch with launch.snapshot=false."


_MB = 10**6
_RESOURCES = ("conf", "slurm", "profiles/nsys")


@dataclass(frozen=True)
class CodePlan:
    """Where the job's code comes from. Planning it reads no more than where things lie."""

    project: Path | None
    """The user's project; None if the task is hpcmm's own, or if nothing is copied."""
    python_path: tuple[str, ...]
    """Folders that the job's Python searches first."""
    script: str | None
    """The script that the ranks run."""


def plan_code(config: RunConfig, run: RunDir, working_directory: Path, targets: Collection[str] = ()) -> CodePlan:
    """What a job of ``config`` runs, whose points name the classes ``targets``.

    Raises HpcmmError if the script is not there, or classes lie in several projects.
    """
    task = config.task
    script = _existing_script(task.path, working_directory) if task.name == SCRIPT else None
    holders = _holders_of(targets)
    if not config.launch.snapshot:
        here = [str(working_directory)] if task.name == FUNCTION else list(map(str, holders))
        return CodePlan(None, (str(PACKAGE.parent), *here), str(script) if script else None)
    own = str(_hpcmm_copy(run))
    if (task._target_ is not None and not holders) or (task.target or "").startswith("hpcmm."):
        return CodePlan(None, (own,), None)
    start = holders[0] if holders else script.parent if script else working_directory
    project = project_root(start) or start
    for holder in holders:
        if not holder.is_relative_to(project):
            raise HpcmmError(
                f"Classes of this run lie in {holder} and in {project}, and one project is copied: put them together, "
                "install one of them, or set launch.snapshot=false."
            )
    copies = [
        str(_project_copy(run) / entry.relative_to(project))
        for entry in (*holders, *_import_folders(working_directory, task.name))
        if entry.is_relative_to(project)
    ]
    copied_script = str(_project_copy(run) / script.relative_to(project)) if script else None
    return CodePlan(project, (own, *dict.fromkeys(copies)), copied_script)


def _holders_of(targets: Iterable[str]) -> list[Path]:
    """The folders from which the user's own classes are imported: those of the workload, and those of parts.

    None of an installed package, which the nodes have as well. Raises HpcmmError for a package that is not there.
    """
    found: list[Path] = []
    for top in sorted({target.partition(".")[0] for target in targets} - {"hpcmm"}):
        holder = holder_of(top)
        if holder is None:
            raise HpcmmError(f"The package {top} of this run's classes is not a folder or file here: set PYTHONPATH.")
        if "site-packages" not in holder.parts:
            found.append(holder)
    return list(dict.fromkeys(found))


def take_snapshot(config: RunConfig, run: RunDir, project: Path | None) -> str:
    """Copy the code to ``run.code``. Returns the SHA-256 of all names and contents.

    Raises HpcmmError when git cannot list the project or the code is above ``launch.snapshot_limit_mb``.
    """
    files = [(source, _hpcmm_copy(run) / name) for source, name in _own_files()]
    if project is not None:
        runs_root = Path(config.runs_root).expanduser().absolute()
        listed = [file for file in _project_files(project) if not file.is_relative_to(runs_root)]
        _check_size(project, listed, config.launch.snapshot_limit_mb)
        files += [(file, _project_copy(run) / file.relative_to(project)) for file in listed]
    digest = hashlib.sha256()
    for folder in {target.parent for _, target in files}:
        folder.mkdir(parents=True, exist_ok=True)
    for source, target in sorted(files, key=lambda pair: pair[1]):
        digest.update(f"{target.relative_to(run.code)}\0{_copy(source, target)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _hpcmm_copy(run: RunDir) -> Path:
    return run.code / "hpcmm"


def _project_copy(run: RunDir) -> Path:
    return run.code / "project"


def _existing_script(path: str | None, working_directory: Path) -> Path:
    assert path is not None  # validated
    try:
        script = working_directory / Path(path).expanduser()
        if script.is_file():
            return script.resolve()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed, another's home
        raise HpcmmError(f"task.path is {path[:200]}, which cannot be looked up ({error}).") from error
    raise HpcmmError(f"task.path is {path}, but there is no such file in {working_directory}.")


def _import_folders(working_directory: Path, task: str) -> Iterator[Path]:
    """The folders from which Python imports here, and would in a script of the project."""
    if task == FUNCTION:
        yield working_directory.resolve()
    for entry in sys.path:
        folder = Path(entry or working_directory).resolve()
        if entry and folder.is_dir() and "site-packages" not in folder.parts:
            yield folder


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
    return (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _project_files(project: Path) -> list[Path]:
    if project_root(project) == project:
        return listed_files(project)
    # No git: the Python files beside the script, and the packages there, without hidden files such as .env.
    modules = [entry for entry in project.glob("*.py") if entry.is_file()]
    packages = [entry for entry in project.iterdir() if entry.is_dir() and any(entry.glob("*.py"))]
    inside = (file for package in packages for file in _files_under(package))
    return [*modules, *(file for file in inside if not _is_hidden(file.relative_to(project)))]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _check_size(project: Path, files: Sequence[Path], limit_mb: int) -> None:
    sizes = {file: file.lstat().st_size for file in files}
    total_mb = sum(sizes.values()) / _MB
    if total_mb > limit_mb:
        largest = max(sizes, key=lambda file: sizes[file])
        raise HpcmmError(
            f"The code under {project} has {total_mb:.0f} MB, above launch.snapshot_limit_mb of {limit_mb}; its "
            f"largest file is {largest.relative_to(project)} ({sizes[largest] / _MB:.0f} MB): list data in .gitignore, "
            "raise the limit, or set launch.snapshot=false to run the code as it is when the job starts."
        )


def _copy(source: Path, target: Path) -> str:
    """Copy a file or link. Returns a digest of what it holds."""
    if source.is_symlink():
        pointed = source.readlink()
        # os.path's, for pathlib's raises where links lead in a circle.
        inside = Path(os.path.realpath(source.parent / pointed)).is_relative_to(source.parent.resolve())
        target.symlink_to(pointed if inside or pointed.is_absolute() else (source.parent / pointed).absolute())
        return str(pointed)
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    with target.open("rb") as copied:
        return hashlib.file_digest(copied, "sha256").hexdigest()
