"""Debian's Chromium without a window, driven by Playwright, and everything that a page complains about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

FLAGS = ["--disable-gpu", "--disable-quic", "--disable-sync"]
"""What Playwright does not itself pass. Among what it passes: a new profile, no sandbox, no traffic of the browser."""
TIMEOUT_MS = 150_000

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, ended at the end."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS) as browser,
    ):
        yield browser


def new_window(browser: Browser, *, width: int = 1280, height: int = 1600, dark: bool = False) -> BrowserContext:
    """A window with no cookies yet; closing it closes its pages."""
    window = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", device_scale_factor=1
    )
    window.set_default_timeout(TIMEOUT_MS)
    return window


def open_report(browser: Browser, path: Path, *, width: int = 1280, height: int = 1600, dark: bool = False) -> Page:
    """A report with its timeline drawn (or known to be absent), in a window of its own."""
    page = new_window(browser, width=width, height=height, dark=dark).new_page()
    page.goto(path.as_uri())
    page.wait_for_function(
        "!JSON.parse(document.getElementById('timeline-data').textContent).lanes.length || window.hpcmmTimeline"
    )
    return page


def let_draw(page: Page) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def place(page: Page, selector: str) -> dict[str, float]:
    """Of the first such element in the window: x, y, width, height."""
    box = page.locator(selector).first.bounding_box()
    assert box is not None, f"{selector} is not shown"
    return dict(box)


def complaints(page: Page) -> list[str]:
    """Console errors and warnings, exceptions, violations of the policy, and requests other than of the page."""
    page.evaluate("0")  # what the page did until now is told before this is answered
    told = [message.text for message in page.console_messages() if message.type in {"error", "warning", "assert"}]
    thrown = [str(error) for error in page.page_errors()]
    asked = [f"request of {request.url}" for request in page.requests() if request.resource_type != "document"]
    return told + thrown + asked
