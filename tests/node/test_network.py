"""A node's network: names in Slurm's host lists, and whether rank 0's node can be reached from this one."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.errors import HpcmmError
from hpcmm.node import network
from hpcmm.node.network import expand_hosts, hold_free_port, job_nodes, port_of, rendezvous_problem, unreachable_nodes

NEEDS_IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("node[01-03,7],gpu-a[1-2]b", ["node01", "node02", "node03", "node7", "gpu-a1b", "gpu-a2b"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[009-011],x.y-z", ["n009", "n010", "n011", "x.y-z"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("r[1-2][5-6]", ["r15", "r16", "r25", "r26"]),
        ("a1,a10,a[2-3]", ["a1", "a10", "a2", "a3"]),
    ],
)
def test_a_host_list_stands_for_these_names_in_this_order(listed, names):
    assert expand_hosts(listed) == names
    assert job_nodes({"SLURM_JOB_NODELIST": listed}) == names


@pytest.mark.parametrize(
    "listed", ["n[1", "n1]", "n[3-1]", "n[]", "n[1-]", "a,,b", "a b", "n[1-2", "$(x)", "n[[1]]", ","]
)
def test_what_is_no_host_list_is_refused(listed):
    with pytest.raises(HpcmmError, match="is not a host list"):
        expand_hosts(listed)


@pytest.mark.parametrize("listed", ["n[1-999999999]", "n[1-1000][1-1000]", "[0-99999],m[0-99999]"])
def test_a_list_of_more_nodes_than_any_job_has_is_refused_at_once(listed):
    with pytest.raises(HpcmmError):
        expand_hosts(listed)


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=4))
def test_each_number_keeps_the_zeros_of_its_range(ranges):
    written = ",".join(f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in ranges)
    expected = [f"n{number:0{width}d}x" for first, more, width in ranges for number in range(first, first + more + 1)]
    assert expand_hosts(f"n[{written}]x") == expected


def test_outside_of_slurm_a_job_has_no_nodes_and_a_damaged_list_hides_no_failure():
    assert job_nodes({}) == []
    assert unreachable_nodes({"SLURM_JOB_NODELIST": "n[1"}) == []


@pytest.fixture
def resolving(monkeypatch):
    """Makes names resolve to given addresses."""
    names: dict[str, list[str]] = {}
    asked_system = socket.getaddrinfo

    def answer(host, *arguments, **options):
        if host in names:
            return [each for address in names[host] for each in asked_system(address, *arguments, **options)]
        if host == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return asked_system(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr(network, "_PAUSE_S", 0.01)
    return names


def problem(host, port=9, *, on_its_node=False, patience_s=0.0):
    return rendezvous_problem(host, port, on_its_node=on_its_node, patience_s=patience_s)


@pytest.mark.parametrize("on_its_node", [True, False])
def test_a_name_that_does_not_resolve_is_told(resolving, on_its_node):
    said = problem("unknown", on_its_node=on_its_node)
    assert said == "unknown does not resolve (Name or service not known)"
    assert problem("a" * 70, on_its_node=on_its_node).endswith("does not resolve (it is not a host name)")


def test_a_name_that_resolves_a_moment_later_is_no_problem(resolving, monkeypatch):
    resolving["first"] = ["127.0.0.1"]
    answer, asked = socket.getaddrinfo, []

    def slow(host, *arguments, **options):
        asked.append(host)
        return answer("unknown" if len(asked) < 3 else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert problem("first", on_its_node=True, patience_s=60) is None


def test_rank_0_s_own_name_may_stand_for_a_loopback_address_on_its_node(resolving):
    resolving["first"] = ["127.0.1.1"]
    assert problem("first", on_its_node=True) is None


def test_a_loopback_address_on_another_node_is_that_node_itself(resolving):
    resolving["first"] = ["127.0.1.1"]
    with hold_free_port() as held:
        taken = port_of(held)
    assert problem("first", taken) == "first resolves to 127.0.1.1, which is this node itself"


def test_several_nodes_of_slurm_on_one_machine_meet_at_a_loopback_address(resolving):
    resolving["first"] = ["127.0.0.1"]
    with hold_free_port() as held:
        assert problem("first", port_of(held)) is None


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6)])
@pytest.mark.parametrize("listens", [True, False])
def test_a_node_that_answers_or_refuses_is_reached(resolving, monkeypatch, address, listens):
    monkeypatch.setattr(network, "_is_loopback", lambda _: False)
    resolving["first"] = [address]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as rank_0:
        rank_0.bind((address, 0))
        if listens:
            rank_0.listen()
        assert problem("first", rank_0.getsockname()[1]) is None


def silent_at(monkeypatch, *addresses):
    connect = socket.create_connection

    def silent(address, **options):
        if address[0] in addresses:
            raise TimeoutError("timed out")
        return connect(address, **options)

    monkeypatch.setattr(socket, "create_connection", silent)


def test_one_address_of_several_that_answers_is_enough(resolving, monkeypatch):
    silent_at(monkeypatch, "192.0.2.1")
    resolving["first"] = ["192.0.2.1", "127.0.0.1"]
    with hold_free_port() as held:
        assert problem("first", port_of(held)) is None


def test_a_node_that_does_not_answer_is_told_with_its_addresses(resolving, monkeypatch):
    silent_at(monkeypatch, "192.0.2.1", "2001:db8::1")
    resolving["first"] = ["192.0.2.1", "2001:db8::1"]
    began_s = time.monotonic()
    said = problem("first", 2345, patience_s=0.05)
    assert said == "first cannot be reached at port 2345 (192.0.2.1: no answer; 2001:db8::1: no answer)"
    assert time.monotonic() - began_s < 30


def test_a_node_is_silent_only_if_all_of_its_addresses_are(resolving, monkeypatch):
    silent_at(monkeypatch, "192.0.2.1", "192.0.2.2")
    resolving |= {"n1": ["192.0.2.1", "127.0.0.1"], "n2": ["192.0.2.1", "192.0.2.2"], "n3": ["127.0.0.1"]}
    assert unreachable_nodes({"SLURM_JOB_NODELIST": "n[1-4]", "SLURMD_NODENAME": "n4"}) == ["n2"]


@NEEDS_IPV6
def test_the_held_port_is_one_of_ipv6_and_ipv4(resolving):
    with hold_free_port() as held:
        port = port_of(held)
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port))
        with contextlib.closing(
            socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        ) as store:
            with socket.create_connection(("::1", port), timeout=5):
                store.accept()[0].close()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                store.accept()[0].close()


def test_without_ipv6_the_held_port_is_one_of_ipv4(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with hold_free_port() as held:
        assert held.family is socket.AF_INET
