"""The rule's words: the verdict is that of the threshold, the place that of the marked pixels."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from hpcmm.workloads.anomaly.page.findings import rule_answer
from hpcmm.workloads.anomaly.question_answering.conversations import parse_answer
from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES


@pytest.mark.parametrize("cell", range(9))
def test_a_defect_is_named_by_its_cell(cell):
    values = np.full((48, 48), 0.1, np.float32)
    row, column = divmod(cell, 3)
    values[16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12] = 0.9
    assert rule_answer(values, 0.8, 0.5) == (
        f"Yes, there is an anomaly, {CELL_NAMES[cell]}: the score 0.80 reaches the threshold 0.50."
    )


def test_below_the_threshold_nothing_is_named():
    assert rule_answer(np.ones((9, 9), np.float32), 0.2, 0.5).startswith("No, nothing looks anomalous: the score 0.20")


def test_a_score_that_no_pixel_reaches_has_no_place():
    assert ", top" not in rule_answer(np.zeros((9, 9), np.float32), 0.5, 0.5)


@given(score=st.floats(0, 1), threshold=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_words_say_what_the_score_says(score, threshold, seed):
    values = np.random.default_rng(seed).random((12, 12), np.float32)
    assert parse_answer(rule_answer(values, score, threshold)).anomalous is (score >= threshold)
