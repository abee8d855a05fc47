"""Break a node's network or the node itself, on purpose, and mend it again.

What is broken is read from the kernel and the process table each time, never remembered, so that it cannot be wrong.
"""

from __future__ import annotations

import json
import re
from typing import Any

from . import daemons, network
from .errors import ClusterError
from .layout import Host, Layout
from .processes import kill_processes_of, run_on

UNITS = {"kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
LEAST_BURST_BYTES = 4096
"""More than one Ethernet frame, or nothing would ever pass."""

BURSTS_PER_SECOND = 200
"""How often the kernel's timer refills the bucket, roughly; a smaller burst would make a fast rate unreachable."""


def rate_in_bits(rate: str) -> int:
    """Bits per second of a rate such as ``30mbit``. Raises ClusterError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(kbit|mbit|gbit)", rate)
    bits = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if not 8_000 <= bits <= 100 * UNITS["gbit"]:
        raise ClusterError(
            f"The rate {rate!r} must be a number with kbit, mbit or gbit, such as 30mbit; 8kbit at least."
        )
    return bits


DIRECTIONS = ("send", "receive")
"""In the order of a link's ends."""


def throttle(layout: Layout, node: Host, rate: str, queue_ms: int, only: str | None = None) -> None:
    """Let a node send, and receive, no more than ``rate``; a packet waits at most ``queue_ms`` before it is dropped.

    The node's own interface limits what it sends, the switch's port what it receives. ``only``: one of the two, and the
    other has its full speed again.
    """
    bits = rate_in_bits(rate)
    if not 1 <= queue_ms <= 60_000:
        raise ClusterError(f"A packet's longest wait must be from 1 to 60000 ms, not {queue_ms}.")
    burst = max(LEAST_BURST_BYTES, bits // 8 // BURSTS_PER_SECOND)
    for direction, (host, interface) in zip(DIRECTIONS, _ends(layout, node), strict=True):
        if only not in (None, direction):
            _lift(host, interface)
            continue
        shaping = f"tbf rate {bits}bit burst {burst}b latency {queue_ms}ms"
        run_on(host, f"tc qdisc replace dev {interface} root {shaping}")


def cut(layout: Layout, node: Host) -> None:
    """Unplug a node's link. Its processes live on."""
    run_on(layout.controller, f"ip link set {node.port} down")


def stop(node: Host) -> None:
    """Kill a node's daemon, its job steps and everything else on it, as a power failure would."""
    kill_processes_of(node)


def mend_link(layout: Layout, node: Host) -> None:
    """Plug a node in again, at full speed."""
    for host, interface in _ends(layout, node):
        _lift(host, interface)
    run_on(layout.controller, f"ip link set {node.port} up")


def _lift(host: Host, interface: str) -> None:
    if _shaping(host, interface):
        run_on(host, f"tc qdisc delete dev {interface} root")


def is_cut_off(layout: Layout, node: Host) -> bool:
    """Whether a node's link is unplugged."""
    link = json.loads(run_on(layout.controller, f"ip -json link show {node.port}"))[0]
    return "UP" not in link["flags"]


def of_node(layout: Layout, node: Host) -> list[str]:
    """What is wrong with a node now, in words; empty when nothing is."""
    if not node.is_there():
        return ["not there"]
    found = _throttled_to(layout, node)
    if is_cut_off(layout, node):
        found.append("cut off")
    if not daemons.slurmd(layout, node).pids():
        found.append("stopped")
    return found


def _throttled_to(layout: Layout, node: Host) -> list[str]:
    """``throttled to RATE`` for both directions, or ``sends at most RATE``."""
    rates = {
        direction: f"{shaping['options']['rate'] * 8 / 1e6:g} Mbit/s"
        for direction, end in zip(DIRECTIONS, _ends(layout, node), strict=True)
        for shaping in _shaping(*end)
    }
    if len(rates) == len(DIRECTIONS) and len(set(rates.values())) == 1:
        return [f"throttled to {rates[DIRECTIONS[0]]}"]
    return [f"{direction}s at most {rate}" for direction, rate in rates.items()]


def _ends(layout: Layout, node: Host) -> tuple[tuple[Host, str], tuple[Host, str]]:
    return (node, network.NODE_INTERFACE), (layout.controller, node.port)


def _shaping(host: Host, interface: str) -> list[dict[str, Any]]:
    disciplines = json.loads(run_on(host, f"tc -json qdisc show dev {interface}"))
    return [discipline for discipline in disciplines if discipline["kind"] == "tbf"]
