"""The served page in a real browser, with real clicks: upload, ask, slider, a table of files, hostile names."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser, Page
from PIL import Image

pytestmark = [
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
    pytest.mark.timeout(300),
]

INPUT = "input[type=file]"
RESULT = "#result .hpcmm-result"
END, HOME, LEFT, RIGHT = ("End", 35), ("Home", 36), ("ArrowLeft", 37), ("ArrowRight", 39)
"""Keys with their codes."""
HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{3}}.png"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, server) -> Iterator[Page]:
    opened = browser.visit(server.url, width=1240, height=1000)
    opened.wait("document.querySelector('#ask') && document.querySelector('#examples img')")
    opened.run("window.alert = (text) => { window.alerted = text }")
    yield opened
    opened.close()


def upload(page: Page, path: Path) -> None:
    """Choose a file for the image, and wait until it is there."""
    page.choose_files(f"#image {INPUT}", [path])
    page.wait("document.querySelector('#image img')")


def ask(page: Page) -> None:
    page.press("#ask")


def verdict(page: Page) -> str:
    return str(page.run(f"document.querySelector('{RESULT}').dataset.verdict"))


def serious(page: Page) -> list[str]:
    """Complaints other than the page's own requests, and a word of gradio's own about uploads."""
    known = ("request of ", "[{'type': 'string', 'value': 'Method not implemented.'}]")
    return [complaint for complaint in page.complaints() if not complaint.startswith(known)]


def hosts(page: Page) -> set[str]:
    return {urlsplit(url).netloc for url in page.requested() if not url.startswith(("data:", "blob:"))}


def test_an_uploaded_image_gets_words_a_map_and_a_score(page, server, picture):
    upload(page, picture("part.png"))
    page.type("#question textarea, #question input", "Is it broken?")
    ask(page)
    page.wait(f"document.querySelector('{RESULT} img')?.naturalWidth === 560")
    assert verdict(page) in {"anomalous", "normal"}
    text = page.run(f"document.querySelector('{RESULT}').innerText")
    assert "a rule on the heat map" in text
    assert "reaches the threshold" in text  # the legend
    assert hosts(page) == {urlsplit(server.url).netloc}
    assert serious(page) == []
    assert "token" not in page.run("location.href")
    assert server.token not in page.run("document.cookie + document.documentElement.outerHTML")


def test_an_example_brings_its_picture_and_its_phrase(page):
    before = page.run("document.querySelector('#caption input').value")
    page.run("document.querySelectorAll('#examples button')[1].setAttribute('id', 'second-example')")
    page.press("#second-example")
    page.wait("document.querySelector('#image img')")
    page.wait(f"document.querySelector('#caption input').value !== {json.dumps(before)}")
    ask(page)
    page.wait(f"document.querySelector('{RESULT} img')?.naturalWidth > 0")
    assert serious(page) == []


def test_the_threshold_can_be_moved_without_asking_again(page, picture):
    upload(page, picture("part.png"))
    ask(page)
    page.wait(f"document.querySelector('{RESULT} img')")
    for _ in range(4):  # an answer that is lost would stop all later ones
        for key, expected in ((HOME, "anomalous"), (END, "normal")):
            press_on_slider(page, *key)
            page.wait(f"document.querySelector('{RESULT}').dataset.verdict === '{expected}'")


def test_a_slider_that_moves_quickly_ends_where_it_stops(page, picture):
    upload(page, picture("part.png"))
    ask(page)
    page.wait(f"document.querySelector('{RESULT} img')")
    for last, expected in ((HOME, "anomalous"), (END, "normal"), (HOME, "anomalous")):
        for key in (END, LEFT, HOME, RIGHT, END, HOME, RIGHT, last):
            press_on_slider(page, *key)
        page.wait(f"document.querySelector('{RESULT}').dataset.verdict === '{expected}'")
        time.sleep(0.3)  # nothing older comes after it
        assert verdict(page) == expected


def press_on_slider(page: Page, key: str, code: int) -> None:
    page.run("document.querySelector('#threshold input[type=range]').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def test_a_bad_image_is_a_sentence_and_the_next_one_works(page, picture):
    bad = picture("bad.png")
    bad.write_bytes(bad.read_bytes()[:3000])
    upload(page, bad)
    ask(page)
    page.wait("document.querySelector('#result .hpcmm-problem')")
    assert "damaged or cut off" in page.run("document.querySelector('#result').innerText")
    page.press("#image button[aria-label='Remove Image']")
    page.wait("!document.querySelector('#image img')")
    upload(page, picture("good.png"))
    ask(page)
    page.wait(f"document.querySelector('{RESULT}')")


def test_without_an_image_it_says_what_to_do(page):
    ask(page)
    page.wait("document.querySelector('#result .hpcmm-problem')")
    assert "upload one, or take an example" in page.run("document.querySelector('#result').innerText")


def test_hostile_names_and_words_are_shown_as_text(page, picture):
    upload(page, picture(HOSTILE))
    page.type("#question textarea, #question input", HOSTILE)
    ask(page)
    page.wait(f"document.querySelector('{RESULT} img')")
    assert page.run(f"document.querySelector('{RESULT} img').alt") == f"heat map over {HOSTILE}"
    assert page.run("window.alerted") is None


def test_many_files_become_a_table_a_gallery_and_a_csv(page, browser, server, picture, tmp_path):
    names = ["first.png", HOSTILE, "broken.png"]
    paths = [picture(name) for name in names]
    paths[2].write_bytes(b"nothing")
    page.run("document.querySelectorAll('button[role=tab]')[1].setAttribute('id', 'second-tab')")
    page.press("#second-tab")
    page.wait("document.querySelector('#files input[type=file]')")
    page.choose_files(f"#files {INPUT}", paths)
    page.wait("document.querySelector('#files').innerText.includes('first')")
    page.wait("!document.querySelector('#files .progress-bar, #files .uploading')")
    page.press("#score-all")
    page.wait("document.querySelectorAll('#table tbody tr').length === 3")
    shown = page.run("[...document.querySelectorAll('#table tbody tr td:first-child')].map((cell) => cell.textContent)")
    assert sorted(shown) == sorted(names)
    assert shown[-1] == "broken.png"
    assert "1 could not be used" in page.run("document.querySelector('#table').innerText")
    page.wait("[...document.querySelectorAll('#gallery img')].filter((each) => each.naturalWidth > 0).length === 2")
    downloads = tmp_path / "downloads"
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    page.wait("!document.querySelector('button#download, #download button').disabled")
    page.press("#download")
    until = time.monotonic() + 60
    while not (downloads / "scores.csv").is_file():
        assert time.monotonic() < until
        time.sleep(0.1)
    lines = list(csv.DictReader((downloads / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["file"] for line in lines] == names
    assert lines[2]["problem"].startswith("The file is no PNG")
    assert page.run("window.alerted") is None
    assert hosts(page) == {urlsplit(server.url).netloc}


def test_a_wrong_token_shows_a_sentence_and_nothing_else(browser, server):
    other = server.base.replace("127.0.0.1", "localhost")  # where this browser has no cookie
    for url in (f"{other}/?token=wrong", f"{other}/", f"{other}/config"):
        refused = browser.visit(url)
        refused.wait("document.readyState === 'complete' && document.body.innerText.length > 20")
        text = refused.run("document.body.innerText")
        assert "oken" in text
        assert refused.run("document.querySelectorAll('input, script, button').length") == 0
        assert server.token not in text
        refused.close()


def test_another_site_can_neither_frame_nor_read_it(browser, server, tmp_path):
    (tmp_path / "evil.html").write_text(
        f"<iframe src='{server.base}/'></iframe><script>window.stolen = fetch('{server.base}/config', "
        "{credentials: 'include'}).then((answer) => answer.text(), () => 'nothing')</script>"
    )
    evil = browser.visit((tmp_path / "evil.html").as_uri())
    evil.wait("document.readyState === 'complete'")
    time.sleep(0.5)
    assert evil.run("window.stolen") == "nothing"
    assert evil.run("document.querySelector('iframe').contentDocument") is None
    evil.close()


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_in_dark(dark, browser, server, picture, tmp_path):
    opened = browser.visit(server.url, width=1240, height=1000, dark=dark)
    opened.wait("document.querySelector('#examples img')")
    upload(opened, picture("part.png"))
    ask(opened)
    opened.wait(f"document.querySelector('{RESULT} img')")
    opened.frame()
    opened.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as drawn:
        corner = sum(drawn.convert("RGB").getpixel((5, 5)))
    assert (corner < 200) is dark
    ink = opened.run("getComputedStyle(document.querySelector('.hpcmm-answer')).color.match(/[0-9]+/g).map(Number)")
    assert (sum(ink[:3]) > 500) is dark
    opened.close()
