"""The page in a real browser: it draws, answers mouse and keys, complains about nothing, and names stay text."""

import re
import shutil
import statistics
from pathlib import Path

import pytest
from browser import Browser, Page
from large_study import PHASES, SLOW_RANK, large_study

from hpcmm.analyze import Analysis
from hpcmm.page.html import page as render

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

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
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def slow_page(browser: Browser, slow_data: Analysis) -> Page:
    return browser.open(slow_data.out / "report.html")


@pytest.fixture(scope="module")
def large_page(browser: Browser, slow_data: Analysis, tmp_path_factory) -> tuple[Page, Path]:
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(render(large_study(slow_data.study, ranks=RANKS, steps=STEPS)))
    return browser.open(path), path


def view(page: Page) -> tuple[float, float]:
    """What the timeline shows, in seconds."""
    page.frame()
    start, end = page.run("[hpcmmTimeline.view.from, hpcmmTimeline.view.to].map((t) => t / hpcmmTimeline.second)")
    return start, end


def lane_point(page: Page, lane: int, share: float, *, comm: bool) -> tuple[float, float]:
    """A point of the window: ``share`` of the way along a lane's row of phases or communication."""
    page.run("document.querySelector('#timeline canvas').scrollIntoView({block: 'center'})")
    box = page.box("#timeline canvas")
    left, high = page.run("[hpcmmTimeline.view.left, hpcmmTimeline.laneHeight]")
    y = box["y"] + page.run("AXIS_HEIGHT") + (lane + (0.8 if comm else 0.3)) * high
    return box["x"] + left + share * (box["width"] - left), y


@pytest.mark.parametrize("name", ["clean", "hostile", "slow_data"])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_draws_without_complaint(name: str, dark: bool, browser: Browser, request) -> None:
    analysis = request.getfixturevalue(name)
    page = browser.open(analysis.out / "report.html", width=1100, dark=dark)
    page.frame()
    assert page.run("hpcmmTimeline.lanes.length") == 4
    assert page.run("document.title").endswith("hpcmm")
    assert page.run("document.querySelectorAll('img, iframe, object, embed, link').length") == 0
    colours = page.run("new Set(hpcmmTimeline.canvas.getContext('2d').getImageData(140, 40, 400, 120).data).size")
    assert colours > 10
    ground = page.run("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()")
    assert (ground == "#171c23") is dark
    assert page.complaints() == []


@pytest.mark.parametrize("name", ["slow_data", "hostile"])
@pytest.mark.parametrize("width", [390, 1000, 1280])
def test_the_page_fits_the_window(name: str, width: int, browser: Browser, request) -> None:
    page = browser.open(request.getfixturevalue(name).out / "report.html", width=width, height=800)
    page.frame()
    assert page.run("document.documentElement.scrollWidth") <= width
    sticking_out = """[...document.querySelectorAll('section > *')].filter((part) =>
      part.getBoundingClientRect().right > part.parentElement.getBoundingClientRect().right).length"""
    assert page.run(sticking_out) == 0
    assert page.complaints() == []


def test_a_verdict_leads_to_its_worst_step(slow_page: Page, slow_data: Analysis) -> None:
    worst = int(slow_data.tables["bottlenecks"].iloc[0]["worst_step"])
    row = slow_page.box("tr[data-step] button")
    assert slow_page.run("document.querySelector('tr[data-step] button').textContent") == f"step {worst}"
    slow_page.click(row["x"] + 5, row["y"] + 5)
    start, end = view(slow_page)
    times = slow_data.tables["steps"]
    times = times[times["step"] == worst]
    assert start < times["start_s"].min() < (times["start_s"] + times["duration_s"]).max() < end
    assert end - start < 1.3 * ((times["start_s"] + times["duration_s"]).max() - times["start_s"].min())
    assert slow_page.run("[...hpcmmTimeline.focus.ranks]") == [2]
    assert slow_page.run("document.querySelector('tr.chosen td').textContent") == "1"
    slow_page.frame()
    assert -5 < slow_page.box("#timeline-section")["y"] < 400


def test_hovering_tells_phase_and_wait(slow_page: Page) -> None:
    slow_page.run("hpcmmTimeline.showStep(hpcmmTimeline.steps.number.indexOf(13))")
    slow_page.frame()
    tooltip = "document.querySelector('#timeline .tooltip').textContent"
    slow_page.mouse("Moved", *lane_point(slow_page, 2, 0.3, comm=False))
    assert re.fullmatch(r"data, step 13\nrank 2 on node2\n[\d.]+ ms from [\d.]+ s", slow_page.run(tooltip))
    slow_page.mouse("Moved", *lane_point(slow_page, 0, 0.4, comm=True))
    told = slow_page.run(tooltip)
    assert re.match(r"all_reduce in group 0, sequence \d+\nrank 0 on node1, 262 kB\n", told)
    assert told.endswith("last to come: rank 2")
    assert slow_page.run("hpcmmTimeline.lanes[hpcmmTimeline.cursor.late].rank") == 2
    slow_page.mouse("Moved", 2, 2)
    assert slow_page.run("document.querySelector('#timeline .tooltip').hidden")


def test_mouse_and_keys_zoom_and_move(slow_page: Page) -> None:
    slow_page.run("hpcmmTimeline.showAll()")
    whole = view(slow_page)
    x, y = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.mouse("Wheel", x, y, deltaX=0, deltaY=-300)
    assert view(slow_page) == whole, "the wheel scrolls the page until the timeline is clicked"
    x, y = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.click(x, y)
    slow_page.mouse("Wheel", x, y, deltaX=0, deltaY=-600)
    zoomed = view(slow_page)
    assert zoomed[1] - zoomed[0] < 0.5 * (whole[1] - whole[0])
    slow_page.mouse("Pressed", x, y, button="left", clickCount=1)
    slow_page.mouse("Moved", x + 100, y, button="left")
    slow_page.mouse("Released", x + 100, y, button="left", clickCount=1)
    moved = view(slow_page)
    assert moved[0] < zoomed[0]
    assert moved[1] - moved[0] == pytest.approx(zoomed[1] - zoomed[0])
    slow_page.key("+")
    assert view(slow_page)[1] - view(slow_page)[0] == pytest.approx(0.6 * (moved[1] - moved[0]))
    slow_page.key("Home")
    assert view(slow_page) == whole
    slow_page.key("n")
    first = view(slow_page)
    slow_page.key("n")
    assert view(slow_page)[0] > first[0]
    slow_page.key("ArrowDown")
    assert "rank 0 on node1" in slow_page.run("document.querySelector('#timeline .spoken').textContent")
    slow_page.click(x, y, count=2)
    assert view(slow_page) == whole


def test_dragging_with_shift_chooses_a_range(slow_page: Page) -> None:
    slow_page.run("hpcmmTimeline.showAll()")
    whole = view(slow_page)
    shift = 8
    x, y = lane_point(slow_page, 1, 0.25, comm=False)
    end, _ = lane_point(slow_page, 1, 0.5, comm=False)
    slow_page.mouse("Pressed", x, y, button="left", clickCount=1, modifiers=shift)
    slow_page.mouse("Moved", end, y, button="left", modifiers=shift)
    slow_page.mouse("Released", end, y, button="left", clickCount=1, modifiers=shift)
    chosen = view(slow_page)
    length = whole[1] - whole[0]
    assert chosen[0] == pytest.approx(whole[0] + 0.25 * length, abs=0.01 * length)
    assert chosen[1] == pytest.approx(whole[0] + 0.5 * length, abs=0.01 * length)


def test_the_plot_of_step_times_leads_to_the_timeline(slow_page: Page, slow_data: Analysis) -> None:
    slow_page.run("document.querySelector('#step-plot').scrollIntoView({block: 'center'})")
    box = slow_page.box("#step-plot .plot-area")
    steps = slow_data.tables["steps"]
    last = int(steps["step"].max())
    x, y = box["x"] + box["width"] * 10 / last, box["y"] + 60
    slow_page.mouse("Moved", x, y)
    median = steps.loc[steps["step"] == 10, "duration_s"].median()
    told = slow_page.run("document.querySelector('#step-plot .tooltip').textContent")
    assert told.startswith(f"step 10\nmedian {median * 1e3:.4g} ms")
    slow_page.click(x, y)
    start, end = view(slow_page)
    assert start < steps.loc[steps["step"] == 10, "start_s"].min() < end
    assert slow_page.run("document.querySelector('#step-plot .window').getAttribute('visibility')") == "visible"
    assert slow_page.complaints() == []


def test_a_printed_page_is_light_and_whole(browser: Browser, slow_data: Analysis) -> None:
    page = browser.open(slow_data.out / "report.html", dark=True)
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    assert page.run("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#ffffff"
    assert page.run("document.querySelector('details[data-print]').open")
    page.run("window.dispatchEvent(new Event('afterprint'))")
    assert page.run("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#171c23"
    assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 20_000
    assert page.complaints() == []


def test_a_large_run_stays_responsive(large_page: tuple[Page, Path]) -> None:
    page, path = large_page
    assert path.stat().st_size < 6_000_000
    assert page.run("performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
    assert page.run("hpcmmTimeline.lanes.length") == RANKS
    assert page.run("hpcmmTimeline.lanes.reduce((sum, lane) => sum + lane.phaseRow.starts.length, 0)") == (
        RANKS * STEPS * len(PHASES)
    )
    drawn = page.run(ZOOM_FRAMES)
    # 60 frames a second leave 17 ms; the whole run, the worst case, may take a few frames on a busy machine.
    assert statistics.median(drawn) < 40
    assert max(drawn) < 500
    assert page.complaints() == []


def test_the_whole_of_a_large_run_shows_its_slow_rank(large_page: tuple[Page, Path]) -> None:
    """Zoomed out, each column is many steps: the phases' shares must still be told and seen."""
    page, _ = large_page
    page.run("hpcmmTimeline.showAll()")
    page.frame()
    tooltip = "document.querySelector('#timeline .tooltip').textContent"
    shares = {}
    for lane in (SLOW_RANK, SLOW_RANK + 1):
        page.mouse("Moved", *lane_point(page, lane, 0.5, comm=False))
        told = re.search(r"data ([\d.]+)%", page.run(tooltip))
        shares[lane] = float(told[1]) if told else 0.0
    assert shares[SLOW_RANK] > 2 * shares[SLOW_RANK + 1]
    orange = """(lane) => {
      const { canvas, laneHeight, view, ratio } = hpcmmTimeline, top = AXIS_HEIGHT + lane * laneHeight;
      const box = [view.left, top, view.right - view.left, laneHeight].map((value) => Math.round(value * ratio));
      const pixels = new Uint32Array(canvas.getContext("2d").getImageData(...box).data.buffer);
      const wanted = hpcmmTimeline.phasePaint.solid[hpcmmTimeline.data.phases.indexOf("data")];
      return pixels.filter((value) => value === wanted).length;
    }"""
    slow, usual = (page.run(f"({orange})({lane})") for lane in (SLOW_RANK, SLOW_RANK + 1))
    assert slow > usual + 200


def test_a_report_without_steps_has_a_page(browser: Browser, samples_without_steps: Analysis) -> None:
    page = browser.open(samples_without_steps.out / "report.html")
    page.frame()
    assert page.run("document.querySelector('.headline').textContent").startswith("No steps")
    assert page.run("document.querySelectorAll('#gpus .stack').length") == 2
    assert page.complaints() == []
