"""What the ranks of each recipe exchange in a step is what the literature counts, and no byte more."""

from __future__ import annotations

import pytest
from bytes_cases import RANKS, RECIPES, measure
from real_ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("compiled_ops")]


@pytest.fixture(scope="module")
def by_rank(compiled_ops: None):
    return run_ranks(RANKS, measure, timeout_s=270)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_exchanges_as_many_bytes_as_the_textbook_counts(recipe, by_rank):
    for rank, of_recipes in enumerate(by_rank):
        measured, expected = of_recipes[recipe]
        assert measured == expected, f"on rank {rank}"
