"""The page in a real browser: it draws, answers mouse and keys, complains about nothing, and names stay text."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium, complaints, let_draw, needs_chromium, new_window, open_report, place
from large_study import PHASES, SLOW_RANK, large_study
from playwright.sync_api import Browser, Page

from hpcmm.analyze import Analysis
from hpcmm.page.html import page as render

pytestmark = needs_chromium

RANKS, STEPS = 64, 1000
ZOOM_FRAMES = """(async () => {
  const timeline = window.hpcmmTimeline, [first, last] = timeline.limits, drawn = [];
  for (let frame = 0; frame < 30; frame += 1) {
    const span = (last - first) * 0.75 ** frame;
    timeline.show(first + (last - first - span) * 0.4, first + (last - first - span) * 0.4 + span);
    const begin = performance.now();
    timeline.draw();
    drawn.push(performance.now() - begin);
    await new Promise(requestAnimationFrame);
  }
  timeline.showAll();
  return drawn;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def slow_page(browser: Browser, slow_data: Analysis) -> Page:
    return open_report(browser, slow_data.out / "report.html")


@pytest.fixture(scope="module")
def large_page(browser: Browser, slow_data: Analysis, tmp_path_factory) -> tuple[Page, Path]:
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(render(large_study(slow_data.study, ranks=RANKS, steps=STEPS)))
    return open_report(browser, path), path


def view(page: Page) -> tuple[float, float]:
    """What the timeline shows, in seconds."""
    let_draw(page)
    start, end = page.evaluate("[hpcmmTimeline.view.from, hpcmmTimeline.view.to].map((t) => t / hpcmmTimeline.second)")
    return start, end


def lane_point(page: Page, lane: int, share: float, *, comm: bool) -> tuple[float, float]:
    """A point of the window: ``share`` of the way along a lane's row of phases or communication."""
    page.evaluate("document.querySelector('#timeline canvas').scrollIntoView({block: 'center'})")
    box = place(page, "#timeline canvas")
    left, high = page.evaluate("[hpcmmTimeline.view.left, hpcmmTimeline.laneHeight]")
    y = box["y"] + page.evaluate("AXIS_HEIGHT") + (lane + (0.8 if comm else 0.3)) * high
    return box["x"] + left + share * (box["width"] - left), y


def test_what_a_page_complains_about_is_heard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "style.css").write_text("")
    (tmp_path / "page.html").write_text("""<!DOCTYPE html><title>bad</title>
      <meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src *">
      <link rel="stylesheet" href="style.css"><p style="color: red">refused</p><img src="data:image/gif;base64,R0lG">
      <script>console.log('fine'); console.warn('warned'); console.assert(false, 'asserted')</script>
      <script>throw Error('thrown')</script>
    """)
    with new_window(browser) as window:
        page = window.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        heard = complaints(page)
    for part in ("inline style", "img-src", "warned", "asserted", "thrown", "request of file:"):
        assert sum(part in complaint for complaint in heard) == 1, (part, heard)
    assert len(heard) == 6, heard


@pytest.mark.parametrize("name", ["clean", "hostile", "slow_data"])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_draws_without_complaint(name: str, dark: bool, browser: Browser, request) -> None:
    analysis = request.getfixturevalue(name)
    page = open_report(browser, analysis.out / "report.html", width=1100, dark=dark)
    let_draw(page)
    assert page.evaluate("hpcmmTimeline.lanes.length") == 4
    assert page.evaluate("document.title").endswith("hpcmm")
    assert page.evaluate("document.querySelectorAll('img, iframe, object, embed, link').length") == 0
    colours = page.evaluate("new Set(hpcmmTimeline.canvas.getContext('2d').getImageData(140, 40, 400, 120).data).size")
    assert colours > 10
    ground = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()")
    assert (ground == "#171c23") is dark
    assert complaints(page) == []


@pytest.mark.parametrize("name", ["slow_data", "hostile"])
@pytest.mark.parametrize("width", [390, 1000, 1280])
def test_the_page_fits_the_window(name: str, width: int, browser: Browser, request) -> None:
    page = open_report(browser, request.getfixturevalue(name).out / "report.html", width=width, height=800)
    let_draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = """[...document.querySelectorAll('section > *')].filter((part) =>
      part.getBoundingClientRect().right > part.parentElement.getBoundingClientRect().right).length"""
    assert page.evaluate(sticking_out) == 0
    assert complaints(page) == []


def test_a_verdict_leads_to_its_worst_step(slow_page: Page, slow_data: Analysis) -> None:
    worst = int(slow_data.tables["bottlenecks"].iloc[0]["worst_step"])
    button = slow_page.locator("tr[data-step] button").first
    assert button.text_content() == f"step {worst}"
    button.click()
    start, end = view(slow_page)
    times = slow_data.tables["steps"]
    times = times[times["step"] == worst]
    assert start < times["start_s"].min() < (times["start_s"] + times["duration_s"]).max() < end
    assert end - start < 1.3 * ((times["start_s"] + times["duration_s"]).max() - times["start_s"].min())
    assert slow_page.evaluate("[...hpcmmTimeline.focus.ranks]") == [2]
    assert slow_page.evaluate("document.querySelector('tr.chosen td').textContent") == "1"
    let_draw(slow_page)
    assert -5 < place(slow_page, "#timeline-section")["y"] < 400


def test_hovering_tells_phase_and_wait(slow_page: Page) -> None:
    slow_page.evaluate("hpcmmTimeline.showStep(hpcmmTimeline.steps.number.indexOf(13))")
    let_draw(slow_page)
    tooltip = "document.querySelector('#timeline .tooltip').textContent"
    slow_page.mouse.move(*lane_point(slow_page, 2, 0.3, comm=False))
    assert re.fullmatch(r"data, step 13\nrank 2 on node2\n[\d.]+ ms from [\d.]+ s", slow_page.evaluate(tooltip))
    slow_page.mouse.move(*lane_point(slow_page, 0, 0.4, comm=True))
    told = slow_page.evaluate(tooltip)
    assert re.match(r"all_reduce in group 0, sequence \d+\nrank 0 on node1, 262 kB\n", told)
    assert told.endswith("last to come: rank 2")
    assert slow_page.evaluate("hpcmmTimeline.lanes[hpcmmTimeline.cursor.late].rank") == 2
    slow_page.mouse.move(2, 2)
    assert slow_page.evaluate("document.querySelector('#timeline .tooltip').hidden")


def test_mouse_and_keys_zoom_and_move(slow_page: Page) -> None:
    slow_page.evaluate("hpcmmTimeline.showAll()")
    whole = view(slow_page)
    x, y = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.mouse.move(x, y)
    slow_page.mouse.wheel(0, -300)
    assert view(slow_page) == whole, "the wheel scrolls the page until the timeline is clicked"
    x, y = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.mouse.click(x, y)
    slow_page.mouse.move(x, y)
    slow_page.mouse.wheel(0, -600)
    zoomed = view(slow_page)
    assert zoomed[1] - zoomed[0] < 0.5 * (whole[1] - whole[0])
    slow_page.mouse.move(x, y)
    slow_page.mouse.down()
    slow_page.mouse.move(x + 100, y)
    slow_page.mouse.up()
    moved = view(slow_page)
    assert moved[0] < zoomed[0]
    assert moved[1] - moved[0] == pytest.approx(zoomed[1] - zoomed[0])
    slow_page.keyboard.press("+")
    assert view(slow_page)[1] - view(slow_page)[0] == pytest.approx(0.6 * (moved[1] - moved[0]))
    slow_page.keyboard.press("Home")
    assert view(slow_page) == whole
    slow_page.keyboard.press("n")
    first = view(slow_page)
    slow_page.keyboard.press("n")
    assert view(slow_page)[0] > first[0]
    slow_page.keyboard.press("ArrowDown")
    assert "rank 0 on node1" in slow_page.evaluate("document.querySelector('#timeline .spoken').textContent")
    slow_page.mouse.dblclick(x, y)
    assert view(slow_page) == whole


def test_dragging_with_shift_chooses_a_range(slow_page: Page) -> None:
    slow_page.evaluate("hpcmmTimeline.showAll()")
    whole = view(slow_page)
    x, y = lane_point(slow_page, 1, 0.25, comm=False)
    end, _ = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.keyboard.down("Shift")
    slow_page.mouse.move(x, y)
    slow_page.mouse.down()
    slow_page.mouse.move(end, y)
    slow_page.mouse.up()
    slow_page.keyboard.up("Shift")
    chosen = view(slow_page)
    length = whole[1] - whole[0]
    assert chosen[0] == pytest.approx(whole[0] + 0.25 * length, abs=0.01 * length)
    assert chosen[1] == pytest.approx(whole[0] + 0.5 * length, abs=0.01 * length)


def test_the_plot_of_step_times_leads_to_the_timeline(slow_page: Page, slow_data: Analysis) -> None:
    slow_page.evaluate("document.querySelector('#step-plot').scrollIntoView({block: 'center'})")
    box = place(slow_page, "#step-plot .plot-area")
    steps = slow_data.tables["steps"]
    last = int(steps["step"].max())
    x, y = box["x"] + box["width"] * 10 / last, box["y"] + 60
    slow_page.mouse.move(x, y)
    median = steps.loc[steps["step"] == 10, "duration_s"].median()
    told = slow_page.evaluate("document.querySelector('#step-plot .tooltip').textContent")
    assert told.startswith(f"step 10\nmedian {median * 1e3:.4g} ms")
    slow_page.mouse.click(x, y)
    start, end = view(slow_page)
    assert start < steps.loc[steps["step"] == 10, "start_s"].min() < end
    assert slow_page.evaluate("document.querySelector('#step-plot .window').getAttribute('visibility')") == "visible"
    assert complaints(slow_page) == []


def test_a_printed_page_is_light_and_whole(browser: Browser, slow_data: Analysis) -> None:
    page = open_report(browser, slow_data.out / "report.html", dark=True)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#ffffff"
    assert page.evaluate("document.querySelector('details[data-print]').open")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#171c23"
    assert len(page.pdf(print_background=True)) > 15_000
    assert complaints(page) == []


FIXED_WORK = """() => Array.from({ length: 10 }, () => {
  const began = performance.now();
  let sum = 0;
  for (let number = 0; number < 5e5; number += 1) sum = (sum + number * number) % 7;
  return sum < 0 ? 0 : performance.now() - began;
})"""
"""Milliseconds that each of some loops takes, which no page can make shorter."""


def test_a_large_run_stays_responsive(large_page: tuple[Page, Path]) -> None:
    page, path = large_page
    assert path.stat().st_size < 6_000_000
    assert page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
    assert page.evaluate("hpcmmTimeline.lanes.length") == RANKS
    assert page.evaluate("hpcmmTimeline.lanes.reduce((sum, lane) => sum + lane.phaseRow.starts.length, 0)") == (
        RANKS * STEPS * len(PHASES)
    )
    usual = page.evaluate(FIXED_WORK)
    drawn = page.evaluate(ZOOM_FRAMES)
    usual = statistics.median(usual + page.evaluate(FIXED_WORK))
    # As much as a fixed piece of work takes here and now, for the machine may be busy.
    assert statistics.median(drawn) < max(40, 4 * usual)
    assert max(drawn) < max(500, 50 * usual)
    assert complaints(page) == []


def test_the_whole_of_a_large_run_shows_its_slow_rank(large_page: tuple[Page, Path]) -> None:
    """Zoomed out, each column is many steps: the phases' shares must still be told and seen."""
    page, _ = large_page
    page.evaluate("hpcmmTimeline.showAll()")
    let_draw(page)
    tooltip = "document.querySelector('#timeline .tooltip').textContent"
    shares = {}
    for lane in (SLOW_RANK, SLOW_RANK + 1):
        page.mouse.move(*lane_point(page, lane, 0.5, comm=False))
        told = re.search(r"data ([\d.]+)%", page.evaluate(tooltip))
        shares[lane] = float(told[1]) if told else 0.0
    assert shares[SLOW_RANK] > 2 * shares[SLOW_RANK + 1]
    orange = """(lane) => {
      const { canvas, laneHeight, view, ratio } = hpcmmTimeline, top = AXIS_HEIGHT + lane * laneHeight;
      const box = [view.left, top, view.right - view.left, laneHeight].map((value) => Math.round(value * ratio));
      const pixels = new Uint32Array(canvas.getContext("2d").getImageData(...box).data.buffer);
      const wanted = hpcmmTimeline.phasePaint.solid[hpcmmTimeline.data.phases.indexOf("data")];
      return pixels.filter((value) => value === wanted).length;
    }"""
    slow, usual = (page.evaluate(f"({orange})({lane})") for lane in (SLOW_RANK, SLOW_RANK + 1))
    assert slow > usual + 200


def test_a_report_without_steps_has_a_page(browser: Browser, samples_without_steps: Analysis) -> None:
    page = open_report(browser, samples_without_steps.out / "report.html")
    let_draw(page)
    assert page.evaluate("document.querySelector('.headline').textContent").startswith("No steps")
    assert page.evaluate("document.querySelectorAll('#gpus .stack').length") == 2
    assert complaints(page) == []
