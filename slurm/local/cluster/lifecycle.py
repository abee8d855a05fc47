"""Start, inspect and stop the whole cluster. Each function expects the caller to hold the state directory's lock."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from . import accounting, daemons, faults, host_names, network, prerequisites, slurm_config, state_directory
from .daemons import Daemon
from .errors import ClusterError
from .layout import Host, Layout
from .processes import kill_processes_of, run, wait_until
from .state_directory import DEFAULT_PREFIX

READY_TIMEOUT_S = 90
CANCEL_PATIENCE_S = 3
OUT_OF_SERVICE = re.compile(r"(down|drain|fail|inval|error|unknown|maint|power|reboot).*")
"""States of a node that takes no jobs, as `sinfo` prints them."""

RESUMABLE = re.compile(r"(down|drain|drained|draining|fail|inval)")
"""Those of them that a node which answers does not leave by itself."""


def up(root: Path, prefix: str | None) -> Layout:
    """Start the cluster, or what is missing of it, and return once jobs can run and be accounted for."""
    prerequisites.require_packages()
    with network.machine_locked():
        _forget_abandoned_names(root)
        layout = _layout_to_start(root, prefix)
        if not problems(layout):
            return layout
        all_stopped = not network.is_complete(layout)
        if all_stopped:
            prerequisites.require_namespaces()
            _stop_everything(layout)
            layout = Layout(root, layout.prefix, network.free_subnet())
        state_directory.record(layout)
        layout.create()
        slurm_config.write(layout)
        if not host_names.are_written(layout):
            host_names.write(layout)
        if all_stopped:
            network.create(layout)
    _start_controller(layout)
    if all_stopped:
        _fail_jobs_without_processes(layout)
    for node in layout.nodes:
        faults.mend_link(layout, node)
        daemons.start(layout, daemons.slurmd(layout, node))
    _wait_for_nodes(layout, layout.nodes)
    return layout


def down(root: Path) -> bool:
    """Stop everything that `up` started and undo what it changed. False when there was nothing."""
    layout = state_directory.recorded(root)
    if layout is None:
        return False
    was_up = any(host.is_there() for host in layout.hosts)
    if daemons.slurmctld(layout).pids():
        _cancel_jobs(layout)
    _stop_everything(layout)
    host_names.remove(root)
    return was_up


def problems(layout: Layout) -> list[str]:
    """Why the cluster cannot be used, one sentence each; empty when it can."""
    if not network.is_complete(layout):
        return ["The cluster is not up."]
    found = [f"{daemon.title} does not run." for daemon in daemons.all_daemons(layout) if not daemon.pids()]
    if not host_names.are_written(layout):
        found.append(f"{host_names.HOSTS_FILE} lacks the cluster's host names.")
    found += [f"{node.name} is cut off." for node in layout.nodes if faults.is_cut_off(layout, node)]
    if found:
        return found
    try:
        states = node_states(layout)
        accounting.require_answer(layout)
    except ClusterError as error:
        return [str(error)]
    return [f"{name} is {state}." for name, state in states.items() if not _works(state)]


def node_states(layout: Layout) -> dict[str, str]:
    """Slurm's word for the state of each node, such as ``idle``, or ``down*`` for one that does not answer."""
    lines = run("sinfo", "-hN", "-o", "%N %T", env=daemons.environment(layout), timeout_s=90).splitlines()
    return dict(line.split() for line in lines)


def restore(layout: Layout, node: Host) -> None:
    """Undo all faults of a node and wait until Slurm uses it again. Job steps that live go on."""
    faults.mend_link(layout, node)
    slurmd = daemons.slurmd(layout, node)
    if slurmd.pids() and not _works(node_states(layout)[node.name]):
        daemons.stop(slurmd)  # a new slurmd registers at once; the old one waits for the controller's next ping
    daemons.start(layout, slurmd)
    _wait_for_nodes(layout, (node,))


def _layout_to_start(root: Path, prefix: str | None) -> Layout:
    recorded = state_directory.recorded(root)
    if recorded is None:
        subnet = network.free_subnet()
        return Layout(root, prefix, subnet) if prefix else _with_free_names(Layout(root, DEFAULT_PREFIX, subnet))
    if prefix is None:
        is_there = host_names.are_written(recorded) or any(host.is_there() for host in recorded.hosts)
        return recorded if is_there else _with_free_names(recorded)
    if prefix == recorded.prefix:
        return recorded
    if any(host.is_there() for host in recorded.hosts):
        raise ClusterError(f"The cluster in {root} is up with host names {recorded.prefix}1 and so on; stop it first.")
    return Layout(root, str(prefix), recorded.subnet)


def _forget_abandoned_names(root: Path) -> None:
    """Free the host names of other clusters that the machine stopped with, or whose folders are gone."""
    for other in host_names.owners():
        if other != root and state_directory.is_abandoned(other):
            host_names.remove(other)


def _with_free_names(layout: Layout) -> Layout:
    """The layout, by other names where another cluster on this machine has these: ``nodeb1`` in place of ``node1``.

    With the names as they are where all are taken, which starting it then complains of.
    """
    prefixes = [layout.prefix, *(f"{DEFAULT_PREFIX}{letter}" for letter in "bcdefgh")]
    candidates = [Layout(layout.root, prefix, layout.subnet) for prefix in prefixes]
    free = (each for each in candidates if not host_names.taken_names(each))
    return next(free, layout)


def _start_controller(layout: Layout) -> None:
    daemons.create_munge_key(layout)
    accounting.create_database(layout)
    address = layout.controller.address
    _start_and_wait(layout, daemons.munged(layout), lambda: _listens(str(layout.munge_socket)))
    _start_and_wait(layout, daemons.mariadbd(layout), lambda: _listens(str(layout.database_socket)))
    _start_and_wait(layout, daemons.slurmdbd(layout), lambda: _listens(address, slurm_config.ACCOUNTING_PORT))
    accounting.register_cluster(layout)
    _start_and_wait(layout, daemons.slurmctld(layout), lambda: _listens(address, slurm_config.CONTROLLER_PORT))


def _start_and_wait(layout: Layout, daemon: Daemon, ready: Callable[[], bool]) -> None:
    daemons.start(layout, daemon)

    def ready_or_dead() -> bool:
        daemons.require_alive(daemon)
        return ready()

    wait_until(ready_or_dead, READY_TIMEOUT_S, f"{daemon.title} runs but does not answer: see {layout.logs}.")


def _listens(address: str | IPv4Address, port: int | None = None) -> bool:
    """Whether something accepts connections at a Unix socket's path, or at an address and port."""
    family = socket.AF_UNIX if port is None else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        return client.connect_ex(str(address) if port is None else (str(address), port)) == 0


def _works(state: str) -> bool:
    does_not_answer = state.endswith("*")
    return not does_not_answer and not OUT_OF_SERVICE.fullmatch(state)


def _wait_for_nodes(layout: Layout, nodes: tuple[Host, ...]) -> None:
    names = {node.name for node in nodes}

    def all_work() -> bool:
        states = {name: state for name, state in node_states(layout).items() if name in names}
        for name, state in states.items():
            if RESUMABLE.fullmatch(state):
                _resume(layout, name)
        return all(_works(state) for state in states.values())

    wait_until(all_work, READY_TIMEOUT_S, f"Not all of {', '.join(sorted(names))} return to work: see {layout.logs}.")


def _resume(layout: Layout, name: str) -> None:
    """Put a node back into service, unless it has left the state that forbade it since we looked."""
    try:
        run("scontrol", "update", f"nodename={name}", "state=resume", env=daemons.environment(layout), timeout_s=90)
    except ClusterError:
        if RESUMABLE.fullmatch(node_states(layout)[name]):
            raise


def _fail_jobs_without_processes(layout: Layout) -> None:
    """End the jobs that ran when the machine stopped as Slurm ends those of a failed node, which may requeue them.

    The controller takes them for running still, and would notice that their nodes know nothing of them minutes later.
    """
    if _jobs(layout, "CF,R,S,CG", timeout_s=90):
        names = ",".join(node.name for node in layout.nodes)
        down = (f"nodename={names}", "state=down", "reason=the machine stopped")
        run("scontrol", "update", *down, env=daemons.environment(layout), timeout_s=90)


def _cancel_jobs(layout: Layout) -> None:
    """End all jobs and wait for the record of it; a controller that does not answer is no reason to stay up."""

    def end(*signal: str) -> None:
        if active := _jobs(layout):
            with suppress(ClusterError):  # a job that ends by itself meanwhile; what is left after all is told
                run("scancel", *signal, *active, env=daemons.environment(layout), timeout_s=20)
                wait_until(lambda: not _jobs(layout), CANCEL_PATIENCE_S, "")

    try:
        end()
        end("--full", "--signal=KILL")
        left = _jobs(layout, "PD,CF,R,S")  # one that is completing is cancelled, and loses its processes with the nodes
        problem = f"Left: {', '.join(left)}." if left else ""
    except ClusterError as error:
        problem = str(error)
    if problem:
        print(f"down: not every job was cancelled before the cluster was stopped. {problem}", file=sys.stderr)


def _jobs(layout: Layout, states: str = "PD,CF,R,S,CG", timeout_s: float = 20) -> list[str]:
    """Numbers of the jobs in one of some states, by default of all that have not ended."""
    environment = daemons.environment(layout)
    return run("squeue", "-ha", "-t", states, "-o", "%A", env=environment, timeout_s=timeout_s).split()


def _stop_everything(layout: Layout) -> None:
    for daemon in reversed(daemons.all_daemons(layout)):
        daemons.stop(daemon)
    for host in layout.hosts:
        kill_processes_of(host)
    network.remove(layout)
