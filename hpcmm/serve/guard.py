"""What stands in front of the page: nothing passes without the token, from another site, to another route or too large.

A plain ASGI application around another. The first visit brings the token in the address and gets it as a cookie, which
scripts cannot read and other sites cannot send; every other request needs that cookie. What is done before the token is
seen takes time in proportion to the request's head, and a head is small.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping, Set
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException

from hpcmm.serve.options import CACHE_LIMIT_BYTES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

API = "/gradio_api"
FILES = f"{API}/file="
UPLOAD = f"{API}/upload"
_OPEN_ROUTES = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/(?:assets|static|svelte)/[\w./@+-]+"
    rf"|{API}/(?:info|app_id|startup-events|reset|cancel|upload|upload_progress|queue/join|queue/data|run/predict)"
    rf"|{API}/heartbeat/\w+|{API}/file=.+"
)
"""What the page itself asks for. gradio has more: a proxy, its own API, recordings, code written by a model."""
_ASKING_ROUTES = frozenset({f"{API}/queue/join", f"{API}/run/predict"})
_LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
HEAD_LIMIT_BYTES = 32_000
"""The address and the headers of a request. A browser sends the cookies of all ports of a machine."""
_LONGEST_PATH = 4096
_JSON_LIMIT_BYTES = 300_000
_PIECE_S = 60.0
_BODY_S = 900.0
"""Time for a request's body, and between two pieces of it."""
_SMALLEST_FILE_BYTES = 100_000
"""What an upload counts at least: each costs an inode, and time when the folder is looked through."""
_DRAINED = 4
"""Times the limit, of a request that is refused for its size."""
_HEADERS = {
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}
_FILE_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; sandbox"
_OUTSIDE = re.compile(
    rb"<link[^>]*rel=\"manifest\"[^>]*>|<meta[^>]*content=\"https?://[^>]*>|<link[^>]*href=\"https?://[^>]*>"
)
"""Parts of gradio's page that name other hosts, or are asked for without the cookie."""


class RefusalError(Exception):
    """An HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


PROVED = "hpcmm_proved"
"""In a request's state: what is called once its connection has brought the token."""


class Guard:
    """The application in front of ``app``. ``cache`` is the only folder of which files are shown.

    ``functions`` are the numbers of what the page may ask for; None lets all pass.
    """

    def __init__(
        self,
        app: App,
        *,
        token: str,
        cookie: str,
        cache: Path,
        max_body_bytes: int,
        functions: Set[int] | None = None,
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._cookie = cookie
        self._cache = cache.resolve()
        self._max_body_bytes = max_body_bytes
        self._functions = functions
        self._expected_bytes = 0  # of uploads that are on their way

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket, which the page does not use
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            _check_head(scope)
            _check_site(scope)
            if self._brings_token(scope):
                _tell_proved(scope)
                await self._welcome(send)
                return
            self._check_cookie(scope)
            _tell_proved(scope)
            self._check_route(scope)
            if scope["path"] == UPLOAD and scope["method"] == "POST":
                await self._take_upload(scope, receive, _Outgoing(scope, send))
            else:
                receive = await self._bounded(scope, receive)
                await self._app(scope, receive, _Outgoing(scope, send))
        except RefusalError as refusal:
            await _answer(send, refusal.status, refusal.sentence)

    def _brings_token(self, scope: Message) -> bool:
        if scope["path"] != "/" or scope["method"] != "GET":
            return False
        parts = scope["query_string"].decode("latin-1").split("&")
        given = next((part.removeprefix("token=") for part in parts if part.startswith("token=")), "")
        if not given:
            return False
        if not self._is_token(given):
            raise RefusalError(403, "This is not the token of this server: open the address that hpcmm.serve printed.")
        return True

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self._token)

    async def _welcome(self, send: Send) -> None:
        """The cookie, and on to the page without the token in the address.

        No redirect: one that began on another site would not bring a SameSite=Strict cookie.
        """
        cookie = f"{self._cookie}={self._token.decode()}; HttpOnly; SameSite=Strict; Path=/"
        page = '<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>hpcmm</title><a href="/">Go on</a>'
        await _answer_page(send, 200, page, [(b"set-cookie", cookie.encode("ascii"))])

    def _check_cookie(self, scope: Message) -> None:
        if not any(self._is_token(given) for given in _cookies(scope, self._cookie)):
            raise RefusalError(403, "A token is needed: open the address that hpcmm.serve printed, with its token.")

    def _check_route(self, scope: Message) -> None:
        path = scope["path"]
        if not _OPEN_ROUTES.fullmatch(path) or ".." in path.split("/"):
            raise RefusalError(404, "There is no such page.")
        if path.startswith(FILES) and not self._is_ours(path.removeprefix(FILES)):
            raise RefusalError(404, "There is no such file.")

    def _is_ours(self, name: Any) -> bool:
        """Whether ``name`` is an absolute path of a file in the cache, links followed."""
        if not isinstance(name, str) or not name.startswith("/") or len(name) > _LONGEST_PATH:
            return False
        try:
            return Path(unquote(name)).resolve().is_relative_to(self._cache) and Path(name).resolve().is_relative_to(
                self._cache
            )
        except (OSError, RuntimeError, ValueError):  # ValueError: characters that no path can hold
            return False

    async def _take_upload(self, scope: Message, receive: Receive, send: Send) -> None:
        limit = self._max_body_bytes
        receive = _timed(receive)
        size = await _declared_size(scope, receive, limit)
        expected = self._expected_bytes
        self._expected_bytes += size  # at once, for another upload may come while the folder is looked through
        try:
            if await asyncio.to_thread(_folder_bytes, self._cache) + expected > CACHE_LIMIT_BYTES:
                raise RefusalError(507, "Too many uploads lie here already: try again in a quarter of an hour.")
            await self._app(scope, _counted(receive, limit), send)
        finally:
            self._expected_bytes -= size

    async def _bounded(self, scope: Message, receive: Receive) -> Receive:
        """``receive`` that ends a request above the limit; that of a question is read and looked at first."""
        if scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            return receive
        receive = _timed(receive)
        await _declared_size(scope, receive, _JSON_LIMIT_BYTES)
        body = await _read(receive, _JSON_LIMIT_BYTES)
        self._check_question(scope["path"], body)
        return _replayed(body, receive)

    def _check_question(self, path: str, body: bytes) -> None:
        """A question names uploaded files by their paths, which gradio would also fetch from other hosts.

        It also names a function of the page by its number, of which gradio fails with a traceback if there is none.
        """
        if not body:
            return
        try:
            question = json.loads(body)
            named = list(_named_files(question))
        except (ValueError, RecursionError) as error:
            raise RefusalError(400, "The request is no JSON.") from error
        if not all(self._is_ours(name) for name in named):
            raise RefusalError(400, "The request names a file that was not uploaded here.")
        if path in _ASKING_ROUTES and self._functions is not None:
            number = question.get("fn_index") if isinstance(question, dict) else None
            # true is 1 to Python, and 1.0 is too
            if type(number) is not int or number not in self._functions:
                told = f"hpcmm.serve: refused a request to {path} for a function that the page does not have."
                print(told, file=sys.stderr, flush=True)
                raise RefusalError(400, "The page has no such function.")


def _tell_proved(scope: Message) -> None:
    proved = scope.get("state", {}).pop(PROVED, None)
    if proved is not None:
        proved()


def _check_head(scope: Message) -> None:
    size = (
        len(scope["path"]) + len(scope["query_string"]) + sum(len(key) + len(value) for key, value in scope["headers"])
    )
    if size > HEAD_LIMIT_BYTES:
        raise RefusalError(431, "The request's address and headers are too long: delete the cookies of 127.0.0.1.")


def _check_site(scope: Message) -> None:
    """Refuse names that another site could point to this machine, and pages of other sites or ports."""
    host = _header(scope, b"host")
    name = host if host.endswith("]") else re.sub(r":[0-9]{1,5}\Z", "", host)
    if name.lower() not in _LOOPBACK_NAMES:
        raise RefusalError(421, "This server answers to 127.0.0.1 and localhost alone.")
    origin = _header(scope, b"origin")
    if origin and origin.lower() not in {f"http://{host}".lower(), f"https://{host}".lower()}:
        raise RefusalError(403, "Requests from the pages of other sites are refused.")
    if _header(scope, b"sec-fetch-site") == "cross-site" and scope["method"] != "GET":
        raise RefusalError(403, "Requests from the pages of other sites are refused.")


def _header(scope: Message, name: bytes) -> str:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""


def _cookies(scope: Message, name: str) -> Iterator[str]:
    """Values of the cookies of that name. Others are those of all ports of this machine, and may be malformed."""
    for part in _header(scope, b"cookie").split(";"):
        key, _, value = part.partition("=")
        if key.strip() == name:
            yield value.strip()


def _named_files(value: Any) -> Iterator[Any]:
    """All values of the key ``path``, at any depth, and of ``url`` if no path is given."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if "path" in each:
                yield each["path"]
            elif isinstance(each.get("url"), str):
                yield each["url"]
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _timed(receive: Receive) -> Receive:
    """``receive`` that ends a request whose body takes too long. Raises RefusalError."""
    until = time.monotonic() + _BODY_S
    is_read = False

    async def timed() -> Message:
        nonlocal is_read
        if is_read:  # what comes now is only that the other side goes
            return await receive()
        try:
            async with asyncio.timeout(min(_PIECE_S, until - time.monotonic())):
                message = await receive()
        except TimeoutError as error:
            raise RefusalError(408, "The request takes too long to arrive: try again, with smaller files.") from error
        is_read = not message.get("more_body")
        return message

    return timed


async def _declared_size(scope: Message, receive: Receive, limit: int) -> int:
    """The size of a request's body, at most ``limit``, which it also is if the request does not tell."""
    declared = _header(scope, b"content-length")
    if not declared:
        return limit
    if not re.fullmatch("[0-9]{1,18}", declared) or int(declared) > limit:
        await _drain(receive, _DRAINED * limit)
        raise RefusalError(413, _too_large(limit))
    return int(declared)


async def _drain(receive: Receive, most: int) -> None:
    """Read what is sent, up to a bound: a browser that is cut off while it sends does not show the answer."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def _read(receive: Receive, limit: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += bytes(message.get("body", b""))
        if len(body) > limit:
            raise RefusalError(413, _too_large(limit))
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()  # tells when the other side goes

    return again


def _counted(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        try:
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise RefusalError(413, _too_large(limit))
        except RefusalError as refusal:  # the application is at work already, and answers with it
            raise HTTPException(refusal.status, refusal.sentence) from refusal
        return message

    return counted


def _too_large(limit: int) -> str:
    return f"The request is above {limit / 1e6:.1f} MB: upload smaller or fewer files."


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += max(_SMALLEST_FILE_BYTES, (Path(parent) / name).lstat().st_size)
            except OSError:
                continue  # swept away meanwhile
    return total


class _Outgoing:
    """Adds the headers to what the application answers; takes from its page what names other hosts."""

    def __init__(self, scope: Message, send: Send) -> None:
        self._send = send
        self._is_file = scope["path"].startswith(FILES)
        self._is_page = scope["path"] == "/"
        self._is_sized = scope["method"] == "GET" or bool(_header(scope, b"content-length"))
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": self._headers(message["headers"]) + self._closing(message["status"])}
            if self._is_page:
                self._start = message
                return
        elif self._is_page and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = _OUTSIDE.sub(b"", self._body)
            sized = [(key, value) for key, value in self._start["headers"] if key != b"content-length"]
            await self._send({**self._start, "headers": [*sized, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await self._send(message)

    def _closing(self, status: int) -> list[tuple[bytes, bytes]]:
        """After a refusal the connection ends if the request told no length: it may go on being sent for ever."""
        return [] if self._is_sized or status < 400 else [(b"connection", b"close")]

    def _headers(self, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        own = dict(_HEADERS)
        if self._is_file:
            own[b"content-security-policy"] = _FILE_POLICY
        if self._is_page or self._is_file:
            own[b"cache-control"] = b"no-store"
        dropped = set(own) | {b"access-control-allow-origin", b"access-control-allow-credentials"}
        return [(key, value) for key, value in given if key.lower() not in dropped] + list(own.items())


async def _answer(send: Send, status: int, sentence: str) -> None:
    page = (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>hpcmm</title>'
        f'<p style="font: 16px sans-serif; max-width: 40em; margin: 3em auto">{html.escape(sentence)}</p>'
    )
    await _answer_page(send, status, page, [])


async def _answer_page(send: Send, status: int, page: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = page.encode()
    about = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    closing = [(b"connection", b"close")] if status >= 400 else []
    every = [*about, *_HEADERS.items(), *headers, *closing]
    await send({"type": "http.response.start", "status": status, "headers": every})
    await send({"type": "http.response.body", "body": body})
