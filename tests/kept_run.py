"""Unpacks the runs of an earlier version that ``tests/fixtures/run_v1`` keeps, as if they had been made here."""

from __future__ import annotations

import pickletools
import re
import shutil
import struct
import sys
import tarfile
from pathlib import Path

KEPT = Path(__file__).resolve().parent / "fixtures" / "run_v1"
RUN = "tiny-20261125-205752-5f56"
SWEEP = "seeds-20261125-205857-d583"
PROJECT = "/home/me/project"
"""Stands in the kept files for the folder in which they were made."""
PYTHON = f"{PROJECT}/.venv/bin/python"
SLURM_CONF = "/home/me/cluster/etc/slurm.conf"
UNPACKING = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python has it from 3.11.4 on, and Debian 12 an earlier one."""


def unpack(project: Path, slurm_conf: Path | None = None) -> Path:
    """Lay out ``runs/`` and ``data/`` in the folder ``project``. Returns the run's directory.

    ``slurm_conf``: of the cluster that takes their place; None: theirs, which is no more.
    """
    shutil.copytree(KEPT / "project", project, dirs_exist_ok=True)
    with tarfile.open(KEPT / "binary.tar.xz") as archive:
        archive.extractall(project, **UNPACKING)  # noqa: S202 -- an archive of our own
    runs = project / "runs"
    names = {PYTHON: sys.executable, PROJECT: str(project), SLURM_CONF: str(slurm_conf or SLURM_CONF)}
    with tarfile.open(KEPT / "code.tar.xz") as archive:
        archive.extractall(runs / RUN, **UNPACKING)  # noqa: S202 -- as above
    shutil.copytree(runs / RUN / "code", runs / SWEEP / "code")
    for path in (path for path in runs.rglob("*") if path.is_file() and "code" not in path.relative_to(runs).parts):
        if path.suffix == ".pkl":
            path.write_bytes(_moved_pickle(path.read_bytes(), names))
        elif path.suffix not in {".pt", ".sqlite"}:
            path.write_text(_moved(path.read_text(encoding="utf-8"), names), encoding="utf-8")
    _set_modes(project)
    (runs / "latest").symlink_to(RUN)
    return runs / RUN


def _moved(text: str, names: dict[str, str]) -> str:
    """All at once, the longest name first: what takes a name's place may look like another one."""
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)


def _moved_pickle(content: bytes, names: dict[str, str]) -> bytes:
    """The pickle with its texts moved. It is not loaded: the classes that it names may lie elsewhere by now."""
    ops = [*pickletools.genops(content)]
    ends = [*(place for _, _, place in ops[1:]), len(content)]
    moved = bytearray()
    for (op, argument, place), end in zip(ops, ends, strict=True):
        if op.name == "FRAME":  # a hint of a length that changes
            continue
        if isinstance(argument, str) and PROJECT in argument:
            text = _moved(argument, names).encode()
            moved += b"X" + struct.pack("<I", len(text)) + text
        else:
            moved += content[place:end]
    return bytes(moved)


def _set_modes(project: Path) -> None:
    """Those that a run has, whatever the umask of who checked the repository out."""
    for path in project.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    for root in (project / "runs" / RUN, project / "runs" / SWEEP):
        root.chmod(0o700)
        (root / "submission.sh").chmod(0o700)
        for config in root.rglob("config.yaml"):
            if "code" not in config.relative_to(root).parts:
                config.chmod(0o444)
