"""A node's network: a free port for the rendezvous, the way to it, and which nodes of the job can be reached."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import re
import socket
import struct
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    can listen there. Without ``host`` it is a port of IPv6 and IPv4, if the node has both, as PyTorch's store listens.
    Raises HpcmmError when no port is free.
    """
    highest = max(_ephemeral_start(), _LOWEST + 1)
    for port in random.sample(range(_LOWEST, highest), min(200, highest - _LOWEST)):
        held = _bound(host, port)
        if held is not None:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return held
    raise HpcmmError(f"No free TCP port between {_LOWEST} and {highest} on this node for the ranks to meet at.")


def _bound(host: str, port: int) -> socket.socket | None:
    """A socket with the port, on all addresses if ``host`` is empty; None if it is taken."""
    both = not host and socket.has_dualstack_ipv6()
    for family in (socket.AF_INET6, socket.AF_INET) if both else (socket.AF_INET6 if ":" in host else socket.AF_INET,):
        held = socket.socket(family)
        try:
            if family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind((host, port))
        except OSError as error:
            held.close()
            if error.errno == errno.EADDRINUSE:
                return None
            continue  # IPv6 may be switched off
        return held
    return None


def listening_socket(backlog: int) -> socket.socket:
    """A socket that listens on a free port of all addresses, IPv6 and IPv4 if the node has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def port_of(held: socket.socket) -> int:
    """The port that a socket is bound to."""
    return int(held.getsockname()[1])


_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_ANY_COOKIE = 0xFFFFFFFF
_UID_AT = 16 + 64
"""Of the answer: after ``nlmsghdr``, at ``idiag_uid`` of ``inet_diag_msg``."""


def peer_uid(connection: socket.socket) -> int | None:
    """The user who made the other end of a TCP connection within this machine; None if that cannot be told.

    Asked by sock_diag(7), for one socket: /proc/net/tcp lists all of the machine, which other users can make many.
    """
    try:
        (host, port, *_), (own_host, own_port, *_) = connection.getpeername(), connection.getsockname()
        packed = [socket.inet_pton(connection.family, each).ljust(16, b"\0") for each in (host, own_host)]
        ends = struct.pack("!HH16s16s", port, own_port, *packed)
        asked = struct.pack("=BBBxI", connection.family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + ends
        asked += struct.pack("=III", 0, _ANY_COOKIE, _ANY_COOKIE)
        header = struct.pack("=IHHII", 16 + len(asked), _SOCK_DIAG_BY_FAMILY, 1, 0, 0)  # 1: NLM_F_REQUEST
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.send(header + asked)
            answer = kernel.recv(4096, socket.MSG_DONTWAIT)
    except (OSError, ValueError):
        return None
    is_found = len(answer) >= _UID_AT + 4 and struct.unpack_from("=H", answer, 4)[0] == _SOCK_DIAG_BY_FAMILY
    return int(struct.unpack_from("=I", answer, _UID_AT)[0]) if is_found else None


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
    try:
        nodes = job_nodes(environ)
    except HpcmmError:
        return []  # the failure itself is what matters now
    others = [node for node in nodes if node != environ.get("SLURMD_NODENAME")][:_MOST_NODES]
    if not others:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(others))) as pool:
        silent = [node for node, answers in zip(others, pool.map(_answers, others)) if not answers]
    return silent


def job_nodes(environ: Mapping[str, str]) -> list[str]:
    """Names of the job's nodes; none outside of Slurm. Raises HpcmmError if Slurm's list is none."""
    return expand_hosts(environ.get("SLURM_JOB_NODELIST", ""))


_PIECE = re.compile(r"[\w.-]*(?:\[[0-9,-]+\][\w.-]*)*")
_SEPARATOR = re.compile(r",(?![^\[\]]*\])")
"""A comma outside of brackets."""
_BRACKETS = re.compile(r"(\[[^\]]*\])")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MOST_NAMES = 1 << 17


def expand_hosts(listed: str) -> list[str]:
    """The names in a Slurm host list such as ``node[01-03,7],gpu-a[1-2]b``, in its order: what ``scontrol show
    hostnames`` prints, which not every compute node has.

    A number keeps the leading zeros of its range's begin; of several brackets the last one counts up first. Raises
    HpcmmError if ``listed`` is not a host list, or stands for more than 131,072 names.
    """
    names: list[str] = []
    for piece in _SEPARATOR.split(listed) if listed else []:
        if not piece or not _PIECE.fullmatch(piece):
            raise HpcmmError(f"{listed[:200]!r} is not a host list of Slurm's: see {piece[:200]!r} in it.")
        parts = [_numbers(part[1:-1], listed) if part[:1] == "[" else [part] for part in _BRACKETS.split(piece)]
        if math.prod(map(len, parts)) + len(names) > _MOST_NAMES:
            raise HpcmmError(f"{listed[:200]!r} stands for more than {_MOST_NAMES} nodes, which no job has.")
        names += ["".join(chosen) for chosen in itertools.product(*parts)]
    return names


def _numbers(ranges: str, listed: str) -> list[str]:
    """``01-03,7`` as ``01``, ``02``, ``03``, ``7``."""
    found: list[str] = []
    for each in ranges.split(","):
        match = _RANGE.fullmatch(each)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < first + _MOST_NAMES:
            raise HpcmmError(f"{listed[:200]!r} is not a host list of Slurm's: see {each[:200]!r} in it.")
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def _answers(node: str) -> bool:
    try:
        return any(_way_to(address, _CLOSED_PORT) is None for address in _addresses(node))
    except OSError:
        return False


def rendezvous_problem(host: str, port: int, *, on_its_node: bool, patience_s: float) -> str | None:
    """Why this node cannot reach the port on which rank 0 listens or will listen, as words after ``MASTER_ADDR``; None
    if it can.

    ``on_its_node``: this is rank 0's own node, where the name must only resolve. A name may be new and a network slow,
    so both are tried again for ``patience_s``. Each address of the name counts, as for PyTorch.
    """
    until = time.monotonic() + patience_s
    while (problem := _rendezvous_problem(host, port, on_its_node=on_its_node)) and time.monotonic() < until:
        time.sleep(_PAUSE_S)
    return problem


_PAUSE_S = 0.5


def _rendezvous_problem(host: str, port: int, *, on_its_node: bool) -> str | None:
    try:
        addresses = _addresses(host)
    except OSError as error:
        return f"{host} does not resolve ({error.strerror})"
    if on_its_node:
        return None
    if all(_is_loopback(address) for address in addresses) and not _is_taken_here(port):
        return f"{host} resolves to {addresses[0]}, which is this node itself"
    problems = []
    for address in addresses:
        if (problem := _way_to(address, port)) is None:
            return None
        problems.append(f"{address}: {problem}")
    return f"{host} cannot be reached at port {port} ({'; '.join(problems)})"


def _addresses(host: str) -> list[str]:
    """IPv4 and IPv6 addresses of a name, in the system's order. Raises OSError if it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "it is not a host name") from error
    return list(dict.fromkeys(_literal(sockaddr) for *_, sockaddr in found))


def _literal(sockaddr: tuple[Any, ...]) -> str:
    """The address with the scope of a link-local one, which a connection needs."""
    return socket.getnameinfo(sockaddr, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def _way_to(address: str, port: int) -> str | None:
    """Why nothing comes back from ``port`` of ``address`` within seconds; None if something does."""
    try:
        with socket.create_connection((address, port), timeout=_TIMEOUT_S):
            return None
    except ConnectionError:
        return None  # it refused, so it is there
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return str(error.strerror or error)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_taken_here(port: int) -> bool:
    """Whether a process of this machine holds the port: several Slurm nodes may be one machine."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind(("", port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
