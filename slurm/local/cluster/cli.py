"""The command lines of `up`, `down`, `status` and `fault`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import faults, lifecycle, state_directory
from .errors import ClusterError
from .layout import Host, Layout
from .prerequisites import require_root

WHERE = f"The state directory is ${state_directory.VARIABLE}, or {state_directory.DEFAULT}."


def up() -> int:
    """Entry point of `slurm/local/up`."""
    parser = _parser(
        "Start a real four-node Slurm cluster on this machine, or repair it, and wait until jobs can run. "
        "Does nothing when it is already usable."
    )
    parser.add_argument(
        "--prefix",
        type=_prefix,
        help="host names' first part (default: that of the last start, or node; nodeb and so on where that is taken)",
    )
    return _guarded("up", lambda root: _up(root, parser.parse_args().prefix), parser)


def down() -> int:
    """Entry point of `slurm/local/down`."""
    parser = _parser("Stop the cluster: cancel its jobs, end its processes, undo every change to this machine.")
    parser.add_argument("--purge", action="store_true", help="also remove the state directory: job history and logs")
    return _guarded("down", lambda root: _down(root, parser.parse_args().purge), parser)


def status() -> int:
    """Entry point of `slurm/local/status`."""
    parser = _parser("Show the nodes and what is wrong with them. Exit status 0 only when the cluster can be used.")
    return _guarded("status", _status, parser)


def fault() -> int:
    """Entry point of `slurm/local/fault`."""
    parser = _parser("Break a node on purpose, and mend it again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    throttle = commands.add_parser("throttle", help="limit what a node sends and what it receives, or one of them")
    cut = commands.add_parser("cut", help="unplug a node's link; its processes live on")
    stop = commands.add_parser("stop", help="kill a node's slurmd, its job steps and everything else on it")
    restore = commands.add_parser("restore", help="undo all faults of a node and wait until Slurm uses it again")
    for command in (throttle, cut, stop, restore):
        command.add_argument("node", metavar="NODE", help="such as node1")
    throttle.add_argument("rate", metavar="RATE", help="a number with kbit, mbit or gbit, such as 30mbit")
    throttle.add_argument(
        "--queue-ms", type=int, default=400, help="longest wait of a packet before it is dropped (default: %(default)s)"
    )
    throttle.add_argument(
        "--only", choices=faults.DIRECTIONS, help="limit what the node sends, or what it receives (default: both)"
    )
    commands.add_parser("list", help="show the nodes that have a fault")
    return _guarded("fault", lambda root: _fault(root, parser.parse_args()), parser)


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, epilog=WHERE)


def _guarded(name: str, command: Callable[[Path], int], parser: argparse.ArgumentParser) -> int:
    """Run a command under the lock; say in one sentence what is wrong."""
    parser.parse_args()  # help and misuse are answered without root
    try:
        require_root(f"slurm/local/{name}")
        root = state_directory.chosen()
        if name == "up":
            state_directory.create(root)
        elif name == "down" and not root.exists():
            print("No Slurm cluster was up.")
            return 0
        with state_directory.locked(root):
            return command(root)
    except ClusterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status


def _up(root: Path, prefix: str | None) -> int:
    layout = lifecycle.up(root, prefix)
    names = f"{layout.nodes[0].name} to {layout.nodes[-1].name}"
    print(f"The Slurm cluster is up: {names}, 2 stand-in GPUs each. To use it:")
    print(f"  export SLURM_CONF={layout.slurm_conf}")
    return 0


def _down(root: Path, purge: bool) -> int:
    was_up = lifecycle.down(root)
    if purge:
        state_directory.purge(root)
    print("The Slurm cluster is stopped." if was_up else "No Slurm cluster was up.")
    return 0


def _status(root: Path) -> int:
    layout = _started(root)
    wrong = lifecycle.problems(layout)
    if wrong:
        raise ClusterError(" ".join(wrong))
    states = lifecycle.node_states(layout)
    for node in layout.nodes:
        print(f"{node.name}  {node.address}  {states[node.name]}  {', '.join(faults.of_node(layout, node))}".rstrip())
    print(f"export SLURM_CONF={layout.slurm_conf}")
    return 0


def _fault(root: Path, arguments: argparse.Namespace) -> int:
    layout = _started(root)
    if arguments.command == "list":
        for node in layout.nodes:
            if found := faults.of_node(layout, node):
                print(f"{node.name}: {', '.join(found)}")
        return 0
    node = _node(layout, arguments.node)
    match arguments.command:
        case "throttle":
            faults.throttle(layout, node, arguments.rate, arguments.queue_ms, arguments.only)
        case "cut":
            faults.cut(layout, node)
        case "stop":
            faults.stop(node)
        case "restore":
            lifecycle.restore(layout, node)
    print(f"{node.name}: {', '.join(faults.of_node(layout, node)) or 'no fault'}")
    return 0


def _started(root: Path) -> Layout:
    layout = state_directory.recorded(root)
    if layout is None or not any(host.is_there() for host in layout.hosts):
        raise ClusterError("The cluster is not up; start it with slurm/local/up.")
    return layout


def _node(layout: Layout, name: str) -> Host:
    by_name = {node.name: node for node in layout.nodes}
    if name not in by_name:
        raise ClusterError(f"There is no node {name!r}; the nodes are {', '.join(by_name)}.")
    return by_name[name]


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z-]{0,7}", text) or text.endswith("-"):
        raise argparse.ArgumentTypeError("must be one to eight small letters, since interface names are short")
    return text
