"""Scores of answers against their definitions, and against answers that know nothing of the image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.workloads.anomaly.question_answering.conversations import ParsedAnswer
from hpcmm.workloads.anomaly.question_answering.scores import METRICS, answer_scores, statements

SAID = st.builds(
    lambda verdict, cells: ParsedAnswer(verdict, cells if verdict else frozenset()),
    st.sampled_from([True, False, None]),
    st.frozensets(st.integers(0, 8), max_size=3),
)
TRUE = st.builds(
    lambda verdict, cells: ParsedAnswer(verdict, cells if verdict else frozenset()),
    st.booleans(),
    st.frozensets(st.integers(0, 8), max_size=2),
)


def by_definition(pairs: list[tuple[ParsedAnswer, ParsedAnswer]]) -> dict[str, float]:
    """METRICS of (said, true), written out image by image."""
    placed = [(said, true) for said, true in pairs if true.cells]
    overlap = [len(said.cells & true.cells) / len(said.cells | true.cells) for said, true in placed]
    return {
        "words_detection": np.mean([said.anomalous == true.anomalous for said, true in pairs]),
        "words_grid": np.mean([said.cells == true.cells for said, true in placed]) if placed else np.nan,
        "words_overlap": np.mean(overlap) if placed else np.nan,
    }


@given(st.lists(st.tuples(SAID, TRUE), min_size=1, max_size=6))
def test_scores_are_their_definitions(pairs: list[tuple[ParsedAnswer, ParsedAnswer]]):
    said, true = zip(*pairs, strict=True)
    scores = answer_scores(statements(said), statements(true))
    for metric, value in by_definition(pairs).items():
        assert scores[metric] == pytest.approx(value, nan_ok=True)


@given(st.lists(st.tuples(SAID, TRUE), min_size=1, max_size=5))
def test_shuffled_is_the_mean_over_all_orders(pairs: list[tuple[ParsedAnswer, ParsedAnswer]]):
    said, true = zip(*pairs, strict=True)
    scores = answer_scores(statements(said), statements(true))
    orders = [by_definition(list(zip(order, true, strict=True))) for order in itertools.permutations(said)]
    assert scores["words_detection_shuffled"] == pytest.approx(np.mean([each["words_detection"] for each in orders]))
    placed = [(each, right) for each, right in pairs if right.cells]
    if placed:
        said, true = zip(*placed, strict=True)
        orders = [by_definition(list(zip(order, true, strict=True))) for order in itertools.permutations(said)]
        for metric in METRICS[1:]:
            assert scores[f"{metric}_shuffled"] == pytest.approx(np.mean([each[metric] for each in orders]))


@given(st.lists(TRUE, min_size=1, max_size=6), st.sampled_from([True, False]), st.frozensets(st.integers(0, 8)))
def test_no_constant_answer_of_a_true_place_beats_the_constant(
    truth: list[ParsedAnswer], verdict: bool, cells: frozenset[int]
):
    scores = answer_scores(statements(truth), statements(truth))
    places = {each.cells for each in truth if each.cells}
    for place in places or {cells}:
        said = ParsedAnswer(verdict, place if verdict else frozenset())
        constant = by_definition([(said, each) for each in truth])
        for metric in METRICS:
            assert not constant[metric] > scores[f"{metric}_constant"] + 1e-9


def test_right_answers_score_one_and_unreadable_ones_none():
    truth = [ParsedAnswer(True, frozenset({0, 1})), ParsedAnswer(False, frozenset())]
    right = answer_scores(statements(truth), statements(truth))
    assert [right[metric] for metric in METRICS] == [1, 1, 1]
    nothing = answer_scores(statements([ParsedAnswer(None, frozenset())] * 2), statements(truth))
    assert [nothing[metric] for metric in METRICS] == [0, 0, 0]
    assert nothing["words_detection_constant"] == 0.5


def test_the_order_of_the_ranks_changes_no_score():
    rng = np.random.default_rng(0)
    truth = statements([ParsedAnswer(bool(n % 2), frozenset({n % 9}) if n % 2 else frozenset()) for n in range(31)])
    said = truth[rng.permutation(31)]
    order = np.concatenate([np.arange(rank, 31, 4) for rank in range(4)])  # as ranks with an uneven share gather them
    assert answer_scores(said[order], truth[order]) == pytest.approx(answer_scores(said, truth))
