"""A free TCP port for the rendezvous, kept until it is used, on the node where rank 0 will listen."""

from __future__ import annotations

import random
import socket
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
