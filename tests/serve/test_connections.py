"""Who may keep a connection, and how the server ends: a real server in a process of its own, before an empty page."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from another_user import UID

from hpcmm.node.network import peer_uid

pytestmark = pytest.mark.timeout(120)

PROGRAM = """
import asyncio, contextlib, signal, sys, time
from hpcmm.node.cache import private_folder
from hpcmm.serve import server

proof_s, most, hangup = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
server._PROOF_S, server._MOST_UNPROVED = proof_s, most
signal.signal(signal.SIGHUP, signal.SIG_IGN if hangup == "ignored" else signal.SIG_DFL)

passed_s = 0.0

def let_pass(*_):
    global passed_s
    passed_s += 1000

signal.signal(signal.SIGUSR1, let_pass)
asyncio.BaseEventLoop.time = lambda _: time.monotonic() + passed_s
server.Connection.timeout_keep_alive = property(lambda _: 1_000_000, lambda *_: None)  # for idle ones that are known

async def page(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"page"})

with server._listening(0) as held, private_folder("hpcmm-serve-") as cache:
    (cache / "upload.png").write_text("a picture")
    port = held.getsockname()[1]
    guard = server.Guard(page, token="token", cookie="c", cache=cache, max_body_bytes=1_000_000)
    server._run(guard, held, cache, lambda: print(port, cache, flush=True), lambda: False)
"""


class Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        port, folder = process.stdout.readline().split()
        self.port, self.folder = int(port), Path(folder)

    def let_time_pass(self) -> None:
        """Its clock goes on by 1000 seconds."""
        self.process.send_signal(signal.SIGUSR1)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, client: httpx.Client | None = None) -> int:
        client = client or httpx.Client(timeout=60)
        return client.get(f"http://127.0.0.1:{self.port}/config", headers={"cookie": "c=token"}).status_code


@contextlib.contextmanager
def started(proof_s: float = 600, most: int = 20, hangup: str = "heeded") -> Iterator[Server]:
    command = [sys.executable, "-c", PROGRAM, str(proof_s), str(most), hangup]
    with (
        tempfile.TemporaryDirectory() as folder,  # for what a server that is killed leaves behind
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder}) as process,
    ):
        try:
            yield Server(process)
        finally:
            process.kill()


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Sockets that are made within are another user's."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    os.seteuid(UID)
    try:
        yield
    finally:
        os.seteuid(0)


def require_known_users() -> None:
    """Skip the test if the kernel does not tell whose a connection is."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        accepted = listening.accept()[0]
        with accepted:
            if peer_uid(accepted) is None:
                pytest.skip("the kernel does not tell whose a connection is (sock_diag)")


def is_closed(connection: socket.socket, within_s: float = 60) -> bool:
    connection.settimeout(within_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def answer_of(connection: socket.socket) -> bytes:
    """How the answer begins; nothing if the connection was closed before it was read."""
    try:
        return connection.recv(10, socket.MSG_WAITALL)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ", b"G"])
def test_a_connection_that_does_not_bring_the_token_in_time_is_closed(said):
    with started(proof_s=0.5) as server, server.connect() as silent:
        with contextlib.suppress(ConnectionError):  # it is closed already
            silent.sendall(said)
        assert is_closed(silent)


def test_one_that_brought_it_stays():
    with started(proof_s=600) as server, server.connect() as silent, httpx.Client(timeout=60) as client:
        assert server.ask(client) == 200  # so the silent one, which came first, is there too
        opened = client._transport._pool.connections[0]
        server.let_time_pass()
        assert is_closed(silent)  # that time is over
        assert server.ask(client) == 200
        assert client._transport._pool.connections == [opened]


def test_another_user_who_floods_the_server_closes_their_own_connections():
    require_known_users()
    with started(most=20) as server, contextlib.ExitStack() as opened:
        own = opened.enter_context(server.connect())
        with as_another_user():
            theirs = [opened.enter_context(server.connect()) for _ in range(60)]
        assert all(map(is_closed, theirs[:40]))
        assert server.ask() == 200
        # The own one is older than all of them, and still open.
        own.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: c=token\r\n\r\n")
        assert own.recv(12) == b"HTTP/1.1 200"


def test_of_one_user_s_connections_the_oldest_is_closed():
    with started(most=20) as server, contextlib.ExitStack() as opened:
        crowd = [opened.enter_context(server.connect()) for _ in range(60)]
        assert all(map(is_closed, crowd[:40]))
        assert server.ask() == 200


def test_an_upload_without_the_token_is_refused_before_its_body_is_read():
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900000\r\n\r\n"
    with started() as server, server.connect() as stranger:
        stranger.sendall(head)
        assert stranger.recv(12) == b"HTTP/1.1 403"
        with contextlib.suppress(ConnectionError):
            while stranger.recv(4096):  # and then the connection ends
                pass


@pytest.mark.parametrize(
    "head",
    [
        b'Cookie: a="' + b"\\" * 62_000 + b'"\r\n', b"Cookie: " + b"a=b;" * 15_000 + b"\r\n", b"a:\r\n" * 15_000,
        b"Origin: " + b"[" * 60_000 + b"\r\n", b"Host: " + b"1:" * 30_000 + b"\r\n",
    ],
    ids=["quoted", "cookies", "headers", "origin", "host"],
)  # fmt: skip
def test_a_long_head_costs_others_no_time(head):
    with started() as server, contextlib.ExitStack() as opened:
        crowd = [opened.enter_context(server.connect()) for _ in range(10)]
        for stranger in crowd:
            with contextlib.suppress(ConnectionError):  # it closes what it has not read to its end
                stranger.sendall(b"GET /?" + b"a=b&" * 500 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n")
        # One such cookie alone took Python's parser eight seconds; ten of them take longer than is waited for.
        assert server.ask() == 200
        assert {answer_of(stranger) for stranger in crowd} <= {b"HTTP/1.1 4", b""}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_uploads_are_deleted_however_the_server_is_told_to_end(number):
    with started() as server:
        assert (server.folder / "upload.png").exists()
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        assert not server.folder.exists()


def test_under_nohup_it_outlives_its_terminal():
    with started(hangup="ignored") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.ask() == 200
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_nobody_else_gets_the_port_while_the_model_is_loaded():
    from hpcmm.serve.server import _listening

    with _listening(0) as held, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", held.getsockname()[1]))
            other.listen()
