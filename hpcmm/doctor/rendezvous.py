"""The nodes meet at the first one over TCP: who is there, how far the clocks differ, and which pairs measure a link."""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from hpcmm.files import json_object

_MOST_ROUNDS = 3


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Up to three rounds in which each of ``count`` members has another partner; with an odd count one rests.

    The circle method of round-robin tournaments: one place is fixed, the others turn.
    """
    if count < 2:
        return []
    places = count + count % 2
    turning = list(range(1, places))
    rounds = []
    for turn in range(min(places - 1, _MOST_ROUNDS)):
        circle = [0, *turning[turn:], *turning[:turn]]
        pairs = [(circle[at], circle[places - 1 - at]) for at in range(places // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
    return rounds


def best_of_each(count: int, measured: list[tuple[int, int, float]]) -> list[float | None]:
    """Each member's fastest pair: a bad node is slow with every partner, a good one only with a bad one."""
    best: list[float | None] = [None] * count
    for first, second, rate in measured:
        for member in (first, second):
            known = best[member]
            best[member] = rate if known is None else max(known, rate)
    return best


_EXCHANGES = 20
_MOST_BYTES = 16 * 1024**2
_MOST_HELLO_BYTES = 4096
_HELLO_S = 2.0
"""A node says hello as soon as it is connected."""
_MOST_UNPROVEN = 256
"""Connections beside those of the nodes."""


@dataclass(frozen=True)
class ClockOffset:
    """A node's clock minus the first node's, estimated as in NTP (RFC 5905, section 8) by the quickest exchange."""

    offset_s: float
    error_s: float
    """Half of that exchange's round trip: the offset lies within it whatever the two ways took."""


class Line:
    """JSON lines over a socket, each bounded in size and time."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._file = connection.makefile("rb")

    def send(self, value: object) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """Raises OSError when the other side is gone or says what is no JSON."""
        line = self._file.readline(_MOST_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionError("the other node is gone")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConnectionError("the other node sent no JSON") from error

    @property
    def own_address(self) -> str:
        """Without what IPv6 puts in front of an IPv4 address."""
        return str(self.connection.getsockname()[0]).removeprefix("::ffff:")


def measure_offset(line: Line) -> ClockOffset:
    """Ask the other side for its clock; it answers with ``answer_clock``."""
    best: ClockOffset | None = None
    for _ in range(_EXCHANGES):
        sent_ns = time.time_ns()
        line.send("clock")
        theirs_ns = line.receive()
        if not isinstance(theirs_ns, int):
            raise ConnectionError("the other node sent no time")
        received_ns = time.time_ns()
        error_s = (received_ns - sent_ns) / 2e9
        if best is None or error_s < best.error_s:
            best = ClockOffset((theirs_ns - (sent_ns + received_ns) / 2) / 1e9, error_s)
    assert best is not None
    return best


def answer_clock(line: Line) -> None:
    """The other side of ``measure_offset``."""
    for _ in range(_EXCHANGES):
        line.receive()
        line.send(time.time_ns())


def gather(
    server: socket.socket, secret: str, expected: Sequence[str], wait_s: float, talk_s: float
) -> dict[str, tuple[Line, dict[str, Any]]]:
    """At the first node: the nodes that come within ``wait_s``, each with its line and what it told of itself.

    Anybody can connect. So all connections are read at once, and one that has not said the secret within ``_HELLO_S``
    is closed; so is the oldest of too many.
    """
    came: dict[str, tuple[Line, dict[str, Any]]] = {}
    unproven: dict[socket.socket, _Unproven] = {}
    most = _MOST_UNPROVEN + len(expected)
    until = time.monotonic() + wait_s
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def forget(connection: socket.socket) -> bytes:
            selector.unregister(connection)
            return bytes(unproven.pop(connection).said)

        try:
            while len(came) < len(expected) and (now := time.monotonic()) < until:
                ends = min([until, *(each.until for each in unproven.values())])
                for key, _ in selector.select(max(0.0, ends - now)):
                    connection = cast(socket.socket, key.fileobj)
                    if connection is server:
                        _accept(server, selector, unproven)
                    elif unproven[connection].is_complete(connection):
                        hello = _proven(forget(connection), secret, expected)
                        if hello is None or hello["node"] in came:
                            connection.close()
                        else:
                            came[hello["node"]] = (Line(connection, talk_s), hello)
                now = time.monotonic()
                late = [connection for connection, each in unproven.items() if each.until <= now]
                for connection in late or list(unproven)[: max(0, len(unproven) - most)]:
                    forget(connection)
                    connection.close()
        finally:
            for connection in list(unproven):
                connection.close()
    return came


class _Unproven:
    """What a connection has said that has not proved whose it is."""

    def __init__(self) -> None:
        self.until = time.monotonic() + _HELLO_S
        self.said = bytearray()

    def is_complete(self, connection: socket.socket) -> bool:
        """Whether it has said a line, is gone or talks too much, once what it just said is read.

        A node says one line and waits for the answer, so that nothing comes after it.
        """
        try:
            read = connection.recv(_MOST_HELLO_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            read = b""
        self.said += read
        return not read or b"\n" in read or len(self.said) > _MOST_HELLO_BYTES


def _accept(server: socket.socket, selector: selectors.BaseSelector, unproven: dict[socket.socket, _Unproven]) -> None:
    try:
        connection, _ = server.accept()
    except OSError:  # it is gone
        return
    connection.setblocking(False)
    unproven[connection] = _Unproven()
    selector.register(connection, selectors.EVENT_READ)


def _proven(said: bytes, secret: str, expected: Sequence[str]) -> dict[str, Any] | None:
    """The hello of a node that is expected and knows the secret; None if this is none."""
    hello = json_object(said.decode(errors="replace")) if said.endswith(b"\n") else None
    if hello is None or not secrets.compare_digest(str(hello.get("secret", "")).encode(), secret.encode()):
        return None
    address = hello.get("address")
    known = hello.get("node") in expected and (address is None or isinstance(address, str))
    return hello if known else None


def come(address: tuple[str, int], hello: dict[str, Any], wait_s: float, talk_s: float) -> Line:
    """At any other node: connect to the first one, and say hello. Raises OSError when it is not reached in time."""
    until = time.monotonic() + wait_s
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, min(5.0, until - time.monotonic())))
            break
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    line = Line(connection, talk_s)
    line.send(hello)
    return line
