"""Nodes that meet, their clocks, and who measures with whom."""

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.doctor import rendezvous
from hpcmm.doctor.rendezvous import Line, answer_clock, best_of_each, come, gather, measure_offset, rounds_of_pairs
from hpcmm.node.network import listening_socket


@given(st.integers(2, 17))
def test_each_member_meets_another_partner_in_each_round(count):
    rounds = rounds_of_pairs(count)
    pairs = [pair for pairs in rounds for pair in pairs]
    assert len(set(pairs)) == len(pairs)
    for each in rounds:
        members = [member for pair in each for member in pair]
        assert len(set(members)) == len(members) == count - count % 2
        assert set(members) <= set(range(count))


@given(st.integers(4, 17), st.data())
def test_one_slow_member_is_the_only_slow_one(count, data):
    slow = data.draw(st.integers(0, count - 1))
    measured = [(*pair, 1.0 if slow in pair else 9.0) for pairs in rounds_of_pairs(count) for pair in pairs]
    assert best_of_each(count, measured) == [1.0 if member == slow else 9.0 for member in range(count)]


def test_nodes_that_come_are_gathered_and_strangers_are_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        hellos = [{"secret": "right", "node": "b"}, {"secret": "wrong", "node": "c"}, {"secret": "right", "node": "x"}]
        lines = [come(address, hello, 5, 5) for hello in hellos]
        came = gather(server, "right", ["b", "c"], wait_s=0.5, talk_s=5)
        assert list(came) == ["b"]
        for line in [*lines, *(line for line, _ in came.values())]:
            line.connection.close()


def test_connections_that_say_nothing_or_nonsense_keep_no_node_out(monkeypatch):
    monkeypatch.setattr(rendezvous, "_HELLO_S", 0.3)
    monkeypatch.setattr(rendezvous, "_MOST_UNPROVEN", 3)
    said = [b"", b"{", b"\xff\n", b"[" * 3000 + b"\n", b"x" * 9000, b'{"secret": "\xc3\xa4"}\n', b"[]\n"]
    said += [b'{"secret": "right", "node": ["b"]}\n', b'{"secret": "right", "node": "b", "address": []}\n'] + 5 * [b""]
    with listening_socket(backlog=64) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        strangers = [socket.create_connection(address) for _ in said]
        for stranger, word in zip(strangers, said, strict=True):
            stranger.sendall(word)
        line = come(address, {"secret": "right", "node": "b", "address": None}, 5, 5)
        came = gather(server, "right", ["b"], wait_s=600, talk_s=60)
        assert list(came) == ["b"]
        came["b"][0].send("welcome")
        assert line.receive() == "welcome"
        assert gather(server, "right", ["c"], wait_s=0.5, talk_s=60) == {}
        for each in (*strangers, line.connection, came["b"][0].connection):
            each.close()


def test_the_oldest_of_too_many_connections_is_closed(monkeypatch):
    monkeypatch.setattr(rendezvous, "_MOST_UNPROVEN", 1)
    monkeypatch.setattr(rendezvous, "_HELLO_S", 60.0)
    with listening_socket(backlog=64) as server:
        silent = [socket.create_connection(("127.0.0.1", server.getsockname()[1])) for _ in range(5)]
        came = threading.Thread(target=gather, args=(server, "s", ["b"], 3.0, 60.0))
        came.start()
        silent[0].settimeout(2.5)
        assert silent[0].recv(1) == b""
        came.join()
        for each in silent:
            each.close()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6"))],
)
def test_nodes_come_over_ipv4_and_over_ipv6_and_know_their_address(address):
    with listening_socket(backlog=1) as server:
        line = come((address, server.getsockname()[1]), {"secret": "s", "node": "b"}, 5, 5)
        came = gather(server, "s", ["b"], wait_s=5, talk_s=5)
        assert line.own_address == came["b"][0].own_address == address
        for each in (line, came["b"][0]):
            each.connection.close()


def test_the_clock_s_offset_is_measured_within_its_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        thread = threading.Thread(target=answer_clock, args=(Line(theirs, 5),))
        thread.start()
        offset = measure_offset(Line(ours, 5))
        thread.join()
        ours.close()
        theirs.close()
    assert abs(offset.offset_s) <= offset.error_s < 0.1


def test_a_peer_that_leaves_or_talks_nonsense_is_an_error():
    for word in (b"", b"{nonsense\n"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            line = Line(socket.create_connection(server.getsockname()), 5)
            other, _ = server.accept()
            other.sendall(word)
            other.close()
            with pytest.raises(ConnectionError):
                line.receive()
            line.connection.close()
