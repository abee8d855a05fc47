"""The port of the rendezvous belongs to one job from the moment it is found."""

import contextlib
import socket
import subprocess
import sys

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.node import network
from hpcmm.node.network import hold_free_port


@pytest.fixture
def three_ports(monkeypatch):
    """Only three ports to choose from, all free."""
    for start in range(20_000, 30_000, 3):
        with contextlib.ExitStack() as probes:
            try:
                for port in range(start, start + 3):
                    probes.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        monkeypatch.setattr(network, "_LOWEST", start)
        monkeypatch.setattr(network, "_ephemeral_start", lambda start=start: start + 3)
        return set(range(start, start + 3))
    pytest.fail("no three free ports in a row")


def test_jobs_that_look_at_once_get_different_ports_and_then_none_is_left(three_ports):
    with contextlib.ExitStack() as holders:
        held = [holders.enter_context(hold_free_port()) for _ in range(3)]
        assert {holder.getsockname()[1] for holder in held} == three_ports
        with pytest.raises(HpcmmError, match="No free TCP port"):
            hold_free_port()


def test_rank_0_can_listen_on_the_held_port_and_nobody_gets_it_then(three_ports):
    with hold_free_port() as held, socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("", held.getsockname()[1]))
        store.listen()
        with contextlib.ExitStack() as others:
            assert held.getsockname()[1] not in {
                others.enter_context(hold_free_port()).getsockname()[1] for _ in range(2)
            }
        with socket.create_connection(("127.0.0.1", held.getsockname()[1]), timeout=5) as connection:
            assert connection.getpeername()[1] == held.getsockname()[1]


def test_the_command_keeps_its_port_until_it_is_ended():
    command = [sys.executable, "-m", "hpcmm.worker", "port", "--hold"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        port = int(holder.stdout.readline())
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        holder.terminate()
    with socket.socket() as other:
        other.bind(("", port))
