"""A real server over HTTP: its doors, its users at once, what it leaves behind, and its end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import serving
from client import Client
from PIL import Image

pytestmark = pytest.mark.timeout(300)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "serving" / "requests.jsonl").read_text().splitlines()]


def test_without_the_token_every_door_is_shut(server):
    for path in ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/docs"):
        for cookies in ({}, {f"hpcmm_serve_{server.base.rpartition(':')[2]}": "wrong"}):
            assert httpx.get(server.base + path, cookies=cookies).status_code == 403
    assert httpx.post(server.base + "/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert httpx.get(server.base + "/?token=wrong").status_code == 403


def test_it_listens_on_the_loopback_interface_alone(server):
    children = psutil.Process(server.process.pid).net_connections()
    listening = {each.laddr.ip for each in children if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_it_rests_when_nobody_asks(server):
    def switches() -> int:
        tasks = Path(f"/proc/{server.process.pid}/task").glob("*/status")
        return sum(int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", each.read_text(), re.M)[1]) for each in tasks)

    before, began = switches(), time.monotonic()
    time.sleep(1)
    assert (switches() - before) / (time.monotonic() - began) < 300  # gradio's queue alone: about 900 a second


def test_the_token_is_in_no_command_line_and_no_log(server, trained_run):
    assert server.token not in " ".join(psutil.Process(server.process.pid).cmdline())
    with Client(server) as client:
        client.get("/config")
    assert server.output.read_text().count(server.token) == 1  # the address that it is meant to print
    assert all(server.token not in path.read_text() for path in (trained_run / "serving").iterdir())


def test_a_question_is_answered_and_logged_without_the_image(server, trained_run, picture):
    with Client(server) as client:
        page = client.ask(picture("part.png"), "a brick wall", "Is there an anomaly?")
    assert 'class="hpcmm-result"' in page
    assert "a rule on the heat map" in page
    last = log_of(trained_run)[-1]
    assert (last["file"], last["caption"], last["question"]) == ("part.png", "a brick wall", "Is there an anomaly?")
    assert (last["outcome"], last["pixels"]) == ("answered", [64, 48])
    assert max(map(len, map(str, last.values()))) < 100
    assert stat.S_IMODE((trained_run / "serving" / "requests.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no image", "no PNG, JPEG"), (b"\x89PNG\r\n\x1a\n" + bytes(50), "no PNG, JPEG"), (None, "damaged or cut off")],
)
def test_a_bad_image_is_a_sentence_and_the_server_lives(content, said, server, picture):
    path = picture("bad.png")
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with Client(server) as client:
        assert said in client.ask(path)
        assert 'class="hpcmm-result"' in client.ask(picture("good.png"))


def test_a_huge_image_is_a_sentence(server, tmp_path):
    Image.new("1", (20_000, 3000)).save(tmp_path / "huge.png")
    with Client(server) as client:
        assert "At most 4 million pixels" in client.ask(tmp_path / "huge.png")


def test_what_is_too_large_to_upload_is_refused(server, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(1_100_000))
    with Client(server) as client, (tmp_path / "large.png").open("rb") as file:
        assert client.http.post("/gradio_api/upload", files={"files": file}).status_code == 413
        many = [("files", (f"{number}.png", bytes(900_000))) for number in range(6)]
        assert client.http.post("/gradio_api/upload", files=many).status_code == 413

        def long():
            for _ in range(4000):
                sent.append(65_536)
                yield bytes(65_536)

        sent: list[int] = []
        kind = {"content-type": "multipart/form-data; boundary=b"}
        with contextlib.suppress(httpx.HTTPError):  # cut off while it was sending
            assert client.http.post("/gradio_api/upload", content=long(), headers=kind).status_code in {400, 413}
        assert sum(sent) < 100e6
        assert client.http.get("/config").status_code == 200


@pytest.mark.parametrize("caption", ["", "x" * 121])
def test_what_it_shows_must_be_said_in_bounds(caption, server, picture):
    with Client(server) as client:
        assert "hpcmm-problem" in client.ask(picture(), caption)


def test_a_question_has_bounds_too(server, picture):
    with Client(server) as client:
        assert "at most 300 characters are taken; these are 301" in client.ask(picture(), question="?" * 301)


def test_names_and_words_of_strangers_stay_text(server, picture):
    hostile = "<img src=x onerror=alert(1)>${alert(1)}{{x}}"
    with Client(server) as client:
        page = client.ask(picture(), name=hostile + ".png")
    assert "onerror=alert" not in page.replace("onerror=alert(1)&gt;", "")
    assert "${" not in page


def test_files_of_the_machine_are_out_of_reach(server, trained_run, picture):
    with Client(server) as client:
        for path in ("/etc/passwd", str(trained_run / "config.yaml"), "/proc/self/environ", str(server.output)):
            for way in (path, path.replace("/", "%2f"), f"/opt/../{path}"):
                assert client.http.get(f"/gradio_api/file={way}").status_code == 404
        upload = {"path": "/etc/passwd", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        assert client.join([upload, "a wall", "?", 0.5, None]).status_code == 400


def test_a_page_of_another_origin_gets_nothing(server):
    with Client(server) as client:
        assert client.http.get("/config", headers={"host": "evil.example"}).status_code == 421
        assert client.http.post("/gradio_api/queue/join", json={}, headers={"origin": "http://x"}).status_code == 403


def test_no_question_gets_past_the_queue(server, picture):
    with Client(server) as client:
        question = [client.upload(picture()), "a wall", "Is there an anomaly?", 0.5]
        assert client.join(question, door="run/predict").status_code == 404
        moved = client.join([0.5, None], name="again", door="run/predict")  # a slider, which is quick
        assert moved.status_code == 200


def test_a_function_that_the_page_does_not_have_leaves_one_line_and_no_traceback(server):
    before = len(server.output.read_text())
    with Client(server) as client:
        for door in ("queue/join", "run/predict"):
            body = {"data": [0.5, None], "fn_index": 9999, "session_hash": "abc"}
            assert client.http.post(f"/gradio_api/{door}", json=body).status_code == 400
    lines = server.output.read_text()[before:].splitlines()
    assert [line for line in lines if "for a function that the page does not have" in line] == lines
    assert len(lines) == 2


def test_many_users_at_once_get_their_own_answers(server, trained_run, picture):
    before = len(log_of(trained_run))

    def use(number: int) -> str:
        with Client(server) as client:
            return client.ask(picture(f"user{number}.png", size=(40 + number, 40)))

    with ThreadPoolExecutor(12) as pool:
        pages = list(pool.map(use, range(12)))
    for number, page in enumerate(pages):
        assert f"heat map over user{number}.png" in page
    logged = {line["file"]: line["pixels"] for line in log_of(trained_run)[before:]}
    assert logged == {f"user{number}.png": [40 + number, 40] for number in range(12)}


def test_more_than_may_wait_are_told_that_it_is_busy_and_it_ends_at_once(trained_run, tmp_path, picture):
    with serving.served(trained_run, tmp_path, "--max-batch", "1", "--max-waiting", "1", "--threshold", "0.5") as small:
        path = picture("a.png")

        def use(_: int) -> str:
            with Client(small) as client:
                return client.ask(path)

        with ThreadPoolExecutor(16) as pool:
            pages = list(pool.map(use, range(48)))
        answered = sum("hpcmm-result" in page for page in pages)
        busy = sum("The model is busy: 1 requests wait already" in page for page in pages)
        assert answered + busy == 48
        assert answered > 0 < busy
        assert "hpcmm-result" in use(0)
        # A second server cannot have its port, and says so.
        port = small.base.rpartition(":")[2]
        other = serving.subprocess.run(
            [serving.sys.executable, "-m", "hpcmm.serve", str(trained_run), "--port", port],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (other.returncode, "cannot be had" in other.stderr) == (1, True), other.stderr
        ends_at_once_and_leaves_nothing_though_pages_are_open(small, signal.SIGTERM)


@pytest.mark.long
def test_it_ends_at_once_in_a_terminal(trained_run, tmp_path):
    with serving.served(trained_run, tmp_path, "--threshold", "0.5") as started:
        ends_at_once_and_leaves_nothing_though_pages_are_open(started, signal.SIGINT)


def ends_at_once_and_leaves_nothing_though_pages_are_open(started, number):
    folders = set(Path(tempfile.gettempdir()).glob("hpcmm-serve-*"))
    port = int(started.base.rpartition(":")[2])
    with Client(started) as client, client.http.stream("GET", "/gradio_api/heartbeat/abc") as _:
        began = time.monotonic()
        assert started.end(number) == 0
        assert time.monotonic() - began < 15
    assert started.output.read_text().endswith("The server has ended.\n")
    assert "Traceback" not in started.output.read_text()
    assert len(folders - set(Path(tempfile.gettempdir()).glob("hpcmm-serve-*"))) >= 1
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_a_checkpoint_that_others_can_write_is_not_served(trained_run):
    tag = trained_run / "checkpoints" / (trained_run / "checkpoints" / "latest").read_text().strip()
    file = next(tag.iterdir())
    mode = stat.S_IMODE(file.stat().st_mode)
    file.chmod(0o666)
    try:
        done = serving.subprocess.run(
            [serving.sys.executable, "-m", "hpcmm.serve", str(trained_run)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        file.chmod(mode)
    assert done.returncode == 1
    assert "can be written by another user" in done.stderr
    assert "Traceback" not in done.stderr
