"""Run the node check as a job step on every node: within a job that is there, or in one of its own."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.config.schema import ClusterConfig
from hpcmm.doctor.node import beginning_of_tokens, is_name_of_node, request_id
from hpcmm.errors import HpcmmError
from hpcmm.files import json_object, names_in, read_checked, write_whole
from hpcmm.node.cache import make_folder
from hpcmm.resources import environment_of_modules, own_module

STEP_TIMEOUT_S = 300.0
_MOST_BYTES = 16 * 1024**2
"""Of a node's answer."""


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
    python: Sequence[str] = (sys.executable,),
    environ: Mapping[str, str] = os.environ,
) -> StepResult:
    """Run the check on ``nodes`` (None: on ``count`` that Slurm chooses), one process each, by ``srun`` with options.

    ``python``: words that start the nodes' Python, as :func:`python_of_nodes` has them. ``folders`` are tested for
    being shared; the first of them carries the nodes' words. Raises HpcmmError if that cannot be written, or srun is
    not there.
    """
    request = write_request(nodes, folders, nsys=nsys)
    try:
        step = [*srun, f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpus-per-task=1", "--no-kill"]
        step += [] if nodes is None else [f"--nodelist={','.join(nodes)}", "--overlap"]
        command = [*step, *python, *own_module("hpcmm.doctor.node")[1:], str(request)]
        complaint = _run(command, environment_of_modules(environ), STEP_TIMEOUT_S)
        return read_answers(request, nodes, complaint)
    finally:
        clean_up(request, folders)


def write_request(nodes: Sequence[str] | None, folders: Sequence[Path], *, nsys: bool) -> Path:
    """What each node is asked, as a file in a folder that only this user can read, for it holds the nodes' secret.

    Raises HpcmmError if ``folders[0]`` cannot be written.
    """
    asked = {
        "secret": secrets.token_hex(16),
        "nodes": None if nodes is None else list(nodes),
        "folders": [str(folder) for folder in folders],
        "nsys": nsys,
    }
    request = folders[0] / f".hpcmm-doctor-{secrets.token_hex(8)}" / "request.json"
    try:
        make_folder(folders[0])
        request.parent.mkdir(mode=0o700)
        write_whole(request, json.dumps(asked), 0o600)
    except OSError as error:
        raise HpcmmError(
            f"{folders[0]} cannot be written ({error.strerror}): set runs_root to a shared folder."
        ) from error
    return request


def read_answers(request: Path, nodes: Sequence[str] | None, complaint: str = "") -> StepResult:
    """What the nodes wrote beside the request; an answer that another user could have written counts as none."""
    found = {}
    for name in names_in(request.parent):
        node = name.removesuffix(".json")
        if name not in {request.name, node} and is_name_of_node(node):
            found[node] = _read(request.parent / name)
    seen = sorted({name for each in found.values() for name in each.get("names", {})})
    known = seen if nodes is None else nodes
    return StepResult(list(known), {node: found.get(node, {}) for node in known}, complaint)


def clean_up(request: Path, folders: Sequence[Path]) -> None:
    """Remove the request with its answers, and what the nodes left in ``folders``, which they were to test.

    Nothing that is read decides what is removed.
    """
    for folder in folders:
        beginning = beginning_of_tokens(request_id(request))
        for name in names_in(folder):
            if name.startswith(beginning):
                with suppress(OSError):  # another user's
                    (folder / name).unlink()
    shutil.rmtree(request.parent, ignore_errors=True)


def python_of_nodes(cluster: ClusterConfig) -> list[str]:
    """Words that start the Python of the cluster's jobs, behind the modules and the shell that a job begins with.

    The check runs outside of a container, so in the launcher's Python if there is one.
    """
    if cluster.container.engine is not None:
        return [sys.executable]
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    if lines:
        lines.insert(0, "type module >/dev/null 2>&1 || source /etc/profile")
    lines += cluster.setup
    site = ["bash", "-c", "\n".join(["set -e", *lines, "set +e", 'exec "$@"']), "bash"] if lines else []
    return [*site, cluster.python or sys.executable]


def allocation_options(cluster: ClusterConfig, time_limit_min: int) -> list[str]:
    """srun's options for a job of its own, by the cluster's configuration."""
    wanted: dict[str, object] = {
        "job-name": "hpcmm-doctor",
        "time": time_limit_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        **cluster.gpu_request,
    }
    return [f"--{key}={value}" for key, value in wanted.items() if value is not None]


def _run(command: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> str:
    from hpcmm.slurm.commands import run_command  # noqa: PLC0415 -- a job's nodes use this module too, without it

    try:
        done = run_command(command, environ, timeout_s)
    except FileNotFoundError as error:
        raise HpcmmError(f"{command[0]} not found: run this on a Slurm login node, or without nodes.") from error
    except subprocess.TimeoutExpired:
        return f"srun did not end within {timeout_s:g} s"
    return done.stderr.strip() if done.returncode else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        text, writer = read_checked(path, _MOST_BYTES)
    except (OSError, ValueError):
        return {}
    answer = json_object(text) if writer is None else None
    if answer is None or not _has_shape(answer, _ANSWER) or not all(map(is_name_of_node, answer["names"])):
        return {}
    return answer if _are_pairs(answer.get("all_reduce", {}).get("pairs", [])) else {}


_NUMBER = (int, float)
_GPUS = {"gpus": [{"index": str, "temperature.gpu": str, "ecc.errors.uncorrected.volatile.total": str,
                   "clocks_throttle_reasons.hw_slowdown": str}]}  # fmt: skip
_ANSWER: dict[str, Any] = {
    "python": {"version": str, "": str},
    "packages": {"": str},
    "names": {"": (str, type(None))},
    "interfaces": {"": {"addresses": [str], "mbit_per_s": _NUMBER, "mtu": _NUMBER, "errors": _NUMBER}},
    "infiniband": {"": {"": str}},
    "gpus": _GPUS | {"problem": (str, type(None))},
    "nsys": (str, type(None)),
    "disks": {"": {"free_bytes": _NUMBER, "free_inodes": (*_NUMBER, type(None))}},
}
"""What every answer has. The name "" stands for all others, of which there may be none."""
_MAY_HAVE: dict[str, Any] = {
    "unwritable": {"": str},
    "came": {"": (str, type(None))},
    "clock": {"offset_s": _NUMBER, "error_s": _NUMBER},
    "address": str,
    "interface": (str, type(None)),
    "shared": {"": [str]},
    "all_reduce": {"": object},
    "nsys_problem": (str, type(None)),
}


def _has_shape(value: Any, shape: Any) -> bool:
    """Whether ``value`` holds what is asked: by names, as a list of such values, or of a type."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or not all(key in value for key in shape if key):
            return False
        wanted = {**_MAY_HAVE, **shape} if shape is _ANSWER else shape
        return all(_has_shape(each, wanted.get(key, wanted.get("", object))) for key, each in value.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(each, shape[0]) for each in value)
    return isinstance(value, shape)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 3 and _has_shape(each[:2], [str]) and _has_shape(each[2], _NUMBER)
        for each in value
    )
