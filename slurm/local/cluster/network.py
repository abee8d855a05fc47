"""The cluster's hosts as network namespaces, joined by a bridge in the controller's namespace.

The bridge does not lie in the machine's own namespace, so that a packet filter of the machine (Docker's, for one)
never sees the traffic between hosts. The machine itself reaches the cluster by a single interface.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network, ip_network
from pathlib import Path

from .errors import ClusterError
from .layout import Layout
from .processes import run, run_on

BRIDGE = "switch"
NODE_INTERFACE = "eth0"
LOCK = Path("/run/hpcmm-cluster.lock")
"""Of the machine: a subnet is taken only once its bridge is there. Nobody but root can make a file in /run."""


@contextmanager
def machine_locked() -> Iterator[None]:
    """Keep other clusters of this machine from choosing a subnet or host names, waiting for whoever does."""
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def free_subnet() -> IPv4Network:
    """A /24 that no route of the machine covers or lies in, default routes aside."""
    routes = json.loads(run("ip", "-json", "-4", "route", "show", "table", "all"))
    used = [ip_network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    for third in range(256):
        subnet = IPv4Network(f"10.77.{third}.0/24")
        if not any(subnet.overlaps(network) for network in used):
            return subnet
    raise ClusterError("Every network in 10.77.0.0/16 is routed on this machine, so that the cluster finds no address.")


def is_complete(layout: Layout) -> bool:
    """Whether all hosts and the machine's own interface are there, with this layout's addresses."""
    if not all(host.is_there() for host in layout.hosts):
        return False
    links = json.loads(run("ip", "-json", "-4", "address"))
    return any(
        link.get("ifname") == layout.machine_interface
        and any(entry["local"] == str(layout.machine_address) for entry in link["addr_info"])
        for link in links
    )


def create(layout: Layout) -> None:
    """Make all hosts and links, from nothing."""
    width = layout.subnet.prefixlen
    control = layout.controller
    for host in layout.hosts:
        host.namespace.touch()
        run("unshare", f"--net={host.namespace}", "true")
        run_on(host, "ip link set lo up")
    run_on(control, f"ip link add {BRIDGE} type bridge")
    run_on(control, f"ip address add {control.address}/{width} dev {BRIDGE}")
    run_on(control, f"ip link set {BRIDGE} up")
    for node in layout.nodes:
        run_on(control, f"ip link add {node.port} type veth peer name {NODE_INTERFACE} netns {node.namespace}")
        _plug_in(layout, node.port)
        run_on(node, f"ip address add {node.address}/{width} dev {NODE_INTERFACE}")
        run_on(node, f"ip link set {NODE_INTERFACE} up")
    machine = layout.machine_interface
    run(*f"ip link add {machine} type veth peer name to-machine netns {control.namespace}".split())
    _plug_in(layout, "to-machine")
    run(*f"ip address add {layout.machine_address}/{width} dev {machine}".split())
    run(*f"ip link set {machine} up".split())


def remove(layout: Layout) -> None:
    """Take away what is there of the hosts and links; a namespace takes its interfaces with it."""
    links = json.loads(run("ip", "-json", "link"))
    if layout.controller.is_there() and any(link.get("ifname") == layout.machine_interface for link in links):
        run("ip", "link", "delete", layout.machine_interface)
    for host in layout.hosts:
        if host.is_there():
            run("umount", str(host.namespace))
        host.namespace.unlink(missing_ok=True)


def _plug_in(layout: Layout, port: str) -> None:
    run_on(layout.controller, f"ip link set {port} master {BRIDGE}")
    run_on(layout.controller, f"ip link set {port} up")
