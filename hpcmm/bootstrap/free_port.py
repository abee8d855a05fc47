"""A free TCP port for the rendezvous: ``python -m hpcmm.bootstrap.free_port``, on the node where rank 0 will run."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from hpcmm.errors import HpcmmError

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000


def find_free_port(host: str = "") -> int:
    """A port on which nothing listens on ``host`` (all addresses by default).

    Taken at random below the kernel's own range, from which outgoing connections get their ports: nothing but another
    listener can take it until rank 0 binds it. Raises HpcmmError when no port is free.
    """
    highest = max(_ephemeral_start(), _LOWEST + 1)
    for port in random.sample(range(_LOWEST, highest), min(200, highest - _LOWEST)):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise HpcmmError(f"No free TCP port between {_LOWEST} and {highest} on this node for the ranks to meet at.")


def _ephemeral_start() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 32_768  # Linux' default


if __name__ == "__main__":
    print(find_free_port())
