"""A node's network: a free port for the rendezvous, and which nodes of the job can be reached."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpcmm.errors import HpcmmError

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000


def find_free_port(host: str = "") -> int:
    """A port on which nothing listens on ``host`` (all addresses by default). Raises HpcmmError when none is free."""
    with hold_free_port(host) as held:
        return port_of(held)


def hold_free_port(host: str = "") -> socket.socket:
    """A socket that keeps a free port from everyone but who will listen on it.

    Taken at random below the kernel's own range, from which outgoing connections get their ports. Linux lets two
    sockets share a port when both allow it (``SO_REUSEADDR``) and neither listens yet. This one is bound while it does
    not allow it, so no second call can get its port; then it does, so that PyTorch's store, whose socket does too,
    can listen there. Raises HpcmmError when no port is free.
    """
    highest = max(_ephemeral_start(), _LOWEST + 1)
    for port in random.sample(range(_LOWEST, highest), min(200, highest - _LOWEST)):
        held = socket.socket()
        try:
            held.bind((host, port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise HpcmmError(f"No free TCP port between {_LOWEST} and {highest} on this node for the ranks to meet at.")


def port_of(held: socket.socket) -> int:
    """The port that a socket is bound to."""
    return int(held.getsockname()[1])


def _ephemeral_start() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 32_768  # Linux' default


_CLOSED_PORT = 1
"""tcpmux, on which nothing listens: a host that is there refuses at once, one that is cut off does not answer."""

_TIMEOUT_S = 3.0
_MOST_NODES = 256
_THREADS = 64


def unreachable_nodes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Nodes of this Slurm job that do not answer within seconds; none if every one is silent, as behind a firewall.

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
