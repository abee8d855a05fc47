"""What git says of a project: its files, its commit, and the changes that are not committed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hpcmm.errors import HpcmmError

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
