"""Which nodes of the job this node cannot reach, asked when a collective has failed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

_CLOSED_PORT = 1
"""tcpmux, on which nothing listens: a host that is there refuses at once, one that is cut off does not answer."""

_TIMEOUT_S = 3.0
_MOST_NODES = 256
_THREADS = 64


def unreachable_nodes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Nodes of this Slurm job that do not answer within seconds; none where every one is silent, as behind a firewall.

    The nodes are this process' own job's, at most 256 of them.
    """
    others = [node for node in job_nodes(environ) if node != environ.get("SLURMD_NODENAME")][:_MOST_NODES]
    if not others:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(others))) as pool:
        silent = [node for node, answers in zip(others, pool.map(_answers, others), strict=True) if not answers]
    return silent


def job_nodes(environ: Mapping[str, str]) -> Sequence[str]:
    """Names of the job's nodes; none outside of Slurm."""
    listed = environ.get("SLURM_JOB_NODELIST", "")
    if not listed or not re.fullmatch(r"[\w\[\],.-]+", listed):
        return []
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # the failure itself is what matters now
    return done.stdout.split()


def _answers(node: str) -> bool:
    try:
        with socket.create_connection((node, _CLOSED_PORT), timeout=_TIMEOUT_S):
            return True
    except ConnectionError:
        return True  # it refused, so it is there
    except OSError:
        return False
