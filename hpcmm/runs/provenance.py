"""``provenance.json``: what a job was made from, as :mod:`hpcmm.launch.provenance` gathers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcmm.files import read_json_object, write_json
from hpcmm.runs.run_dir import RunDir


def write_provenance_record(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write the file. Raises OSError."""
    write_json(run.provenance, dict(record))


def package_version(run: RunDir, package: str) -> str:
    """The version of a Python package that the launcher's environment had; empty if it is not known."""
    packages = read_json_object(run.provenance).get("packages")
    return str(packages.get(package) or "") if isinstance(packages, dict) else ""
