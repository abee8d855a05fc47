"""The page and the texts with names that try to break out of them."""

import json
import re
import shutil
import sqlite3
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.markdown import escape, summary
from hpcmm.page.terminal import print_study
from hpcmm.page.verdict import number, plain, seconds
from hpcmm.page.write import write_together

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x1b[31m|\n"


PROBE = """<script>
addEventListener("error", (event) => { document.title = `error ${event.message}`; });
setTimeout(() => {
  if (document.title === "owned" || document.title.startsWith("error")) return;
  const timeline = window.hpcmmTimeline;
  document.title = timeline ? `lanes ${timeline.lanes.length} ${timeline.lanes[0].phaseRow.starts.length}` : "none";
}, 1500);
</script>"""


class Elements(HTMLParser):
    """Counts of tags, and the attributes that load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.loads += [f"{name}={value}" for name, value in attrs if name in {"src", "href", "srcset", "action"}]


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Analysis:
    return analyze([SAMPLES / "clean"], tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Analysis:
    """The ``slow_data`` run, its phases, group, process, node and report file named to break out."""
    folder = tmp_path_factory.mktemp("hostile") / "reports"
    shutil.copytree(SAMPLES / "slow_data", folder)
    for path in folder.iterdir():
        with sqlite3.connect(path) as connection:
            for table, column in (("StringIds", "value"), ("NVTX_EVENTS", "text")):
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = 'data'", (EVIL,))  # noqa: S608
                connection.execute(
                    f"UPDATE {table} SET {column} = replace({column}, 'group=0', 'group=<b>')"  # noqa: S608
                    f" WHERE {column} LIKE '%group=%'"
                )
            connection.execute("UPDATE PROCESSES SET name = ?", (EVIL,))
            environment = connection.execute(
                "SELECT value FROM TARGET_INFO_SYSTEM_ENV WHERE nameEnum = 610"
            ).fetchone()[0]
            changed = re.sub("SLURMD_NODENAME=[^\0]*", lambda found: found[0] + EVIL, environment)
            connection.execute("UPDATE TARGET_INFO_SYSTEM_ENV SET value = ? WHERE nameEnum = 610", (changed,))
        connection.close()
    (folder / "rank_0000.sqlite").rename(folder / "<img src=x onerror=alert(1)>.sqlite")
    return analyze([folder], folder.parent / "out")


def test_the_page_loads_nothing(clean: Analysis) -> None:
    page = (clean.out / "report.html").read_text()
    assert parse(page).loads == []
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 300_000


def test_hostile_names_reach_the_page_as_text_only(clean: Analysis, hostile: Analysis) -> None:
    page = (hostile.out / "report.html").read_text()
    ours, theirs = parse((clean.out / "report.html").read_text()), parse(page)
    assert theirs.tags["script"] == ours.tags["script"] == 4
    assert "img" not in theirs.tags
    assert "\x1b" not in page
    assert "&lt;img src=x" in page


def test_the_data_of_the_timeline_is_json_and_names_survive(hostile: Analysis) -> None:
    page = (hostile.out / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="timeline-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert len(data["lanes"]) == 4
    assert any("document.title" in name for name in data["phases"])


def test_the_verdict_holds_under_hostile_names(hostile: Analysis) -> None:
    assert hostile.tables["bottlenecks"].iloc[0]["rank"] == 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("name", ["clean", "hostile"])
def test_the_page_runs_in_a_browser(name: str, request, tmp_path: Path) -> None:
    analysis = request.getfixturevalue(name)
    page = (analysis.out / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("<body>", f"<body>{PROBE}"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *flags, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert re.fullmatch(r"lanes 4 [1-9]\d*", title[1])


def test_markdown_shows_foreign_text_as_text(hostile: Analysis) -> None:
    text = summary(hostile.study)
    assert "<script>" not in text
    assert "<img" not in text
    assert escape("a|b*c\n<x>") == "a\\|b\\*c\N{REPLACEMENT CHARACTER}&lt;x&gt;"
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ") and "rank_order" in line}
    assert widths == {9}


def test_the_terminal_is_given_no_control_characters(hostile: Analysis) -> None:
    output = StringIO()
    print_study(hostile.study, hostile.out, Console(file=output, width=200, color_system=None))
    assert "\x1b" not in output.getvalue()
    assert "[31m" in output.getvalue()


def test_nothing_essential_is_cut_in_a_pipe(clean: Analysis, capsys) -> None:
    print_study(clean.study, Path("x" * 300))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Report: {'x' * 300}/report.html"
    assert any("train.gradient_accumulation_steps=2" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "12.3 ms"), (2.0, "2 s"), (0.0, "0 s"), (3.2e-5, "32 µs"), (123.4, "123 s")]
)
def test_durations_have_a_fitting_unit(value: float, text: str) -> None:
    assert seconds(value) == text


def test_numbers_for_people() -> None:
    assert number(12345) == "12,345"
    assert number(0.0123456) == "0.0123"
    assert number(123456.0) == "123,456"
    assert number(None) == number(float("nan")) == ""


def test_long_and_unprintable_names_are_tamed() -> None:
    assert plain("a\x1b[0m\nb") == "a\N{REPLACEMENT CHARACTER}[0m\N{REPLACEMENT CHARACTER}b"
    assert len(plain("x" * 1_000_000)) == 300


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_together(tmp_path, {"t.csv": "old"})
    (tmp_path / "u.csv").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        write_together(tmp_path, {"no/such/folder.csv": "new", "t.csv": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "u.csv"]
    assert (tmp_path / "t.csv").read_text() == "old"
