"""Answers say what the mask says, and are read back as what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hpcmm.workloads.anomaly.question_answering.conversations import (
    TEMPLATES,
    ParsedAnswer,
    affirm,
    converse,
    parse_answer,
)
from hpcmm.workloads.anomaly.question_answering.grid import defect_cells

CELLS = st.frozensets(st.integers(0, 8))
TEMPLATE = st.sampled_from(TEMPLATES)


@given(TEMPLATE, CELLS)
def test_reading_an_answer_gives_back_its_cells(template, cells):
    assert parse_answer(affirm(template, cells)) == ParsedAnswer(True, cells)


@given(TEMPLATE)
def test_reading_a_denial_gives_back_a_denial(template):
    assert parse_answer(template.no) == ParsedAnswer(False, frozenset())


@given(arrays.arrays(np.bool_, (12, 12)), st.integers(-3, 100))
def test_a_dialogue_says_what_the_mask_says(mask, template):
    label = int(mask.any())
    said = parse_answer(converse(label, mask, template).answer)
    assert said == ParsedAnswer(bool(label), frozenset(defect_cells(mask)))


@given(st.text(max_size=200))
def test_any_text_can_be_read(text):
    said = parse_answer(text)
    assert said.anomalous in {True, False, None}
    assert said.anomalous or not said.cells


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes, at the top-left corner.", ParsedAnswer(True, frozenset({0}))),
        ("YES: bottom.", ParsedAnswer(True, frozenset({7}))),
        ("Yes, on the left and in the bottom right", ParsedAnswer(True, frozenset({3, 8}))),
        ("Yes, something stopped.", ParsedAnswer(True, frozenset())),
        ("No, the top left is fine.", ParsedAnswer(False, frozenset())),
        ("Nothing is wrong.", ParsedAnswer(None, frozenset())),
        ("", ParsedAnswer(None, frozenset())),
    ],
)
def test_free_wording_is_read(text: str, said: ParsedAnswer):
    assert parse_answer(text) == said


def test_a_damaged_image_without_a_visible_mask_gets_no_place():
    dialogue = converse(1, np.zeros((8, 8)), 0)
    assert parse_answer(dialogue.answer) == ParsedAnswer(True, frozenset())


def test_the_templates_questions_differ():
    assert len({template.question for template in TEMPLATES}) == len(TEMPLATES) >= 3
