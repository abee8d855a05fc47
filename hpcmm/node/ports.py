"""A free TCP port for the rendezvous, kept until it is used: ``python -m hpcmm.node.ports --hold``.

It runs on the node where rank 0 will listen.
"""

from __future__ import annotations

import random
import signal
import socket
import sys
from pathlib import Path

from hpcmm.errors import HpcmmError

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000


def find_free_port(host: str = "") -> int:
    """A port on which nothing listens on ``host`` (all addresses by default). Raises HpcmmError when none is free."""
    with hold_free_port(host) as held:
        return _port_of(held)


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


def _port_of(held: socket.socket) -> int:
    return int(held.getsockname()[1])


def _ephemeral_start() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 32_768  # Linux' default


def main(arguments: list[str]) -> int:
    """Print a free port, and with ``--hold`` keep it until this process is ended."""
    try:
        held = hold_free_port()
    except HpcmmError as error:
        print(f"hpcmm: {error}", file=sys.stderr)
        return 1
    with held:
        print(_port_of(held), flush=True)
        if arguments == ["--hold"]:
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
