"""Run the node check as a job step on every node: within a job that is there, or in one of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.config.schema import ClusterConfig
from hpcmm.doctor.node import token_file
from hpcmm.errors import HpcmmError
from hpcmm.resources import environment_of_modules, own_module
from hpcmm.slurm.commands import run_command

STEP_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class StepResult:
    """What each node found, by its name; nodes that left no word are missing."""

    nodes: list[str]
    found: dict[str, dict[str, Any]]
    complaint: str
    """srun's own words, where it complained."""


def check_nodes(
    nodes: Sequence[str] | None,
    count: int,
    folders: Sequence[Path],
    srun: Sequence[str],
    *,
    nsys: bool,
    environ: Mapping[str, str] = os.environ,
    timeout_s: float = STEP_TIMEOUT_S,
) -> StepResult:
    """Run the check on ``nodes`` (None: on ``count`` that Slurm chooses), one process each, by ``srun`` with options.

    ``folders`` are tested for being shared; the first of them carries the nodes' words. Raises HpcmmError when that
    cannot be written, or srun is not there.
    """
    request = write_request(nodes, folders, nsys=nsys)
    try:
        step = [*srun, f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpus-per-task=1", "--no-kill"]
        step += [] if nodes is None else [f"--nodelist={','.join(nodes)}", "--overlap"]
        command = [*step, *own_module("hpcmm.doctor.node"), str(request)]
        complaint = _run(command, environment_of_modules(environ), timeout_s)
        return read_answers(request, nodes, complaint)
    finally:
        clean_up(request)


def write_request(nodes: Sequence[str] | None, folders: Sequence[Path], *, nsys: bool) -> Path:
    """What each node is asked, as a file in a folder that only this user can read, for it holds the nodes' secret.

    Raises HpcmmError if ``folders[0]`` cannot be written.
    """
    try:
        folders[0].mkdir(parents=True, exist_ok=True)
        request = Path(tempfile.mkdtemp(prefix=".hpcmm-doctor-", dir=folders[0])) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "id": secrets.token_hex(4),
                    "secret": secrets.token_hex(16),
                    "nodes": None if nodes is None else list(nodes),
                    "folders": [str(folder) for folder in folders],
                    "nsys": nsys,
                }
            ),
            encoding="utf-8",
        )
    except OSError as error:
        raise HpcmmError(
            f"{folders[0]} cannot be written ({error.strerror}): set runs_root to a shared folder."
        ) from error
    return request


def read_answers(request: Path, nodes: Sequence[str] | None, complaint: str = "") -> StepResult:
    """What the nodes wrote beside the request."""
    found = {path.stem: _read(path) for path in request.parent.glob("*.json") if path != request}
    seen = sorted({name for each in found.values() for name in each.get("names", {})})
    known = seen if nodes is None else nodes
    return StepResult(list(known), {node: found.get(node, {}) for node in known}, complaint)


def clean_up(request: Path) -> None:
    """Remove the request with its answers, and what the nodes left in the folders that they tested."""
    asked = _read(request)
    for folder in map(Path, asked.get("folders", [])):
        for token in folder.glob(token_file(folder, asked["id"], "*").name):
            token.unlink(missing_ok=True)
    shutil.rmtree(request.parent, ignore_errors=True)


def allocation_options(cluster: ClusterConfig, time_limit_min: int) -> list[str]:
    """srun's options for a job of its own, by the cluster's configuration."""
    wanted: dict[str, object] = {
        "job-name": "hpcmm-doctor",
        "time": time_limit_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gpus-per-node": cluster.gpus_per_node or None,
    }
    return [f"--{key}={value}" for key, value in wanted.items() if value is not None]


def _run(command: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> str:
    try:
        done = run_command(command, environ, timeout_s)
    except FileNotFoundError as error:
        raise HpcmmError(f"{command[0]} not found: run this on a Slurm login node, or without nodes.") from error
    except subprocess.TimeoutExpired:
        return f"srun did not end within {timeout_s:g} s"
    return done.stderr.strip() if done.returncode else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
