"""The page and the texts with names that try to break out of them."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpcmm.analyze import Analysis
from hpcmm.files import write_together
from hpcmm.page.headlines import number, plain, seconds
from hpcmm.page.html import _suggestion
from hpcmm.page.outputs import escape, summary


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


def test_the_page_loads_nothing(clean: Analysis) -> None:
    page = (clean.out / "report.html").read_text()
    assert all(link.startswith("href=#") for link in parse(page).loads)
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 300_000


def test_only_the_pages_own_script_and_style_may_run(clean: Analysis) -> None:
    page = (clean.out / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = unescape(policy[1])
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    for element in ("style", "script"):
        found = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in allowed
    # Attributes of either kind would be refused by the browser.
    assert " style=" not in page
    assert re.search(r"\son\w+=", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)) is None


def test_the_links_of_the_page_lead_somewhere(clean: Analysis) -> None:
    page = (clean.out / "report.html").read_text()
    for link in re.findall(r'href="#([^"]*)"', page):
        assert f'id="{link}"' in page


def test_hostile_names_reach_the_page_as_text_only(clean: Analysis, hostile: Analysis) -> None:
    page = (hostile.out / "report.html").read_text()
    ours, theirs = parse((clean.out / "report.html").read_text()), parse(page)
    assert theirs.tags["script"] == ours.tags["script"] == 3
    assert "img" not in theirs.tags
    assert "\x1b" not in page
    assert "&lt;img src=x" in page
    assert len(page) < 400_000


def test_the_data_of_the_timeline_is_json_and_names_survive(hostile: Analysis) -> None:
    page = (hostile.out / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="timeline-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert len(data["lanes"]) == 4
    assert any("document.title" in name for name in data["phases"])


def test_the_verdict_holds_under_hostile_names(hostile: Analysis) -> None:
    assert hostile.tables["bottlenecks"].iloc[0]["rank"] == 2


def test_markdown_shows_foreign_text_as_text(hostile: Analysis) -> None:
    text = summary(hostile.study)
    assert "<script>" not in text
    assert "<img" not in text
    assert escape("a|b*c\n<x>") == "a\\|b\\*c\N{REPLACEMENT CHARACTER}&lt;x&gt;"
    header = next(line for line in text.splitlines() if line.startswith("| # |"))
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows
    assert {re.sub(r"\\\|", "", row).count("|") for row in rows} == {header.count("|")}


def test_the_summary_fits_a_ticket(clean: Analysis) -> None:
    text = summary(clean.study)
    assert len(text.splitlines()) < 30
    assert len(text) < 2500


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "12.3 ms"),
        (2.0, "2 s"),
        (0.0, "0 s"),
        (3.2e-5, "32 µs"),
        (123.4, "123 s"),
        (0.99999, "1 s"),
        (4321.0, "4,321 s"),
    ],
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


@pytest.mark.parametrize(
    ("suggestion", "advice", "code"),
    [
        ("data.num_workers=2", "", "data.num_workers=2"),
        ("srun -w n1 dmesg -T | grep -i oom", "", "srun -w n1 dmesg -T | grep -i oom"),
        ("accumulate gradients over more batches", "accumulate gradients over more batches", ""),
        ("load in processes: DataLoader(..., num_workers=2)", "load in processes:", "DataLoader(..., num_workers=2)"),
    ],
)
def test_what_to_type_is_told_from_what_to_do(suggestion: str, advice: str, code: str) -> None:
    assert _suggestion(suggestion) == {"advice": advice, "code": code}
