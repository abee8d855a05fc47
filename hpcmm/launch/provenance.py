"""``provenance.json``: what a job was made from, so that it can be made again."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.script import python_of
from hpcmm.launch.snapshot import project_root, revision
from hpcmm.resources import PACKAGE
from hpcmm.runs.provenance import write_provenance_record
from hpcmm.runs.run_dir import RunDir


def write_provenance(
    config: RunConfig, run: RunDir, *, overrides: Sequence[str], project: Path | None, code_sha256: str | None
) -> None:
    """Write ``provenance.json``, and beside the code a patch for each project with uncommitted changes."""
    record: dict[str, Any] = {
        "overrides": list(overrides),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": getpass.getuser(),
        "host": platform.node(),
        "working_directory": str(Path.cwd()),
        "config_sha256": _sha256(run.config) if run.config.is_file() else None,
        "script_sha256": _sha256(run.submission_script),
        "code_sha256": code_sha256,
        "code": {"hpcmm": _origin(PACKAGE, run, "hpcmm")},
        "python": {"job": python_of(config), "launcher": sys.executable, "version": platform.python_version()},
        "packages": installed_packages(),
        "modules": [*filter(None, os.environ.get("LOADEDMODULES", "").split(":"))],
    }
    if project is not None:
        record["code"]["project"] = _origin(project, run, "project")
    write_provenance_record(run, record)


def installed_packages() -> dict[str, str]:
    """Versions of the packages that this Python sees, from the names of their metadata folders.

    As https://packaging.python.org/en/latest/specifications/binary-distribution-format lays those down; reading the
    metadata of a hundred packages would take longer than all the rest of a launch.
    """
    found: dict[str, str] = {}
    for folder in reversed([*map(Path, filter(None, sys.path))]):
        if folder.is_dir():
            for entry in folder.glob("*.dist-info"):
                name, _, version = entry.stem.partition("-")
                found[name] = version
    return dict(sorted(found.items(), key=lambda package: package[0].lower()))


def _origin(folder: Path, run: RunDir, name: str) -> dict[str, Any]:
    """Where a part of the code comes from."""
    root = project_root(folder)
    origin: dict[str, Any] = {"path": str(folder)}
    if root is None:
        return origin
    try:
        state = revision(root)
    except HpcmmError as error:
        return origin | {"git": str(error)}
    origin |= {"commit": state.commit, "uncommitted_changes": None}
    if state.changes:
        patch = run.root / f"{name}.patch"
        patch.write_bytes(state.changes)
        origin["uncommitted_changes"] = patch.name
    return origin


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
