"""This node's links to the network: how fast they are, and what they have carried, lost and held back so far."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NET, _INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
_MOST_LINKS = 64
_WORD_BYTES = 4
"""InfiniBand counts words."""


def links() -> dict[str, dict[str, Any]]:
    """Each network interface that is up, but the loopback, and each InfiniBand port, as plain values by its name.

    ``mbit_per_s`` is 0 if it is not known; a virtual link says what it likes, so that its speed is not taken. Bytes,
    errors and drops are counted since the node started. ``held_back`` is how often the interface's own queue
    (``queue``: its kind) had a packet wait for a shaper. What cannot be read is left out.
    """
    return dict([*_interfaces(), *_infiniband_ports()][:_MOST_LINKS])


def sample() -> dict[str, Any]:
    """:func:`links` at a time."""
    return {"unix_ns": time.time_ns(), "links": links()}


def _interfaces() -> list[tuple[str, dict[str, Any]]]:
    """By rtnetlink(7), which needs no privilege: /sys may show those of another network namespace."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as kernel:
            kernel.settimeout(_TIMEOUT_S)
            found = dict(_counted(kernel))
            queues = dict(_queues(kernel))
    except (OSError, struct.error):  # a kernel without, or a sandbox that forbids it
        return []
    return [(name, facts | queues.get(index, {})) for index, (name, facts) in found.items()]


_NETLINK_ROUTE = 0
_GETLINK, _NEWLINK, _GETQDISC, _NEWQDISC = 18, 16, 38, 36
_DUMP = 0x301
"""NLM_F_REQUEST | NLM_F_DUMP."""
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_IFINFO, _TCMSG = struct.Struct("=BxHiII"), struct.Struct("=BxxxiIII")
_IS_UP, _LOOPBACK = 1, 772
_ADDRESS, _NAME, _STATS64 = 1, 3, 23
_STATS = struct.Struct("=8Q")
"""Of ``rtnl_link_stats64``: packets, bytes, errors and drops, received and sent each."""
_ROOT = 0xFFFFFFFF
_KIND, _STATS2, _STATS_QUEUE = 1, 7, 3
_QUEUE = struct.Struct("=5I")
"""``gnet_stats_queue`` of linux/gen_stats.h: length, backlog, drops, requeues, overlimits."""
_TIMEOUT_S = 5.0


def _counted(kernel: socket.socket) -> Iterator[tuple[int, tuple[str, dict[str, Any]]]]:
    """By its number, the name and counts of each interface."""
    for message in _dump(kernel, _GETLINK, _NEWLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        _, kind, index, flags, _ = _IFINFO.unpack_from(message)
        attributes = dict(_attributes(message[_IFINFO.size :]))
        counts = attributes.get(_STATS64, b"")
        if kind == _LOOPBACK or not flags & _IS_UP or len(counts) < _STATS.size:
            continue
        name = attributes[_NAME].rstrip(b"\0").decode("utf-8", "replace")
        received, sent = _STATS.unpack_from(counts)[2::2], _STATS.unpack_from(counts)[3::2]
        facts = {"mbit_per_s": _speed(_NET / name, attributes.get(_ADDRESS, b""))}
        for what, here, there in zip(("bytes", "errors", "dropped"), received, sent):
            facts |= {f"rx_{what}": here, f"tx_{what}": there}
        yield index, (name, facts)


def _speed(folder: Path, address: bytes) -> int:
    """In Mbit/s, of hardware, or of several links bound together; 0 if this is not the interface with ``address``."""
    is_real = (folder / "device").exists() or (folder / "bonding").exists()
    same = _line(folder / "address").replace(":", "") == address.hex()
    return max(0, _number(folder / "speed")) if is_real and same else 0  # -1 if it is not known


def _queues(kernel: socket.socket) -> Iterator[tuple[int, dict[str, Any]]]:
    """By the interface's number, its root queue."""
    for message in _dump(kernel, _GETQDISC, _NEWQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
        _, index, _, parent, _ = _TCMSG.unpack_from(message)
        attributes = dict(_attributes(message[_TCMSG.size :]))
        counts = dict(_attributes(attributes.get(_STATS2, b""))).get(_STATS_QUEUE, b"")
        if parent == _ROOT and len(counts) >= _QUEUE.size:
            _, _, drops, _, overlimits = _QUEUE.unpack_from(counts)
            kind = attributes.get(_KIND, b"").rstrip(b"\0").decode("ascii", "replace")
            yield index, {"queue": kind, "queue_dropped": drops, "held_back": overlimits}


def _dump(kernel: socket.socket, asked: int, answered: int, content: bytes) -> Iterator[bytes]:
    """The content of each message that answers. Raises OSError, and struct.error for half a message."""
    kernel.send(_HEADER.pack(_HEADER.size + len(content), asked, _DUMP, 1, 0) + content)
    while True:
        received = kernel.recv(1 << 18)
        while received:
            length, kind, _, _, _ = _HEADER.unpack_from(received)
            if kind != answered or length < _HEADER.size:
                return  # done, or an error
            yield received[_HEADER.size : length]
            received = received[(length + 3) & ~3 :]


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    while len(content) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(content)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, content[_ATTRIBUTE.size : length]
        content = content[(length + 3) & ~3 :]


def _infiniband_ports() -> Iterator[tuple[str, dict[str, Any]]]:
    for port in sorted(_INFINIBAND.glob("*/ports/*")) if _INFINIBAND.is_dir() else []:
        counters = port / "counters"
        rate = _line(port / "rate").split()[:1]  # 100 Gb/sec (4X EDR)
        yield (
            f"{port.parent.parent.name}/{port.name}",
            {
                "mbit_per_s": round(1000 * float(rate[0])) if rate and rate[0].replace(".", "", 1).isdecimal() else 0,
                "rx_bytes": _WORD_BYTES * _number(counters / "port_rcv_data"),
                "tx_bytes": _WORD_BYTES * _number(counters / "port_xmit_data"),
                "rx_errors": _number(counters / "port_rcv_errors") + _number(counters / "symbol_error"),
                "tx_dropped": _number(counters / "port_xmit_discards"),
            },
        )


def _number(path: Path) -> int:
    """A whole number of the kernel's; 0 if it has none."""
    try:
        return int(_line(path))
    except ValueError:
        return 0


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
