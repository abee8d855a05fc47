"""What others wrote stays text: in the page, in its templates, and in a spreadsheet."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from hpcmm.serve.served import sentence
from hpcmm.serve.uploads import jpeg, shrunk
from hpcmm.workloads.anomaly.page import rendering
from hpcmm.workloads.anomaly.page.drawing import LARGEST_SIDE, overlay
from hpcmm.workloads.anomaly.page.findings import Seen
from hpcmm.workloads.anomaly.page.rendering import CSV_COLUMNS, Row

HOSTILE = [
    "<img src=x onerror=alert(1)>.png", "\"><script>alert(1)</script>", "${alert(1)}", "{{value}}", "{#if}",
    "=cmd|'/c calc'!A0",
    "a\x1b[31m\u202egnp.exe", "'><b>", "&lt;b&gt;",
]  # fmt: skip


def seen(name="a.png", score=0.8, words=None, note="") -> Seen:
    values = np.zeros((16, 16), np.float32)
    values[2:5, 2:5] = 0.9
    return Seen(name, jpeg(Image.new("RGB", (64, 48), "grey")), values, score, words, note)


class Tags(HTMLParser):
    """Names of all tags, their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


PLAIN = Tags(
    rendering.result(seen(), 0.5)
    + rendering.table([Row("a", seen())], 0.5)
    + rendering.gallery([Row("a", seen())], 0.5)
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_template(text):
    rows = [Row(text, seen(text, words=text, note=text)), Row(text, None, text)]
    page = "".join(
        [
            rendering.result(rows[0].seen, 0.5),
            rendering.table(rows, 0.5),
            rendering.gallery(rows, 0.5),
            sentence(text),
        ]
    )
    found = Tags(page)
    assert found.tags <= PLAIN.tags | {"div", "p"}
    assert found.attributes <= PLAIN.attributes
    assert not any(mark in page for mark in ("$", "{", "}", "\x1b", "\u202e"))


@given(st.text(max_size=40))
def test_any_text_is_shown_as_it_is(text):
    shown = Tags(sentence(text)).text
    assert shown == "".join(each if each.isprintable() else "\ufffd" for each in text)


def test_the_threshold_alone_decides_the_verdict():
    found = seen(score=0.5)
    assert 'data-verdict="anomalous"' in rendering.result(found, 0.5)
    assert 'data-verdict="normal"' in rendering.result(found, 0.51)


def test_the_page_says_who_speaks():
    assert "a rule on the heat map" in rendering.result(seen(), 0.5)
    spoken = rendering.result(seen(words="Yes, top left."), 0.5)
    assert "Yes, top left." in spoken
    assert "the language model" in spoken


def test_the_table_counts_and_sorts():
    rows = [Row("low", seen("low", 0.2)), Row("broken", None, "It is damaged."), Row("high", seen("high", 0.9))]
    text = rendering.table(rows, 0.5)
    assert text.startswith('<p class="hpcmm-answer">1 of 2 images are anomalous at the threshold 0.50. 1 could not')
    assert text.index("high") < text.index("low") < text.index("broken")


def test_the_csv_has_a_line_a_file_and_no_formula():
    rows = [Row(name, seen(name)) for name in HOSTILE] + [Row("gone.png", None, "It is damaged.")]
    lines = list(csv.DictReader(io.StringIO(rendering.to_csv(rows, 0.5))))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert [line["file"].lstrip("'") for line in lines] == [row.name.lstrip("'") for row in rows]
    assert not any(value.startswith(("=", "+", "-", "@")) for line in lines for value in line.values())
    assert (lines[0]["score"], lines[0]["anomalous"]) == ("0.8000", "yes")
    assert (lines[-1]["score"], lines[-1]["problem"]) == ("", "It is damaged.")


def test_the_heat_lies_where_the_map_is_high_and_an_outline_around_it():
    image = Image.new("RGB", (160, 160), (90, 90, 90))
    values = np.zeros((16, 16), np.float32)
    values[2:6, 2:6] = 1
    drawn = np.asarray(overlay(image, values, 0.5)).astype(int)
    assert (drawn[100:, 100:] == 90).all()
    assert drawn[40, 40].sum() > 500
    outline = (drawn == [0, 229, 255]).all(axis=2)
    assert outline[15:65, 15:65].sum() > 100
    assert not outline[100:].any()
    assert not (np.asarray(overlay(image, values, 1.01)) == [0, 229, 255]).all(axis=2).any()


@pytest.mark.parametrize("size", [(10, 10), (4000, 1), (3, 5000), (560, 560)])
def test_pictures_are_of_the_page_s_size_whatever_was_uploaded(size):
    assert max(shrunk(Image.new("RGB", size), LARGEST_SIDE).size) == 560
