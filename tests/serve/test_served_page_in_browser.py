"""The served page in a real browser, with real clicks: upload, ask, slider, a table of files, hostile names."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import chromium, complaints, let_draw, needs_chromium, new_window
from PIL import Image
from playwright.sync_api import Browser, Page
from serving import Server

# Left to `make test-all`: test_server asks the same page over HTTP, and test_omni_page has a browser ask its own.
pytestmark = [
    needs_chromium,
    pytest.mark.long,
    pytest.mark.timeout(300),
]

INPUT = "input[type=file]"
RESULT = "#result .hpcmm-result"
END, HOME, LEFT, RIGHT = "End", "Home", "ArrowLeft", "ArrowRight"
HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{3}}.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def requested() -> list[str]:
    """Addresses that :func:`page` asks for, in order."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, requested: list[str]) -> Iterator[Page]:
    with new_window(browser, width=1240, height=1000) as window:
        opened = window.new_page()
        opened.on("request", lambda request: requested.append(request.url))
        opened.goto(server.url)
        opened.wait_for_function("document.querySelector('#ask') && document.querySelector('#examples img')")
        opened.evaluate("window.alert = (text) => { window.alerted = text }")
        yield opened


def upload(page: Page, path: Path) -> None:
    """Choose a file for the image, and wait until it is there."""
    page.set_input_files(f"#image {INPUT}", path)
    page.wait_for_selector("#image img")


def ask(page: Page) -> None:
    page.click("#ask")


def verdict(page: Page) -> str:
    return str(page.evaluate(f"document.querySelector('{RESULT}').dataset.verdict"))


def serious(page: Page) -> list[str]:
    """Complaints other than the page's own requests, and a word of gradio's own about uploads."""
    known = ("request of ", "Method not implemented.")
    return [complaint for complaint in complaints(page) if not complaint.startswith(known)]


def hosts(requested: list[str]) -> set[str]:
    return {urlsplit(url).netloc for url in requested if not url.startswith(("data:", "blob:"))}


def test_an_uploaded_image_gets_words_a_map_and_a_score(page, requested, server, picture):
    upload(page, picture("part.png"))
    page.fill("#question textarea, #question input", "Is it broken?")
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT} img')?.naturalWidth === 560")
    assert verdict(page) in {"anomalous", "normal"}
    text = page.evaluate(f"document.querySelector('{RESULT}').innerText")
    assert "a rule on the heat map" in text
    assert "reaches the threshold" in text  # the legend
    assert hosts(requested) == {urlsplit(server.url).netloc}
    assert serious(page) == []
    assert "token" not in page.evaluate("location.href")
    assert server.token not in page.evaluate("document.cookie + document.documentElement.outerHTML")


def test_an_example_brings_its_picture_and_its_phrase(page):
    before = page.evaluate("document.querySelector('#caption input').value")
    page.locator("#examples button").nth(1).click()
    page.wait_for_function("document.querySelector('#image img')")
    page.wait_for_function(f"document.querySelector('#caption input').value !== {json.dumps(before)}")
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT} img')?.naturalWidth > 0")
    assert serious(page) == []


def test_the_threshold_can_be_moved_without_asking_again(page, picture):
    upload(page, picture("part.png"))
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT} img')")
    for _ in range(4):  # an answer that is lost would stop all later ones
        for key, expected in ((HOME, "anomalous"), (END, "normal")):
            press_on_slider(page, key)
            page.wait_for_function(f"document.querySelector('{RESULT}').dataset.verdict === '{expected}'")


def test_a_slider_that_moves_quickly_ends_where_it_stops(page, picture):
    upload(page, picture("part.png"))
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT} img')")
    for last, expected in ((HOME, "anomalous"), (END, "normal"), (HOME, "anomalous")):
        for key in (END, LEFT, HOME, RIGHT, END, HOME, RIGHT, last):
            press_on_slider(page, key)
        page.wait_for_function(f"document.querySelector('{RESULT}').dataset.verdict === '{expected}'")
        time.sleep(0.3)  # nothing older comes after it
        assert verdict(page) == expected


def press_on_slider(page: Page, key: str) -> None:
    page.press("#threshold input[type=range]", key)


def test_a_bad_image_is_a_sentence_and_the_next_one_works(page, picture):
    bad = picture("bad.png")
    bad.write_bytes(bad.read_bytes()[:3000])
    upload(page, bad)
    ask(page)
    page.wait_for_function("document.querySelector('#result .hpcmm-problem')")
    assert "damaged or cut off" in page.evaluate("document.querySelector('#result').innerText")
    page.click("#image button[aria-label='Remove Image']")
    page.wait_for_function("!document.querySelector('#image img')")
    upload(page, picture("good.png"))
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT}')")


def test_without_an_image_it_says_what_to_do(page):
    ask(page)
    page.wait_for_function("document.querySelector('#result .hpcmm-problem')")
    assert "upload one, or take an example" in page.evaluate("document.querySelector('#result').innerText")


def test_hostile_names_and_words_are_shown_as_text(page, picture):
    upload(page, picture(HOSTILE))
    page.fill("#question textarea, #question input", HOSTILE)
    ask(page)
    page.wait_for_function(f"document.querySelector('{RESULT} img')")
    assert page.evaluate(f"document.querySelector('{RESULT} img').alt") == f"heat map over {HOSTILE}"
    assert page.evaluate("window.alerted") is None


def test_many_files_become_a_table_a_gallery_and_a_csv(page, requested, server, picture, tmp_path):
    names = ["first.png", HOSTILE, "broken.png"]
    paths = [picture(name) for name in names]
    paths[2].write_bytes(b"nothing")
    page.get_by_role("tab").nth(1).click()
    page.wait_for_function("document.querySelector('#files input[type=file]')")
    page.set_input_files(f"#files {INPUT}", paths)
    page.wait_for_function("document.querySelector('#files').innerText.includes('first')")
    page.wait_for_function("!document.querySelector('#files .progress-bar, #files .uploading')")
    page.click("#score-all")
    page.wait_for_function("document.querySelectorAll('#table tbody tr').length === 3")
    shown = page.locator("#table tbody tr td:first-child").all_text_contents()
    assert sorted(shown) == sorted(names)
    assert shown[-1] == "broken.png"
    assert "1 could not be used" in page.evaluate("document.querySelector('#table').innerText")
    page.wait_for_function(
        "[...document.querySelectorAll('#gallery img')].filter((each) => each.naturalWidth > 0).length === 2"
    )
    page.wait_for_function("!document.querySelector('button#download, #download button').disabled")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "scores.csv"
    download.value.save_as(tmp_path / "scores.csv")
    lines = list(csv.DictReader((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["file"] for line in lines] == names
    assert lines[2]["problem"].startswith("The file is no PNG")
    assert page.evaluate("window.alerted") is None
    assert hosts(requested) == {urlsplit(server.url).netloc}


def test_a_wrong_token_shows_a_sentence_and_nothing_else(page, server):
    other = server.base.replace("127.0.0.1", "localhost")  # if this window has no cookie
    for url in (f"{other}/?token=wrong", f"{other}/", f"{other}/config"):
        refused = page.context.new_page()
        refused.goto(url)
        refused.wait_for_function("document.body.innerText.length > 20")
        text = refused.evaluate("document.body.innerText")
        assert "oken" in text
        assert refused.evaluate("document.querySelectorAll('input, script, button').length") == 0
        assert server.token not in text


def test_another_site_can_neither_frame_nor_read_it(page, server, tmp_path):
    (tmp_path / "evil.html").write_text(
        f"<iframe src='{server.base}/'></iframe><script>window.stolen = fetch('{server.base}/config', "
        "{credentials: 'include'}).then((answer) => answer.text(), () => 'nothing')</script>"
    )
    evil = page.context.new_page()  # beside a page of the server, whose cookie this window has
    evil.goto((tmp_path / "evil.html").as_uri())
    time.sleep(0.5)
    assert evil.evaluate("window.stolen") == "nothing"
    assert evil.evaluate("document.querySelector('iframe').contentDocument") is None


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_in_dark(dark, browser, server, picture, tmp_path):
    with new_window(browser, width=1240, height=1000, dark=dark) as window:
        opened = window.new_page()
        opened.goto(server.url)
        opened.wait_for_selector("#examples img")
        upload(opened, picture("part.png"))
        ask(opened)
        opened.wait_for_selector(f"{RESULT} img")
        let_draw(opened)
        opened.screenshot(path=tmp_path / "page.png", full_page=True)
        colour = "getComputedStyle(document.querySelector('.hpcmm-answer')).color"
        ink = opened.evaluate(f"{colour}.match(/[0-9]+/g).map(Number)")
    with Image.open(tmp_path / "page.png") as drawn:
        corner = sum(drawn.convert("RGB").getpixel((5, 5)))
    assert (corner < 200) is dark
    assert (sum(ink[:3]) > 500) is dark
