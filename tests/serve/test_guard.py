"""The guard, asked as a browser, a stranger and an attacker ask; behind it an application that tells what it got."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from hpcmm.serve.guard import Guard

TOKEN = "t0ken-of-this-server"  # noqa: S105
COOKIE = "hpcmm_serve_9000"
OURS = {"cookie": f"{COOKIE}={TOKEN}"}
PAGE = (
    b'<html><link rel="manifest" href="/manifest.json" /><meta property="og:url" content="https://gradio.app/" />'
    b'<script src="./assets/index.js"></script></html>'
)


async def behind(scope, receive, send):
    """Answers every request with what it was asked, and the page with one that names other hosts."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = PAGE if scope["path"] == "/" else json.dumps({"path": scope["path"], "body": len(body)}).encode()
    headers = [(b"content-type", b"text/html"), (b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "image.png").write_bytes(b"image")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    return folder


@pytest.fixture
def guard(cache) -> Guard:
    return Guard(behind, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1_000_000)


@pytest.fixture
def ask(guard):
    """One request; ``host`` is what the browser believes to talk to."""
    return asker(guard)


def asker(guard: Guard):
    def request(method: str, path: str, headers=OURS, host="127.0.0.1:9000", **more) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(guard)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9000") as client:
                return await client.request(method, path, headers={"host": host, **headers}, **more)

        return asyncio.run(run())

    return request


ROUTES = [
    "/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/upload", "/gradio_api/queue/join",
    "/gradio_api/queue/data", "/gradio_api/run/predict", "/gradio_api/info", "/gradio_api/heartbeat/abc",
    "/gradio_api/file=/etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "cookie", ["", f"{COOKIE}=wrong", f"{COOKIE}={TOKEN[:-1]}", f"{COOKIE}=", f"other={TOKEN}", f"{COOKIE}=t\xf6ken"]
)
def test_nothing_is_shown_without_the_token(path, cookie, ask):
    for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
        answer = ask(method, path, {"cookie": cookie.encode("latin-1")} if cookie else {})
        assert answer.status_code == 403
        assert TOKEN not in answer.text


def test_the_first_visit_gets_a_cookie_that_scripts_and_other_sites_cannot_use(ask):
    answer = ask("GET", f"/?token={TOKEN}", {})
    assert answer.status_code == 200
    assert set(answer.headers["set-cookie"].split("; ")) == {
        f"{COOKIE}={TOKEN}",
        "HttpOnly",
        "SameSite=Strict",
        "Path=/",
    }
    assert TOKEN not in answer.text
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert ask("GET", "/").status_code == 200


@pytest.mark.parametrize("given", ["wrong", "", TOKEN + "x", "%00", "%ff%fe"])
def test_a_wrong_token_is_refused_though_the_cookie_be_right(given, ask):
    answer = ask("GET", f"/?token={given}")
    assert (answer.status_code == 403) or given == ""  # an empty one is none, and the cookie counts
    assert "set-cookie" not in answer.headers


def test_the_token_counts_at_the_front_door_alone(ask):
    assert ask("GET", f"/config?token={TOKEN}", {}).status_code == 403
    assert ask("POST", f"/?token={TOKEN}", {}).status_code == 403


def test_other_cookies_of_this_machine_do_no_harm(ask):
    crowd = f'a=b; broken cookie="; {COOKIE}={TOKEN}; [x]=1'
    assert ask("GET", "/config", {"cookie": crowd}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9000", "127.0.0.1.evil.example", "", "127.0.0.1:9000@evil"]
)
def test_a_name_that_another_site_points_to_this_machine_is_refused(host, ask):
    assert ask("GET", "/config", host=host).status_code == 421
    assert ask("GET", f"/?token={TOKEN}", host=host).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:18", "LOCALHOST", "[::1]:9000"])
def test_the_other_end_of_a_tunnel_may_have_another_port(host, ask):
    assert ask("GET", "/config", host=host).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9001", "null", "http://localhost:9000"])
def test_a_page_of_another_site_or_port_cannot_send_anything(origin, ask):
    assert ask("POST", "/gradio_api/queue/join", {**OURS, "origin": origin}, json={}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://[", "http://]", "http://[::1", "//", "http://\xbd", "[" * 9000, " ", "http:"]
)
def test_an_origin_that_is_no_address_is_refused(origin, ask):
    headers = {**OURS, "origin": origin.encode("latin-1")}
    assert ask("POST", "/gradio_api/queue/join", headers, json={}).status_code == 403


ODD = st.binary(max_size=40) | st.sampled_from(
    [b"http://[", b"[", b"[::1]:x", b"127.0.0.1:99999999", b'a="\\', b"=;=;", b"9" * 5000, b"-1", b"\xb2", b"\0"]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([b"host", b"origin", b"sec-fetch-site", b"cookie", b"content-length", b"content-type"]),
    value=ODD,
    query=ODD,
    path=st.sampled_from(["/", "/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file=/x"]),
    method=st.sampled_from(["GET", "POST"]),
)
def test_whatever_a_stranger_s_head_holds_is_refused_and_breaks_nothing(name, value, query, path, method, cache):
    headers = [(b"host", b"127.0.0.1")] if name != b"host" else []
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query, "headers": [*headers, (name, value)],
    }  # fmt: skip
    assert 400 <= status_of(scope, cache) < 500


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([b"origin", b"sec-fetch-site", b"cookie", b"content-length", b"content-type"]),
    value=ODD,
    path=st.sampled_from(["/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file=/x"]),
    method=st.sampled_from(["GET", "POST"]),
)
def test_nor_does_that_of_who_has_the_token_break_anything(name, value, path, method, cache):
    ours = f"{COOKIE}={TOKEN}".encode() + (b"; " + value if name == b"cookie" else b"")
    headers = [(b"host", b"127.0.0.1"), (b"cookie", ours)]
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"",
        "headers": [*headers, *([] if name == b"cookie" else [(name, value)])],
    }  # fmt: skip
    assert 200 <= status_of(scope, cache) < 500


def status_of(scope: dict, cache: Path) -> int:
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(behind, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1000)(scope, receive, send))
    return sent[0]["status"]


def test_a_head_has_bounds(ask):
    assert ask("GET", "/config", {"cookie": "a=" + "x" * 40_000 + f"; {COOKIE}={TOKEN}"}).status_code == 431
    assert ask("GET", "/config?" + "a=b&" * 9000).status_code == 431
    assert ask("GET", "/config", {"cookie": "a=" + "x" * 20_000 + f"; {COOKIE}={TOKEN}"}).status_code == 200


def test_the_token_need_not_be_in_the_first_cookie_of_that_name(ask):
    assert ask("GET", "/config", {"cookie": f"{COOKIE}=old; {COOKIE}={TOKEN}; {COOKIE}=other"}).status_code == 200


def test_the_own_page_can(ask):
    answer = ask("POST", "/gradio_api/queue/join", {**OURS, "origin": "http://127.0.0.1:9000"}, json={"data": [1]})
    assert answer.json() == {"path": "/gradio_api/queue/join", "body": len(b'{"data":[1]}')}


@pytest.mark.parametrize(
    "path",
    ["/docs", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/run/answer", "/gradio_api/call/x", "/manifest.json",
     "/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/vibe-edit/", "/gradio_api/deep_link",
     "/assets/..%2f..%2fetc/passwd", "/assets/../config.yaml", "/static/%2e%2e/x", "/monitoring", "/login"],
)  # fmt: skip
def test_routes_that_the_page_does_not_need_are_closed(path, ask):
    assert ask("GET", path).status_code == 404
    assert ask("POST", path, json={}).status_code == 404


def test_files_of_the_cache_are_shown_as_nothing_but_files(cache, ask):
    answer = ask("GET", f"/gradio_api/file={cache}/image.png")
    assert answer.status_code == 200
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "{cache}/../secret", "{cache}/%2e%2e/secret", "{cache}/link", "../secret", "image.png", "{cache}x",
     "http://127.0.0.1:22/", "{cache}/%252e%252e/secret", "file:///etc/passwd", "{cache}/a%00b"],
)  # fmt: skip
def test_no_file_outside_of_the_cache_is_shown(name, cache, ask):
    assert ask("GET", "/gradio_api/file=" + name.replace("{cache}", str(cache))).status_code == 404


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://10.0.0.1/x.png", "https://evil.example/", None, 7, "{cache}/link"]
)
def test_a_question_cannot_name_a_file_that_was_not_uploaded(path, cache, ask):
    named = path.replace("{cache}", str(cache)) if isinstance(path, str) else path
    deep = {"data": [[{"image": {"path": named, "url": "http://127.0.0.1:9000/x"}}]]}
    assert ask("POST", "/gradio_api/queue/join", json=deep).status_code == 400
    fetched = {"data": [{"url": named, "meta": {"_type": "gradio.FileData"}}]}
    assert ask("POST", "/gradio_api/queue/join", json=fetched).status_code == (400 if isinstance(path, str) else 200)


def test_a_question_names_its_upload(cache, ask):
    own = {"data": [{"path": f"{cache}/image.png", "url": "http://127.0.0.1:9000/gradio_api/file=x"}, "a brick wall"]}
    assert ask("POST", "/gradio_api/queue/join", json=own).status_code == 200


def test_what_is_too_large_is_refused_whether_it_says_so_or_not(ask):
    async def parts():
        for _ in range(11):
            yield b"x" * 100_000

    for path, limit in (("/gradio_api/upload", 1_000_000), ("/gradio_api/queue/join", 300_000)):
        assert ask("POST", path, content=b"x" * (limit + 1)).status_code == 413
    assert ask("POST", "/gradio_api/queue/join", content=parts()).status_code == 413
    with pytest.raises(Exception, match=r"above 1\.0 MB"):  # the application makes an answer of it
        ask("POST", "/gradio_api/upload", content=parts())
    assert ask("POST", "/gradio_api/upload", {**OURS, "content-length": "-1"}, content=b"").status_code == 413


@pytest.mark.parametrize("door", ["queue/join", "run/predict"])
@pytest.mark.parametrize("number", [4, -1, 10**30, None, True, 1.0, "1", [1], {}])
def test_a_function_that_the_page_does_not_have_is_refused_in_one_line(number, door, cache, capsys):
    functions = frozenset({0, 1, 2})
    ask = asker(Guard(behind, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1000, functions=functions))
    answer = ask("POST", f"/gradio_api/{door}", json={"data": [], "fn_index": number})
    assert (answer.status_code, "no such function" in answer.text) == (400, True)
    told = f"hpcmm.serve: refused a request to /gradio_api/{door} for a function that the page does not have.\n"
    assert capsys.readouterr().err == told
    assert ask("POST", f"/gradio_api/{door}", json=[]).status_code == 400
    assert ask("POST", f"/gradio_api/{door}", json={"data": [], "fn_index": 2}).status_code == 200


@pytest.mark.parametrize(
    "name", ["/\\ud800", "/a\\u0000", "/" + "a/" * 20_000, "/" + "a" * 300], ids=["half", "nul", "deep", "long"]
)
def test_a_name_that_no_file_can_have_is_refused(name, ask):
    body = f'{{"data": [{{"path": "{name}"}}]}}'.encode()
    assert ask("POST", "/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_said(body, ask):
    assert ask("POST", "/gradio_api/queue/join", content=body).status_code == 400


def test_when_the_cache_is_full_no_more_uploads_are_taken(cache, ask, monkeypatch):
    monkeypatch.setattr("hpcmm.serve.guard.CACHE_LIMIT_BYTES", 4)
    answer = ask("POST", "/gradio_api/upload", content=b"x")
    assert answer.status_code == 507
    assert "try again" in answer.text


def test_many_small_uploads_fill_the_cache_too(cache, ask, monkeypatch):
    monkeypatch.setattr("hpcmm.serve.guard.CACHE_LIMIT_BYTES", 2_000_000)
    assert ask("POST", "/gradio_api/upload", content=b"x").status_code == 200
    for number in range(20):
        (cache / f"{number}.png").touch()
    assert ask("POST", "/gradio_api/upload", content=b"x").status_code == 507


def test_uploads_that_are_on_their_way_count_as_well(cache, monkeypatch):
    monkeypatch.setattr("hpcmm.serve.guard.CACHE_LIMIT_BYTES", 800_000)
    arriving, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        arriving.set()
        await go_on.wait()
        await behind(scope, receive, send)

    async def run() -> list[int]:
        transport = httpx.ASGITransport(Guard(app, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1_000_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9000", headers=OURS) as client:

            async def upload() -> int:
                return (await client.post("/gradio_api/upload", content=b"x" * 900_000)).status_code

            first = asyncio.create_task(upload())
            await arriving.wait()
            second = await upload()
            go_on.set()
            return [second, await first, await upload()]

    assert asyncio.run(run()) == [507, 200, 200]


@pytest.mark.parametrize("bound", ["_PIECE_S", "_BODY_S"])
@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
def test_a_body_that_trickles_in_has_bounded_time(path, bound, cache, monkeypatch):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    monkeypatch.setattr(f"hpcmm.serve.guard.{bound}", 0.2)
    sent, pieces = [], 0

    async def receive():
        nonlocal pieces
        pieces += 1
        if bound == "_PIECE_S" and pieces > 1:
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"cookie", f"{COOKIE}={TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    app = Starlette(routes=[Mount("/", behind)])  # as gradio's, it makes an answer of what is raised while it reads
    asyncio.run(Guard(app, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=10**9)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_the_page_names_no_other_host_and_may_ask_none(ask):
    answer = ask("GET", "/")
    assert answer.content == b'<html><script src="./assets/index.js"></script></html>'
    policy = answer.headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert "access-control-allow-origin" not in answer.headers


def test_websockets_are_closed(cache):
    sent = []

    async def send(message):
        sent.append(message)

    guard = Guard(behind, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1)
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.text(st.characters(codec="utf-8"), max_size=30), dots=st.integers(0, 4))
def test_no_name_leads_out_of_the_cache(tail, dots, cache, ask):
    guard = Guard(behind, token=TOKEN, cookie=COOKIE, cache=cache, max_body_bytes=1)
    name = f"{cache}/{'../' * dots}{tail}"
    if guard._is_ours(name):
        assert Path(name).resolve().is_relative_to(cache)
