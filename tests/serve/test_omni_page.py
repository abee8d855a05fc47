"""The omni-modal model's page: conversations of texts, images and sounds, with real uploads, good and hostile."""

from __future__ import annotations

import asyncio
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import serving
from browser import chromium, complaints, needs_chromium, new_window
from client import Client
from PIL import Image
from test_uploads import png_of
from torch import Tensor

from hpcmm.errors import HpcmmError
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.server import load_page
from hpcmm.workloads.omni.data.conversations import TEXT, Conversation, Part, Turn
from hpcmm.workloads.omni.models.modalities.connector import Connector
from hpcmm.workloads.omni.models.modalities.modality import Modality
from hpcmm.workloads.omni.page.blocks import Chat, Talk
from hpcmm.workloads.omni.page.served import OmniPage, PageOptions

pytestmark = pytest.mark.timeout(300)

MOST_TOKENS, CONTEXT, NEW_TOKENS = 160, 150, 8
HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{3}}"
RATE_HZ = 16_000


def wav_of(samples: bytes, *, form: int = 1, channels: int = 1, rate_hz: int = RATE_HZ, bits: int = 16) -> bytes:
    """A WAV file that says so of its samples, true or not."""
    frame = channels * bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, form, channels, rate_hz, (rate_hz * frame) % 2**32, frame, bits)
    return riff(head + struct.pack("<4sI", b"data", len(samples)) + samples)


def riff(content: bytes) -> bytes:
    return struct.pack("<4sI4s", b"RIFF", len(content) + 4, b"WAVE") + content


def tone(seconds: float, rate_hz: int = RATE_HZ) -> bytes:
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return (9000 * np.sin(2 * math.pi * 440 * times)).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a few conversations: a real checkpoint, whose answers mean nothing."""
    root = tmp_path_factory.mktemp("omni")
    data = root / "data"
    data.mkdir()
    Image.new("RGB", (40, 24), "red").save(data / "a.png")
    (data / "a.wav").write_bytes(wav_of(tone(0.5)))
    (data / "long.wav").write_bytes(wav_of(tone(40)))
    lines = [
        talk_of(("What colour?", "image", "a.png"), ("red", "colour")),
        talk_of(("How long?", "sound", "a.wav"), ("short", "length")),
        talk_of(("How long?", "sound", "long.wav"), ("long", "too_long")),
        talk_of(
            ("What colour?", "image", "a.png"), ("red", "first"), ("How long?", "sound", "a.wav"), ("short", "both")
        ),
    ]
    for name in ("train.jsonl", "test.jsonl"):
        (data / name).write_text("\n".join(lines) + "\n")
    return serving.launch(
        root / "runs", "task=omni", "name=talk", "train.steps=2", "train.micro_batch_size=1", f"data.root={data}",
        "data.on_error=skip", f"data.max_tokens={MOST_TOKENS}", f"model.language_model.tiny.longest={CONTEXT}",
        "model.language_model.tiny.layers=1",
        "model.modalities.image.layers=1", "model.modalities.sound.layers=1", "model.modalities.sound.window_s=0.5",
    )  # fmt: skip


def talk_of(*turns: tuple[str, ...]) -> str:
    """A line of a data file: (question, type, path) and (answer, kind) in turn."""
    written = []
    for turn in turns:
        if len(turn) == 3:
            content = [{"type": turn[1], "path": turn[2]}, {"type": "text", "text": turn[0]}]
            written.append({"role": "user", "content": content})
        else:
            written.append({"role": "assistant", "content": turn[0], "kind": turn[1]})
    return json.dumps({"turns": written})


@pytest.fixture(scope="module")
def talk(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """The page of the run within this process, with limits that are quick to reach."""
    options = ServeOptions(
        run=str(run), max_upload_mb=2.5, max_megapixels=4, max_files=3, page={"max_new_tokens": NEW_TOKENS}
    )
    page, service = load_page(options)
    yield Talk(page, service, page.examples(tmp_path_factory.mktemp("shown")))
    service.close()


@pytest.fixture
def chat() -> Chat:
    return Chat()


@pytest.fixture
def image(picture: Callable[..., Path]) -> Path:
    return picture("part.png")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return written(tmp_path / "word.wav", wav_of(tone(0.4)))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def add(talk: Talk, chat: Chat, key: str, path: Path, text: str = "", name: str = "") -> tuple[str, str]:
    """What the page shows of the message, and what is left in the box."""
    _, draft, box, _ = asyncio.run(talk.add(key, [(path, name or path.name)], text, chat, "me"))
    return draft, box


def send(talk: Talk, chat: Chat, text: str = "") -> list[tuple[str, str, str, Chat]]:
    """What the page shows, one after the other."""

    async def shown() -> list[tuple[str, str, str, Chat]]:
        return [each async for each in talk.send(text, chat, "me")]

    return asyncio.run(shown())


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "serving" / "requests.jsonl").read_text().splitlines()]


def types(chat: Chat) -> list[list[str]]:
    return [[piece.part.type for piece in message.pieces] for message in chat.messages]


def test_texts_and_files_keep_their_order_over_turns(talk, chat, run, image, sound):
    before = len(log_of(run))
    add(talk, chat, "image", image, "Look at this,")
    draft, box = add(talk, chat, "sound", sound, "and hear")
    assert (draft.count("<figure"), draft.count("<audio"), draft.count("<img"), box) == (2, 1, 1, "")
    at_once, then = send(talk, chat, "What is it?")
    assert "The model is writing." in at_once[0]
    assert (at_once[1], at_once[2]) == ("", "")
    assert "hpcmm-assistant" in then[0]
    send(talk, chat, "Are you sure?")
    assert types(chat) == [[TEXT, "image", TEXT, "sound", TEXT], [TEXT], [TEXT], [TEXT]]
    assert re.fullmatch(rf"\d+\.\d\d s · {NEW_TOKENS} tokens, cut off there", chat.messages[3].told)
    turns = tuple(message.turn() for message in chat.messages)
    for asked in (1, 3):  # as a script would have asked it, the files read from their folder
        parts = [
            Turn(turn.role, tuple(Part(part.type, part.text, part.path) for part in turn.content))
            for turn in turns[:asked]
        ]
        assert talk._page.answerer.answer([Conversation(tuple(parts), "x")], NEW_TOKENS) == [turns[asked].text]
    first, second = [line for line in log_of(run)[before:] if line["kind"] == "conversation"]
    assert (first["parts"], first["files"]) == ("text, image, text, sound, text", "part.png, word.wav")
    assert (first["question"], first["tokens"]) == ("Look at this, and hear What is it?", NEW_TOKENS)
    assert (second["turn"], second["outcome"]) == (3, "answered")
    assert max(len(str(value)) for line in log_of(run) for value in line.values()) <= 400


def test_several_of_each_and_none_are_answered(talk, chat, image, sound, tmp_path):
    other = written(tmp_path / "other.wav", wav_of(tone(0.2, 44_100) * 6, rate_hz=44_100, channels=6))
    for key, path in (("sound", sound), ("sound", other), ("image", image)):
        add(talk, chat, key, path)
    send(talk, chat)
    send(talk, chat, "Hm?")
    assert types(chat) == [["sound", "sound", "image"], [TEXT], [TEXT], [TEXT]]


def test_a_photograph_is_seen_upright(talk, chat, tmp_path):
    exif = Image.new("RGB", (64, 32)).getexif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    add(talk, chat, "image", tmp_path / "a.jpg")
    assert tuple(chat.draft[0].part.prepared.shape) == (3, 64, 32)


def test_two_who_ask_at_once_get_what_each_would_alone(talk, image):
    chats = [Chat(), Chat(), Chat()]
    add(talk, chats[0], "image", image)

    async def ask(chat: Chat) -> None:
        async for _ in talk.send("What is this?", chat, "me"):
            pass

    async def together() -> None:
        await asyncio.gather(*map(ask, chats))

    asyncio.run(together())
    for chat in chats:
        conversation = Conversation((chat.messages[0].turn(),), "x")
        assert talk._page.answerer.answer([conversation], NEW_TOKENS) == [chat.messages[1].text]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "no PNG, JPEG"),
        (wav_of(tone(0.1)), "no PNG, JPEG"),
        (None, "damaged or cut off"),
        (png_of(2001, 2001), "At most 4 million pixels"),
        (png_of(100_000, 100_000), "At most 4 million pixels"),
        (bytes(2_600_000), "at most 2.5 MB"),
    ],
)
def test_an_image_that_cannot_be_used_is_a_sentence(content, said, talk, chat, image):
    content = image.read_bytes()[:2000] if content is None else content
    assert_refused(talk, chat, "image", written(image, content), said)


LIES = wav_of(tone(0.1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no WAV sound"),
        (png_of(8, 8), "no WAV sound"),
        (b"RIFF\0\0\0\0WAVE", "is damaged"),
        (wav_of(tone(0.4))[:6000], "is cut off"),
        (LIES[:40] + b"\xff\xff\xff\xff" + LIES[44:], "is cut off"),
        (wav_of(b""), "is empty"),
        (wav_of(bytes(40_000), rate_hz=1000, bits=8), "40.0 s, and at most 30 s"),
        (wav_of(tone(0.1), rate_hz=0), "is damaged, or not of 1000 to 399999 samples"),
        (wav_of(tone(0.1), rate_hz=2**32 - 1), "is damaged, or not of"),
        (wav_of(tone(0.1), channels=0), "is damaged"),
        (wav_of(tone(0.1), channels=65_535, bits=8), "is empty"),
        (wav_of(tone(0.1), form=7, bits=8), "cannot be read as a WAV file"),
        (wav_of(np.full(800, np.nan, "<f4").tobytes(), form=3, bits=32), "not finite numbers"),
        (riff(struct.pack("<4sI", b"junk", 0) * 200_000), "is damaged"),
        (riff(struct.pack("<4sI", b"junk", 2**32 - 1)), "is damaged"),
    ],
)
def test_a_sound_that_cannot_be_used_is_a_sentence(content, said, talk, chat, tmp_path):
    assert_refused(talk, chat, "sound", written(tmp_path / "a.wav", content), said)


def assert_refused(talk: Talk, chat: Chat, key: str, path: Path, said: str) -> None:
    shown, box = add(talk, chat, key, path, "What is it?")
    assert f'class="hpcmm-note hpcmm-problem" role="status">{path.name}: ' in shown
    assert said in shown
    assert str(path.parent) not in shown
    assert (box, chat.draft) == ("What is it?", [])


def test_a_file_that_has_gone_is_said(talk, chat, tmp_path):
    assert_refused(talk, chat, "sound", tmp_path / "gone.wav", "upload it again")


def test_a_conversation_has_bounded_files_and_their_tokens_too(talk, chat, image, picture, tmp_path):
    for _ in range(3):
        add(talk, chat, "image", image)
    assert "at most 3 files" in add(talk, chat, "image", image)[0]
    chat.begin()
    add(talk, chat, "image", image)
    shown, _ = add(talk, chat, "sound", written(tmp_path / "a.wav", wav_of(tone(20))))
    assert "The sound has 200 tokens, the files before it 12, and a conversation may have 160" in shown
    assert len(chat.draft) == 1


@pytest.mark.parametrize("length", [CONTEXT, MOST_TOKENS, 5000])
def test_a_conversation_that_is_too_long_is_a_sentence_and_stays_with_its_user(length, talk, chat):
    *_, last = send(talk, chat, "? " * length)
    assert "more tokens than the model takes" in last[1]
    assert chat.messages == []
    assert [piece.part.text for piece in chat.draft] == [("? " * length).strip()]


def test_a_text_has_bounded_characters(talk, chat):
    (shown,) = send(talk, chat, "x" * 10_001)
    assert "at most 10000 characters" in shown[1]
    assert (len(shown[2]), chat.messages) == (10_001, [])


def test_an_answer_ends_where_the_context_does(talk):
    words = next(
        Conversation((Turn("user", (Part(TEXT, "?" * length),)),), "x")
        for length in range(CONTEXT)
        if talk._page.answerer.prompt(Conversation((Turn("user", (Part(TEXT, "?" * length),)),), "x")).room == 3
    )
    assert talk._page.predict([talk._page.answerer.prompt(words)])[0].tokens <= 3


def test_nothing_to_ask_is_said(talk, chat):
    (shown,) = send(talk, chat, "  ")
    assert "nothing to ask yet" in shown[1]


def test_a_message_waits_for_the_one_before_it_and_a_new_conversation_does_not(talk, chat):
    async def both() -> list[str]:
        first = talk.send("One?", chat, "me")
        await anext(first)
        refused = [each async for each in talk.send("Two?", chat, "me")]
        await talk.begin(chat)
        last = [each async for each in first]
        return [refused[0][1], refused[0][2], last[-1][0]]

    refused, box, shown = asyncio.run(both())
    assert "still waits for its answer" in refused
    assert box == "Two?"
    assert "hpcmm-assistant" not in shown
    assert (chat.messages, chat.waiting) == ([], None)


def test_a_held_out_conversation_is_asked_with_its_answer_shown(talk, chat):
    assert [each.kind for each in talk._examples] == ["colour", "length", "both"]  # not the one that is too long
    asyncio.run(talk.take(2, chat))
    assert types(chat) == [["image", TEXT], [TEXT]]
    assert [piece.part.type for piece in chat.draft] == ["sound", TEXT]
    *_, last = send(talk, chat)
    assert "expected: short" in last[0]
    asyncio.run(talk.take(0, chat))
    *_, last = send(talk, chat, "Or not?")  # a question of the user's own
    assert "expected" not in last[0]
    asyncio.run(talk.take(99, chat))
    assert len(chat.messages) == 2


def test_hostile_names_and_words_stay_text(talk, chat, image):
    add(talk, chat, "image", image, HOSTILE, name=HOSTILE)
    *_, last = send(talk, chat)
    assert "<img src=x" not in last[0]
    assert not any(mark in last[0] for mark in ("$", "{", "}"))


def test_lines_of_a_text_stay_lines(talk, chat):
    *_, last = send(talk, chat, "one\ntwo\tthree")
    assert "<p>one<br>two     three</p>" in last[0]


class Numbers(Modality):
    """A modality of a user's own: a file of numbers, one token each."""

    upload_suffixes = (".txt",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.finish(Connector("linear", 1, 1), Connector("linear", 1, width), frozen=True, connector_frozen=False)

    def read(self, path: Path) -> Tensor:
        text = path.read_text()
        if len(text) > 20:
            raise HpcmmError(f"{path} has more than 20 characters.")
        return Tensor([float(word) for word in text.split()])

    def count(self, prepared: Tensor) -> int:
        return len(prepared)

    def example(self) -> Tensor:
        return Tensor([0.0])

    def forward(self, prepared: Any) -> Tensor:
        raise NotImplementedError


class Folders(Numbers):
    """One that reads folders."""

    upload_suffixes = None


def test_what_the_model_takes_is_what_can_be_uploaded(talk, run, tmp_path, capsys):
    assert talk._page.uploads == {
        "image": [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"], "sound": [".wav"],
    }  # fmt: skip
    own = {"numbers": Numbers(8), "many": Folders(8)}
    options = ServeOptions(run=str(run), max_upload_mb=0.001)
    page = OmniPage(talk._page.answerer, own, options, name="x", about="", max_tokens=99, held_out=[])
    assert page.uploads == {"numbers": [".txt"]}
    good = page.piece("numbers", written(tmp_path / "a.txt", b"1 2 3"), "a.txt")
    assert (good.tokens, good.part.prepared.tolist()) == (3, [1, 2, 3])
    for content, said in (
        (b"9" * 21, "^mine has more than 20 characters.$"), (b"", "too small to make one token"),
        (b"one", "The numbers cannot be read: it is damaged"), (bytes(1001), "at most 0.001 MB"),
    ):  # fmt: skip
        with pytest.raises(HpcmmError, match=said):
            page.piece("numbers", written(tmp_path / "a.txt", content), "mine")
    assert "an uploaded numbers was not read: ValueError" in capsys.readouterr().err


def test_a_class_that_reads_files_of_another_kind_is_given_them_as_they_are(talk, run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples" / "video_modality")
    from clips.video import VideoModality

    page = OmniPage(
        talk._page.answerer, {"video": VideoModality(8)}, ServeOptions(run=str(run)), name="x", about="",
        max_tokens=99, held_out=[],
    )  # fmt: skip
    assert page.uploads == {"video": [".gif", ".webp"]}
    first, *others = [Image.new("RGB", (32, 16), colour) for colour in ("red", "green", "blue")]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others)
    piece = page.piece("video", tmp_path / "clip.gif", "clip.gif")
    assert (piece.tokens, tuple(piece.part.prepared.shape)) == (3 * 2 * 1, (3, 3, 16, 32))
    with pytest.raises(HpcmmError, match="cannot be read as a GIF or WebP"):
        page.piece("video", written(tmp_path / "not.gif", b"none"), "not.gif")


def test_tokens_of_an_answer_must_be_a_number():
    with pytest.raises(HpcmmError, match=r"^--max-new-tokens is 0"):
        PageOptions(max_new_tokens=0)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    limits = ("--max-new-tokens", str(NEW_TOKENS), "--max-upload-mb", "1")
    with serving.served(run, tmp_path_factory.mktemp("server"), *limits) as started:
        yield started


def test_a_conversation_over_http(server, run, image, sound):
    before = len(log_of(run))
    with Client(server) as client:
        client.quick([[client.upload(image)], "Look", None], "add_image")
        draft = client.quick([[client.upload(sound)], "and hear", None], "add_sound")[1]
        source = re.search(r'<audio [^>]*src="([^"]+)"', draft)[1]
        played = client.get(source)
        assert (played.status_code, played.content) == (200, sound.read_bytes())
        assert played.headers["content-type"].startswith("audio/")
        assert "default-src 'none'" in played.headers["content-security-policy"]
        shown = client.answered(["What is it?", None], "ask")[0]
        assert "hpcmm-assistant" in shown
        bad = {**client.upload(image), "path": "/etc/passwd"}
        assert client.join([[bad], "", None], "add_sound", "run/predict").status_code == 400
        choice = next(each for each in client.get("/config").json()["components"] if each["type"] == "dropdown")
        taken = client.quick([choice["props"]["choices"][1][1], None], "take")[1]
        assert client.get(re.search(r'<audio [^>]*src="([^"]+)"', taken)[1]).status_code == 200
    last = log_of(run)[-1]
    assert len(log_of(run)) == before + 3
    assert (last["parts"], last["outcome"]) == ("text, image, text, sound, text", "answered")
    assert "Traceback" not in server.output.read_text()


@needs_chromium
def test_the_page_in_a_browser(server, image, sound):
    requested: list[str] = []
    with chromium() as browser, new_window(browser, width=1240, height=1000) as window:
        page = window.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#message textarea")
        page.evaluate("window.alert = (text) => { window.alerted = text }")
        page.fill("#message textarea", HOSTILE)
        page.set_input_files("input[type=file][accept*='.png']", image)
        page.wait_for_function("document.querySelector('#draft img')?.naturalWidth > 0")
        assert page.input_value("#message textarea") == ""
        page.set_input_files("input[type=file][accept*='.wav']", sound)
        page.wait_for_selector("#draft audio")
        page.evaluate("document.querySelector('#draft audio').preload = 'metadata'")
        page.evaluate("document.querySelector('#draft audio').load()")
        page.wait_for_function("Math.abs(document.querySelector('#draft audio').duration - 0.4) < 0.01")
        page.fill("#message textarea", "What is it?")
        page.click("#send")
        page.wait_for_selector("#conversation .hpcmm-assistant")
        assert HOSTILE in page.inner_text("#conversation")
        assert page.evaluate("window.alerted") is None
        assert page.inner_text("#draft") == ""
        page.click("#examples input")
        page.get_by_role("option").first.click()
        page.wait_for_selector("#draft img")
        page.click("#send")
        page.wait_for_function("document.querySelector('#conversation').innerText.includes('expected: red')")
        known = ("request of ", "Method not implemented.")
        assert [each for each in complaints(page) if not each.startswith(known)] == []
    assert {urlsplit(url).netloc for url in requested if not url.startswith(("data:", "blob:"))} == {
        urlsplit(server.url).netloc
    }
